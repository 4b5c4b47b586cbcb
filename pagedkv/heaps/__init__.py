"""Heaps: how a contiguous reservation finds its place among `num_slots` slots. One file each."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from pagedkv.registry import Registry


class Heap(Protocol):
    """Places intervals of slots. A shortage is None, and then nothing has changed."""

    num_slots: int
    """Slots in all."""
    arrays: Any
    """Its state, of a kind that `pagedkv.heap_arrays` knows: `make_room` may replace it."""

    def make_room(self, num_reservations: int) -> None:
        """Let so many reservations at once need no larger arrays."""

    def reserve(self, size: int) -> int | None:
        """Return the first slot of a free interval of `size` slots, now taken; None if there is none."""

    def release(self, address: int) -> None:
        """Give back the interval that starts at `address`.

        Raises:
            ConfigError: If no reservation starts there.
        """

    def rounded(self, size: int) -> int:
        """Return the slots that a reservation of `size` really takes."""

    @property
    def free_slots(self) -> int:
        """Slots in free extents."""

    @property
    def largest_reservation(self) -> int:
        """The largest `size` that an empty heap can place."""

    def reserved(self) -> dict[int, int]:
        """Return the slots taken at each address that a reservation starts at."""

    def check_integrity(self) -> None:
        """Raise IntegrityError, with the state dumped, if free and taken extents do not tile the heap."""


HeapFactory: TypeAlias = Callable[[int], Heap]

HEAPS: Registry[HeapFactory] = Registry(__name__, kind="heap")
