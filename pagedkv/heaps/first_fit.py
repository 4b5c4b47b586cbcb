"""First fit with coalescing: the lowest free extent that is large enough, cut to size; neighbours merge when they are free."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.heap_arrays import NO_ADDRESS, num_free_slots, release_slots, reserve_slots, rounded_size
from pagedkv.heaps import HEAPS
from pagedkv.jit import lean_jit


class ExtentArrays(NamedTuple):
    """Free extents, and reservations, each as parallel arrays sorted by address."""

    start: Int64Array
    size: Int64Array
    used: Int64Array
    """Length 1: extents in use."""


class FirstFitArrays(NamedTuple):
    """All of the heap. Each extent in use needs room in the arrays of its kind."""

    free: ExtentArrays
    taken: ExtentArrays


@lean_jit
def _insert(extents: ExtentArrays, at: int, start: int, size: int) -> None:
    used = extents.used[0]
    for i in range(used, at, -1):
        extents.start[i] = extents.start[i - 1]
        extents.size[i] = extents.size[i - 1]
    extents.start[at] = start
    extents.size[at] = size
    extents.used[0] = used + 1


@lean_jit
def _remove(extents: ExtentArrays, at: int) -> None:
    used = extents.used[0]
    for i in range(at, used - 1):
        extents.start[i] = extents.start[i + 1]
        extents.size[i] = extents.size[i + 1]
    extents.used[0] = used - 1


@lean_jit
def _place_of(extents: ExtentArrays, address: int) -> int:
    """Return the index of the first extent at or beyond `address`."""
    return int(np.searchsorted(extents.start[: extents.used[0]], address))


@rounded_size.register(FirstFitArrays)
@lean_jit
def _rounded(heap: FirstFitArrays, size: int) -> int:
    """Return `size`: nothing is rounded."""
    return size


@num_free_slots.register(FirstFitArrays)
@lean_jit
def _num_free(heap: FirstFitArrays) -> int:
    """Add them up. O(extents)."""
    slots = 0
    for i in range(heap.free.used[0]):
        slots += heap.free.size[i]
    return slots


@reserve_slots.register(FirstFitArrays)
@lean_jit
def _reserve(heap: FirstFitArrays, size: int) -> int:
    """Cut `size` slots from the lowest extent that has them. O(extents)."""
    free, taken = heap.free, heap.taken
    for i in range(free.used[0]):
        if free.size[i] >= size:
            address = free.start[i]
            free.start[i] += size
            free.size[i] -= size
            if free.size[i] == 0:
                _remove(free, i)
            _insert(taken, _place_of(taken, address), address, size)
            return int(address)
    return NO_ADDRESS


@release_slots.register(FirstFitArrays)
@lean_jit
def _release(heap: FirstFitArrays, address: int) -> None:
    """Give a reservation back and merge it with free neighbours. O(extents)."""
    free, taken = heap.free, heap.taken
    place = _place_of(taken, address)
    size = taken.size[place]
    _remove(taken, place)
    i = _place_of(free, address)
    joins_left = i > 0 and free.start[i - 1] + free.size[i - 1] == address
    joins_right = i < free.used[0] and address + size == free.start[i]
    if joins_left and joins_right:
        free.size[i - 1] += size + free.size[i]
        _remove(free, i)
    elif joins_left:
        free.size[i - 1] += size
    elif joins_right:
        free.start[i] = address
        free.size[i] += size
    else:
        _insert(free, i, address, size)


@HEAPS.register("first-fit")
class FirstFitHeap:
    """`num_slots` slots; a reservation takes exactly what it asks for.

    Example:
        >>> heap = FirstFitHeap(10)
        >>> heap.reserve(4), heap.reserve(4), heap.reserve(4)
        (0, 4, None)
        >>> heap.release(0); heap.reserve(3)
        0
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ConfigError(f"a heap of {num_slots} slots: needs 1 or more")
        self.num_slots = num_slots
        self.arrays = FirstFitArrays(_extents(capacity=64), _extents(capacity=64))
        _insert(self.arrays.free, 0, 0, num_slots)

    def make_room(self, num_reservations: int) -> None:
        """Let so many reservations at once need no larger arrays."""
        missing = num_reservations + 1 - self.arrays.free.start.size  # between two of them there may be a free extent
        if missing > 0:
            self.arrays = FirstFitArrays(*(_longer(extents, missing) for extents in self.arrays))

    def reserve(self, size: int) -> int | None:
        """Take `size` slots from the lowest extent that has them; None if none has. O(extents)."""
        if size < 1:
            raise ConfigError(f"cannot reserve {size} slots: the number must be 1 or more")
        taken = int(self.arrays.taken.used[0])
        if taken + 1 >= self.arrays.free.start.size:
            self.make_room(2 * taken)
        address = int(_reserve(self.arrays, size))
        return None if address == NO_ADDRESS else address

    def release(self, address: int) -> None:
        """Give back the reservation at `address`. O(extents)."""
        taken = self.arrays.taken
        if address not in taken.start[: taken.used[0]]:
            raise ConfigError(f"cannot release slot {address}: no reservation starts there")
        _release(self.arrays, address)

    def rounded(self, size: int) -> int:
        """Return `size`: nothing is rounded."""
        return int(_rounded(self.arrays, size))

    @property
    def free_slots(self) -> int:
        """Slots in free extents."""
        return int(_num_free(self.arrays))

    @property
    def largest_reservation(self) -> int:
        """The whole heap."""
        return self.num_slots

    def reserved(self) -> dict[int, int]:
        """Return the slots taken at each address that a reservation starts at. O(extents)."""
        taken, used = self.arrays.taken, self.arrays.taken.used[0]
        return dict(zip(taken.start[:used].tolist(), taken.size[:used].tolist(), strict=True))

    def check_integrity(self) -> None:
        """Raise IntegrityError unless free and taken extents tile the heap and no two free ones touch."""
        free, taken = (list(zip(e.start[: e.used[0]].tolist(), e.size[: e.used[0]].tolist(), strict=True)) for e in self.arrays)
        state = f"free {free}, taken {taken}, of {self.num_slots} slots"
        if free != sorted(free) or taken != sorted(taken):
            raise IntegrityError(f"extents are out of order: {state}")
        touching = any(start + size == following for (start, size), (following, _) in zip(free, free[1:], strict=False))
        end = 0
        for address, size in sorted(free + taken):
            if address != end or size < 1:
                raise IntegrityError(f"extent of {size} at {address}, expected at {end}: {state}")
            end = address + size
        if end != self.num_slots or touching:
            raise IntegrityError(f"extents do not tile the heap, or free ones touch: {state}")


def _extents(*, capacity: int) -> ExtentArrays:
    return ExtentArrays(np.zeros(capacity, np.int64), np.zeros(capacity, np.int64), np.zeros(1, np.int64))


def _longer(extents: ExtentArrays, more: int) -> ExtentArrays:
    pad = np.zeros(more, np.int64)
    return ExtentArrays(np.concatenate((extents.start, pad)), np.concatenate((extents.size, pad)), extents.used)
