"""`simulate calibrate`: measurements of a machine, what they identify, and the hardware file that comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pagedkv.catalogue import load_hardware
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.hardware_text import hardware_lines
from pagedkv.sims.calibrate.figures import LeftOut, figures_of
from pagedkv.sims.calibrate.memory import MemoryFound, memory_of
from pagedkv.sims.calibrate.speed import SpeedFound, speed_of
from pagedkv.sims.calibrate.subject import Subject, check_devices, subject_of
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.measurements import MeasuredRate, read_measurements
from pagedkv.sims.step_groups import group_lines

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationStudy:
    """What came out."""

    subject: Subject
    hardware: HardwareSpec
    """The calibrated machine, named after its file if it has one."""
    like: str
    """The catalogue's machine that it is like; empty: none."""
    speed: SpeedFound | None
    memory: MemoryFound | None
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    def toml(self) -> str:
        """Return the hardware file."""
        like = load_hardware(self.like) if self.like else None
        lines = ["# Written by simulate calibrate. What a line's source says was measured; all else is as it was.", ""]
        lines += hardware_lines(self.hardware, like=like)
        for group in self.hardware.step_constants:
            lines += ["", *group_lines(group)]
        return "\n".join(lines) + "\n"

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        speed, memory, request = self.speed, self.memory, self.subject.request
        return {
            "schema_version": SCHEMA_VERSION,
            "hardware": self.subject.serving.hardware,
            "model": request.model.name,
            "engine": self.subject.engine,
            "weights": request.weight_format.name,
            "kv_cache_dtype": request.kv_cache_dtype,
            "speed": None if speed is None else speed.document(),
            "memory": None if memory is None else _memory_document(memory),
            "left_out": [{"where": each.where, "reason": each.reason} for each in self.left_out],
            "notes": list(self.notes),
            "toml": self.toml(),
        }


def calibrate(
    serving: ServingConfig, paths: Sequence[Path], given: Sequence[MeasuredRate] = (), *, date: str, name: str = "my-machine.toml"
) -> CalibrationStudy:
    """Return what measurements say of a machine.

    Args:
        serving: The machine, the model, the engine and the settings that ran.
        paths: Files of measurements, in any of the formats of `pagedkv.sims.measurements`.
        given: Rates that no file has.
        date: Written beside every figure, such as 2026-11-29.
        name: What the new hardware file will be called.

    Raises:
        ConfigError: If there is nothing to calibrate with, or what there is cannot be; with what is needed.
    """
    files = [read_measurements(path) for path in paths]
    if not files and not given:
        raise ConfigError(
            "nothing to calibrate with: name files with measurements, or give --tokens-per-s, --prefill-tokens-per-s or --measure"
        )
    check_devices(files, serving.hardware)
    subject = subject_of(serving, files)
    hardware = load_hardware(serving.hardware)
    logs = [file.start_up for file in files if file.start_up is not None]
    if len(logs) > 1:
        raise ConfigError(
            f"{logs[0].where} and {logs[1].where} are both start-up logs: give one, of the settings that you serve with"
        )
    memory = memory_of(subject, logs[0], date=date) if logs else None
    if memory is not None:
        hardware = memory.hardware
    figures, left_out = figures_of(subject, files, given)
    speed = None
    if figures:
        sources = [*(path.name for path, file in zip(paths, files, strict=True) if file.rates or file.rows)]
        sources += ["a rate given by hand"] if given else []
        speed = speed_of(subject, figures, date=date, sources=sources, name=name)
        hardware = replace(hardware, step_constants=(*_others(hardware, speed.group), speed.group))
    elif memory is None:
        raise ConfigError(
            f"no rate to fit: {left_out[0].where}: {left_out[0].reason}" if left_out else f"{paths[0]}: no measurements in it"
        )
    like = hardware.like or ("" if serving.hardware.endswith(".toml") else hardware.name)
    return CalibrationStudy(
        subject=subject,
        hardware=replace(hardware, name=name),
        like=like,
        speed=speed,
        memory=memory,
        left_out=tuple(left_out),
        notes=(*subject.notes, *(note for file in files for note in file.notes)),
    )


def _others(hardware: HardwareSpec, group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups that a file carries already, but for one of the same engine and weights, which the new one replaces."""
    return [
        each
        for each in hardware.step_constants
        if each["engine"] != group["engine"] or each["weights"].keys() != group["weights"].keys()
    ]


def _memory_document(memory: MemoryFound) -> dict[str, Any]:
    figures = {name: getattr(memory.hardware, name) for name in memory.changed}
    return {
        "where": memory.where,
        "found": {f"{name}_bytes": figure.value for name, figure in figures.items()},
        "logged_blocks": memory.logged_blocks,
        "exact": memory.exact,
        "blocks_before": memory.blocks_before,
        "blocks_after": memory.blocks_after,
        "non_kv_bytes": memory.non_kv_bytes,
        "notes": list(memory.notes),
    }
