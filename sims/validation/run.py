"""Every comparison for which data is at hand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedkv.catalogue import load_hardware
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.validation import log_section, published_section, served_section
from pagedkv.sims.validation.benchmark_rows import FURTHER, read_rows
from pagedkv.sims.validation.checks import Section
from pagedkv.sims.validation.log_section import section as section_of_log
from pagedkv.sims.validation.published import compare_rows
from pagedkv.sims.validation.published_section import section as section_of_rows
from pagedkv.sims.validation.served_section import section as section_of_loads
from pagedkv.sims.validation.studies import mooncake_section, sosp_section, watermark_section
from pagedkv.sims.validation.vllm_log import is_log

SCHEMA_VERSION = 1
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
"""Where the data lies beside a checkout; the product does not ship it."""
MACHINE = "dgx-spark"
ROWS = "dgx_spark_benchmarks.csv"
LOG = "vllm_rtx4090_llama31_8b"
SECTIONS = (published_section.NAME, served_section.NAME, log_section.NAME, "sosp23", "mooncake", "watermark")
"""What there is to compare, in order."""
_TITLES = {
    published_section.NAME: ("Published rows of the DGX Spark", ROWS),
    served_section.NAME: (served_section.TITLE, ""),
    log_section.NAME: ("A real vLLM run", LOG),
    "sosp23": ("PagedAttention, SOSP 2023", "sharegpt_lengths.csv.gz"),
    "mooncake": ("Prefix reuse on a real trace", "mooncake_synthetic.jsonl.gz"),
    "watermark": ("Watermark against preemptions", ""),
}
Telling = Callable[[str, float], None]
"""Told the name of a section and the share of all that is done before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What came out."""

    sections: tuple[Section, ...]

    @property
    def holds(self) -> bool:
        """Whether no bar fails."""
        return all(section.holds for section in self.sections)

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "holds": self.holds,
            "sections": [section.document() for section in self.sections],
        }


def validate(
    data: Path | None = None, *, only: tuple[str, ...] = SECTIONS, hardware: str | None = None, telling: Telling | None = None
) -> Validation:
    """Compare whatever there is data for.

    Args:
        data: A folder like shared/data, a CSV of rows, or a folder with a vLLM log; None: the folder beside a checkout.
        only: Names in `SECTIONS`.
        hardware: The machine of a CSV or a log; None: dgx-spark for rows, the one that a log names.
        telling: Told what is being compared.

    Raises:
        ConfigError: If there is no such data or section, or if it cannot be read; with what is needed.
    """
    for name in only:
        if name not in SECTIONS:
            raise unknown_name("section", name, SECTIONS)
    if data is not None and not data.exists():
        raise ConfigError(
            f"--data {str(data)!r} does not exist: name a CSV of rows (columns as in docs/validation.md), a folder with a vLLM log "
            f"(meta.json, requests.jsonl, timeseries.csv), or a folder with {ROWS} and the like"
        )
    machine = None if hardware is None else load_hardware(hardware)
    rows_machine = machine or load_hardware(MACHINE)
    if data is not None and data.is_file():
        return Validation(sections=(_rows_section(data, rows_machine),))
    if data is not None and is_log(data):
        return Validation(sections=(section_of_log(data, hardware),))
    folder = DATA if data is None else data
    if data is not None and not any((folder / needed).exists() for _, needed in _TITLES.values() if needed):
        raise ConfigError(
            f"--data {str(data)!r} holds nothing to compare with: needs one of "
            + ", ".join(each for _, each in _TITLES.values() if each)
        )
    sections = []
    for i, name in enumerate(only):
        if telling is not None:
            telling(name, i / len(only))
        title, needed = _TITLES[name]
        if needed and not (folder / needed).exists():
            sections.append(
                Section(
                    name=name,
                    title=title,
                    source="",
                    skipped=f"no {needed} in {folder.name or folder}: name its folder with --data",
                )
            )
        elif name == published_section.NAME:
            sections.append(_rows_section(folder / ROWS, rows_machine))
        elif name == served_section.NAME:
            sections.append(section_of_loads(load_hardware(MACHINE)))
        elif name == log_section.NAME:
            sections.append(section_of_log(folder / LOG))
        elif name == "sosp23":
            sections.append(sosp_section(folder))
        else:
            sections.append(mooncake_section(folder) if name == "mooncake" else watermark_section())
    return Validation(sections=tuple(sections))


def _rows_section(path: Path, hardware: HardwareSpec) -> Section:
    """Return the section of a file of rows; that of the Spark's comes with further rows of the machine."""
    further = read_rows(FURTHER) if path.name == ROWS and hardware.name == MACHINE else []
    return section_of_rows(compare_rows(path, hardware, further=further))
