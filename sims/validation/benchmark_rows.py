"""Published throughput, one row of a CSV each: what was run, how fast it prefilled, how fast it decoded."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagedkv.errors import ConfigError

FURTHER = Path(__file__).with_name("further_rows.csv")
"""More rows of the DGX Spark, as evidence for fits; docs/validation.md says where they come from and how they were read.

Sources: each row names its own. llama.cpp's are the other halves of two files that dgx_spark_benchmarks.csv quotes in part, all of
them (MIT); those of vLLM 0.26 are the closed-loop tests of Django de Vreng's dgx-spark-benchmarks (CC BY 4.0).
"""
COLUMNS = (
    "source",
    "engine",
    "model",
    "weight_dtype",
    "batch",
    "prompt_tokens",
    "context_depth",
    "prefill_tok_s",
    "decode_tok_s",
    "note",
    "verified",
)
"""Columns that a file must have; others, such as params, are not read."""
OPTIONAL = ("output_tokens", "kv_cache_dtype")
"""Columns that a file may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """One row, as published."""

    line: int
    """Line of the file, from 2 on."""
    source: str
    """Who published it."""
    engine: str
    """The engine and its version in the publisher's words."""
    model: str
    """The model in the publisher's words."""
    weight_dtype: str
    """The weight format in the publisher's words; empty: not said."""
    batch: int
    """Sequences at once; rates are of all together."""
    prompt_tokens: int | None
    """Tokens of a sequence's prompt; None: not said."""
    context_depth: int | None
    """Tokens in its cache when the measurement begins; None: not said."""
    prefill_tok_s: float | None
    """Prompt tokens a second; None: not measured."""
    decode_tok_s: float | None
    """Output tokens a second, all sequences together; None: not measured."""
    note: str
    """What else was said."""
    verified: bool
    """Whether whoever collected the row believes it."""
    file: str = ""
    """Name of the file that it is in."""
    output_tokens: int | None = None
    """Tokens of an answer, over which a decode figure averages; None: not said."""
    kv_cache_dtype: str = ""
    """Type of the KV cache; empty: as the engine's rows say, else the model's own."""


def read_rows(path: Path) -> list[BenchmarkRow]:
    """Return the rows of a CSV with the columns `COLUMNS`.

    Columns `OPTIONAL` are read where there are.

    Raises:
        ConfigError: If the file cannot be read, lacks a column or has a cell that is no such number, with line and column.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header, cells = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read the benchmark rows {str(path)!r}: {error}") from error
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise ConfigError(
            f"{path}: no column {' and no column '.join(missing)}; its first line must name {','.join(COLUMNS)} (in any order)"
        )
    if not cells:
        raise ConfigError(f"{path}: no rows below the header: needs one row per measurement")
    return [_row(path, number, row) for number, row in enumerate(cells, start=2)]


def _row(path: Path, line: int, cells: Mapping[str, str | None]) -> BenchmarkRow:
    if any(cells[column] is None for column in COLUMNS):
        raise ConfigError(f"{path}, line {line}: fewer cells than the header has columns")

    def number(column: str, *, least: float, whole: bool) -> float | None:
        text = (cells.get(column) or "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf") or (whole and value != int(value)):
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{path}, line {line}, column {column}: {text!r} is no {kind} of {least:g} or more")
        return value

    def count(column: str, least: int) -> int | None:
        value = number(column, least=least, whole=True)
        return None if value is None else int(value)

    batch = count("batch", 1)
    if batch is None:
        raise ConfigError(f"{path}, line {line}, column batch: empty; write how many sequences ran at once, 1 or more")
    rates = {column: number(column, least=1e-6, whole=False) for column in ("prefill_tok_s", "decode_tok_s")}
    if all(rate is None for rate in rates.values()):
        raise ConfigError(f"{path}, line {line}: neither prefill_tok_s nor decode_tok_s: a row needs one of them")
    return BenchmarkRow(
        file=path.name,
        line=line,
        **{name: (cells[name] or "").strip() for name in ("source", "engine", "model", "weight_dtype", "note")},
        batch=batch,
        prompt_tokens=count("prompt_tokens", 0),
        context_depth=count("context_depth", 0),
        prefill_tok_s=rates["prefill_tok_s"],
        decode_tok_s=rates["decode_tok_s"],
        verified=(cells["verified"] or "").strip().lower().startswith("yes"),
        output_tokens=count("output_tokens", 1),
        kv_cache_dtype=(cells.get("kv_cache_dtype") or "").strip(),
    )
