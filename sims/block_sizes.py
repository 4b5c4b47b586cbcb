"""What a block size costs: kernel times that were measured, against the slots that a simulation leaves unfilled."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import resources
from typing import Any

from pagedkv.hardware_spec import HardwareSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTimes:
    """One kernel on one machine, over the same sequences in blocks of several sizes."""

    machine: str
    """What it ran on."""
    kind: str
    """cpu, or for GPUs the kind of their memory: discrete or unified."""
    date: date
    """When."""
    kernel: str
    """Which kernel, over what."""
    command: str
    """What measures it again."""
    source: str
    """Where the figures are reported."""
    kernel_ms: Mapping[int, float]
    """Milliseconds of a call by block size."""

    @property
    def text(self) -> str:
        """The figures in words."""
        times = ", ".join(f"{size}: {ms:.2f}" for size, ms in self.kernel_ms.items())
        return f"on {self.machine}, {self.date}, it took, in ms, {times} ({self.command})"


@cache
def measured() -> tuple[KernelTimes, ...]:
    """Return what block_sizes.toml has."""
    text = resources.files(__package__ or "pagedkv.sims").joinpath("block_sizes.toml").read_text(encoding="utf-8")
    return tuple(
        KernelTimes(**row | {"kernel_ms": {int(size): float(ms) for size, ms in row["kernel_ms"].items()}})
        for row in tomllib.loads(text)["measured"]
    )


def kernel_words(hardware: HardwareSpec) -> str:
    """Return what is known of the kernel's time by block size on the kind of `hardware`; if nothing, that, and what is nearest."""
    mine = [times.text for times in measured() if times.kind == hardware.memory_kind]
    if mine:
        return "kernel time by block size: " + "; ".join(mine)
    others = "; ".join(times.text for times in measured())
    return f"kernel time by block size was not measured on a GPU with {hardware.memory_kind} memory; {others}"


def unfilled_share(figures: Mapping[str, Any]) -> float | None:
    """Return the share of the slots in taken blocks that hold no token, over a run; None if no block was taken."""
    kv = figures["kv"]
    if kv is None or (taken := kv["tokens"] + kv["reserved"] + kv["internal"]) <= 0:
        return None
    return float((kv["reserved"] + kv["internal"]) / taken)
