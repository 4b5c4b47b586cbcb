"""What a processor or a GPU was measured to reach: samples of each rate."""

import statistics
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One rate, taken several times."""

    values: tuple[float, ...]
    """Bytes or operations a second."""

    @property
    def median(self) -> float:
        """What counts."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The most."""
        return max(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """One device."""

    device: str
    """Its name, as the system gives it."""
    kind: Literal["cpu", "cuda"]
    threads: int | None
    """Threads that took part; None: a GPU."""
    memory_bytes: int | None
    """Its memory; None: nobody says."""
    available_bytes: int | None
    """What of it is available now; None: nobody says."""
    read: Samples
    """Reading memory, in bytes a second."""
    copy: Samples
    """Copying it: bytes read and bytes written, together a second."""
    kv_read: Samples
    """Keys and values that decode attention over a paged cache reads, in bytes a second."""
    product: Samples
    """A matrix product, in operations a second."""
    product_by: str
    """Which one."""
    others: dict[str, Samples] = field(default_factory=dict)
    """Products that were slower, by what they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSamples:
    """Products of some rows with matrices of one type."""

    weights: str
    """The type: fp32, bf16 or fp16."""
    rows: tuple[int, ...]
    """Numbers of rows."""
    flops: tuple[Samples, ...]
    """What each reaches, in operations a second, reading the matrix included."""
    by: str
    """How they were multiplied."""
