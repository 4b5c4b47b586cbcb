"""A hardware file from what this machine was measured to reach: `simulate calibrate --measure`. Who measures is handed in."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pagedkv.catalogue import hardware_names, load_hardware
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import Figure, HardwareSpec
from pagedkv.hardware_text import hardware_lines
from pagedkv.hardware_toml import MODEL_MACHINES, hardware_from_table
from pagedkv.row_rates import RowRates
from pagedkv.units import GIB, gib

SAME_MEMORY = 0.05
"""How far a device's memory may be from a catalogue machine's for it to be that one."""
QUIET = 0.25
"""How far apart samples of one rate lie at most on a machine that does nothing else, as a share of their median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachedRate:
    """One rate: the median of several samples, and how far they lie apart."""

    what: str
    """What was measured, in words."""
    value: float
    """Bytes or operations a second."""
    low: float
    high: float
    num_samples: int

    @property
    def spread(self) -> float:
        """From the least to the most, as a share of the median."""
        return (self.high - self.low) / self.value

    def figure(self, where: str) -> Figure:
        """Return it with its provenance."""
        around = f"{self.low / self.value:.0%} to {self.high / self.value:.0%} of it"
        return Figure(self.value, "measured", f"{self.what}, {where}: median of {self.num_samples}, {around}")

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"what": self.what, "value": self.value, "low": self.low, "high": self.high, "num_samples": self.num_samples}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachedByRows:
    """Products of a few rows with a layer's weights."""

    weights: str
    """Their type: fp32, bf16 or fp16."""
    rows: tuple[int, ...]
    """Numbers of rows, ascending from 1."""
    rates: tuple[ReachedRate, ...]
    """What each reached, in operations a second."""

    @property
    def spread(self) -> float:
        """How far samples of one number of rows lie apart, as a share of their median: the median of all numbers."""
        return statistics.median(rate.spread for rate in self.rates)

    def table(self, where: str) -> RowRates:
        """Return it as the machine's file has it: four digits, more are not known."""
        source = f"{self.rates[0].what}, {where}: medians of {self.rates[0].num_samples}, as a rule {self.spread:.0%} apart"
        flops = tuple(float(f"{rate.value:.4g}") for rate in self.rates)
        return RowRates(rows=self.rows, flops=flops, tag="measured", source=source)

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"weights": self.weights, "rows": list(self.rows), "rates": [rate.document() for rate in self.rates]}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevice:
    """What a processor or a GPU reached."""

    name: str
    """As the system calls it."""
    kind: Literal["cpu", "cuda"]
    memory_bytes: int | None
    """Its memory; None: nobody says."""
    available_bytes: int | None
    """What is available of it now; None: nobody says."""
    read: ReachedRate
    copy: ReachedRate
    kv_read: ReachedRate
    product: ReachedRate
    others: tuple[ReachedRate, ...] = ()
    """Slower ways, for comparison."""
    by_rows: ReachedByRows | None = None
    """What products of a few rows reach; None: it was not measured."""

    @property
    def rates(self) -> tuple[ReachedRate, ...]:
        """All of them."""
        return (self.read, self.copy, self.kv_read, self.product, *self.others)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMachine:
    """What came of measuring."""

    devices: tuple[MeasuredDevice, ...]
    """All that were measured; the file is about the first."""
    hardware: HardwareSpec
    like: HardwareSpec | None
    """The catalogue's machine that it is, if it is one."""
    notes: tuple[str, ...]

    def toml(self) -> str:
        """Return the hardware file."""
        head = "# Written by simulate calibrate --measure."
        return "\n".join([head, "", *hardware_lines(self.hardware, like=self.like)]) + "\n"

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "schema_version": 1,
            "devices": [
                {
                    "name": device.name,
                    "kind": device.kind,
                    "memory_bytes": device.memory_bytes,
                    "available_bytes": device.available_bytes,
                    "rates": [rate.document() for rate in device.rates],
                    "by_rows": None if device.by_rows is None else device.by_rows.document(),
                }
                for device in self.devices
            ],
            "like": None if self.like is None else self.like.name,
            "notes": list(self.notes),
            "toml": self.toml(),
        }


def measured_machine(devices: Sequence[MeasuredDevice], *, date: str, name: str, notes: Sequence[str] = ()) -> MeasuredMachine:
    """Return the machine whose first device serves.

    Args:
        devices: What was measured, at least one device.
        date: Written beside every figure.
        name: What its file will be called.
        notes: What else a reader should know.

    Raises:
        ConfigError: If nobody says how much memory it has.
    """
    device, told = devices[0], list(notes)
    like = known_machine(device)
    where = f"{device.name}, {date}"
    if like is None:
        hardware = _unknown(device, where, name)
        if device.kind == "cpu":
            told.append(
                "sizes and times that were not measured are as on dgx-spark: correct them in the file where you know better"
            )
        else:
            told.append(f"no machine of the catalogue is {device.name}: add the datasheet's figures to the file")
    else:
        hardware = replace(
            like,
            name=name,
            read_bandwidth=device.read.figure(where),
            kv_read_bandwidth=device.kv_read.figure(where),
            reached_flops={**like.reached_flops, "bf16": device.product.figure(where)},
        )
        told.append(
            f"step times that were fitted on {like.name} come before these figures, for the engines and weights that have them"
        )
    widest = max(rate.spread for rate in device.rates)
    if device.by_rows is not None:
        hardware = replace(hardware, linear_by_rows={device.by_rows.weights: device.by_rows.table(where)})
        widest = max(widest, device.by_rows.spread)
    if widest > QUIET:
        told.append(f"samples lie up to {widest:.0%} apart: something else was running; measure again when the machine is quiet")
    return MeasuredMachine(devices=tuple(devices), hardware=hardware, like=like, notes=tuple(told))


def known_machine(device: MeasuredDevice) -> HardwareSpec | None:
    """Return the catalogue's machine with a GPU of that name and about as much memory; None if there is none."""
    words = {word for word in device.name.lower().replace("-", " ").split() if any(map(str.isdigit, word))}
    for name in hardware_names() if device.kind == "cuda" else ():
        machine = load_hardware(name)
        title = machine.title.lower().replace("(", " ").replace(")", " ").replace("-", " ").split()
        near = device.memory_bytes is not None and abs(device.memory_bytes / machine.visible_bytes - 1) <= SAME_MEMORY
        if near and words & set(title):
            return machine
    return None


def _unknown(device: MeasuredDevice, where: str, name: str) -> HardwareSpec:
    """Return a machine of which only what was measured is known: its limits are the best that was seen."""
    if device.memory_bytes is None:
        raise ConfigError(
            f"nobody says how much memory {device.name} has: write a hardware file yourself, as docs/hardware.md shows"
        )
    kind = "unified" if device.kind == "cpu" else "discrete"
    most = device.product.high
    best = max(device.read.high, device.copy.high, device.kv_read.high)
    given: dict[str, Any] = {
        "title": device.name,
        "memory_kind": kind,
        "visible": _row(f"{device.memory_bytes} B", where),
        "memory_bandwidth": _row(f"{best / 1e9:.4g} GB/s", f"{where}: the most of any sample; the datasheet's is not known"),
        "spec_flops": {"bf16": _row(f"{most / 1e12:.4g} TFLOPS", f"{where}: the most of {device.product.what}; no datasheet's")},
    }
    if kind == "unified" and device.available_bytes is not None:
        used = device.memory_bytes - device.available_bytes
        given["os_reserve"] = _row(f"{used} B", f"{where}: {gib(used)} were in use")
        given["memory_floor"] = _row(
            f"{min(8 * GIB, device.memory_bytes // 10)} B", "a tenth of the memory, 8 GiB at most", tag="estimated"
        )
    machine = hardware_from_table(name, given, model_machine=load_hardware(MODEL_MACHINES[kind]))
    return replace(
        machine,
        read_bandwidth=device.read.figure(where),
        kv_read_bandwidth=device.kv_read.figure(where),
        reached_flops={"bf16": device.product.figure(where)},
    )


def _row(value: str, source: str, *, tag: str = "measured") -> dict[str, str]:
    return {"value": value, "tag": tag, "source": source}
