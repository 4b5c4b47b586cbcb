"""A heap of intervals that grow: in place if there is room behind, else by moving, at worst everything."""

from typing import NamedTuple

import numpy as np

from pagedkv.allocation import NO_COPIES
from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.heap_arrays import NO_ADDRESS
from pagedkv.jit import lean_jit

USED, FREE_SLOTS, NUM_MOVES, MOVED_SLOTS = range(4)
"""In `GrowingArrays.counts`: intervals; slots in none; moves of the last growth; slots moved since the start."""


class GrowingArrays(NamedTuple):
    """Intervals, each known by its place in `start` and `size`."""

    num_slots: int
    start: Int64Array
    """By place: its first slot."""
    size: Int64Array
    """By place: its slots, 0 if there is no interval."""
    order: Int64Array
    """Places of the intervals by address: counts[USED] of them."""
    moves: Int64Array
    """What the last growth has moved, one after the other [counts[NUM_MOVES], 3]: first slot before, after, slots."""
    counts: Int64Array


@lean_jit
def _at_or_behind(heap: GrowingArrays, address: int) -> int:
    """Return where in the order the first interval at or behind `address` is. O(log intervals)."""
    first, last = 0, heap.counts[USED]
    while first < last:
        middle = (first + last) // 2
        if heap.start[heap.order[middle]] < address:
            first = middle + 1
        else:
            last = middle
    return int(first)


@lean_jit
def _insert(heap: GrowingArrays, at: int, place: int) -> None:
    for i in range(heap.counts[USED], at, -1):
        heap.order[i] = heap.order[i - 1]
    heap.order[at] = place
    heap.counts[USED] += 1


@lean_jit
def _remove(heap: GrowingArrays, at: int) -> None:
    heap.counts[USED] -= 1
    for i in range(at, heap.counts[USED]):
        heap.order[i] = heap.order[i + 1]


@lean_jit
def _first_fit(heap: GrowingArrays, size: int) -> int:
    """Return the lowest address with `size` free slots, or NO_ADDRESS. O(intervals)."""
    end = 0
    for i in range(heap.counts[USED]):
        place = heap.order[i]
        if heap.start[place] - end >= size:
            return end
        end = heap.start[place] + heap.size[place]
    return end if heap.num_slots - end >= size else NO_ADDRESS


@lean_jit
def _move(heap: GrowingArrays, place: int, start: int) -> None:
    if heap.start[place] != start and heap.size[place] > 0:
        move = heap.moves[heap.counts[NUM_MOVES]]
        move[0], move[1], move[2] = heap.start[place], start, heap.size[place]
        heap.counts[NUM_MOVES] += 1
        heap.counts[MOVED_SLOTS] += heap.size[place]
    heap.start[place] = start


@lean_jit
def _compact(heap: GrowingArrays, at: int) -> None:
    """Slide the intervals up to the one at `at` in the order down, the lowest first, then the others up, the highest first.

    Whoever slides down writes below what has not been copied yet, and whoever slides up above it: nothing is lost.
    """
    bottom, top = 0, heap.num_slots
    for i in range(at + 1):
        place = heap.order[i]
        _move(heap, place, bottom)
        bottom += heap.size[place]
    for i in range(heap.counts[USED] - 1, at, -1):
        place = heap.order[i]
        top -= heap.size[place]
        _move(heap, place, top)


@lean_jit
def grow_interval(heap: GrowingArrays, place: int, size: int) -> bool:
    """Make the interval of `place`, new if it has none, `size` slots long; False if too few are free: nothing has changed then.

    See `GrowingHeap.grow`. O(intervals), and O(log intervals) in place.
    """
    more = size - heap.size[place]
    if more > heap.counts[FREE_SLOTS]:
        return False
    heap.counts[NUM_MOVES] = 0
    if heap.size[place] == 0:
        heap.start[place] = heap.num_slots
        _insert(heap, heap.counts[USED], place)
    at = _at_or_behind(heap, heap.start[place])
    room_ends = heap.start[heap.order[at + 1]] if at + 1 < heap.counts[USED] else heap.num_slots
    if heap.start[place] + size > room_ends:
        _remove(heap, at)
        address = _first_fit(heap, size)
        if address == NO_ADDRESS:
            _insert(heap, at, place)
            _compact(heap, at)
        else:
            _insert(heap, _at_or_behind(heap, address), place)
            _move(heap, place, address)
    heap.size[place] = size
    heap.counts[FREE_SLOTS] -= more
    return True


@lean_jit
def release_interval(heap: GrowingArrays, place: int) -> None:
    """Give back the interval of `place`, which has one. O(intervals)."""
    _remove(heap, _at_or_behind(heap, heap.start[place]))
    heap.counts[FREE_SLOTS] += heap.size[place]
    heap.size[place] = 0


class GrowingHeap:
    """`num_slots` slots, and intervals among them, up to `num_places`, each known by its place.

    As long as enough slots are free, wherever they are, an interval can have them.

    Example:
        >>> heap = GrowingHeap(10, num_places=2)
        >>> heap.grow(0, 3).tolist(), heap.grow(1, 3).tolist()
        ([], [])
        >>> heap.grow(0, 4).tolist()  # behind the second there is room
        [[2, 8], [1, 7], [0, 6]]
        >>> heap.grow(0, 5).tolist()  # no room for 5, but with the 3 slots below the second there is: all move
        [[3, 0], [4, 1], [5, 2], [6, 3], [7, 4], [8, 5], [9, 6]]
        >>> heap.grow(0, 8) is None
        True
    """

    def __init__(self, num_slots: int, *, num_places: int) -> None:
        if num_slots < 1:
            raise ConfigError(f"a heap of {num_slots} slots: needs 1 or more")
        start, size, order = np.zeros((3, num_places), np.int64)
        self.arrays = GrowingArrays(
            int(num_slots), start, size, order, np.zeros((num_places, 3), np.int64), np.array([0, num_slots, 0, 0])
        )

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return self.arrays.num_slots

    @property
    def free_slots(self) -> int:
        """Slots in no interval."""
        return int(self.arrays.counts[FREE_SLOTS])

    @property
    def moved_slots(self) -> int:
        """Slots copied so far, to count as bytes read and written."""
        return int(self.arrays.counts[MOVED_SLOTS])

    def interval(self, place: int) -> tuple[int, int]:
        """Return the first slot and the slots of the interval of `place`; 0 slots if it has none."""
        return int(self.arrays.start[place]), int(self.arrays.size[place])

    def intervals(self) -> list[tuple[int, int]]:
        """Return first slot and slots of all intervals, by address. O(intervals)."""
        return [self.interval(place) for place in self.arrays.order[: self.arrays.counts[USED]].tolist()]

    def grow(self, place: int, size: int) -> Int64Array | None:
        """Make the interval of `place` `size` slots long; None if too few are free: nothing has changed then.

        A new one is placed in the lowest gap that is large enough. Another stays where it is if the slots behind it are free; else
        it moves to the lowest place that is large enough, its own slots counted as free. If there is none, the intervals up to it
        slide down as far as they can, and those beyond it up: all free slots then lie right behind it, where its next growth finds
        them. O(intervals + slots moved).

        Returns:
            Slots to copy one after the other: int64 [n, 2], source and destination. No slot is overwritten before it is copied.

        Raises:
            ConfigError: If `size` is below 1, or less than it is.
        """
        if size < max(1, self.arrays.size[place]):
            raise ConfigError(f"cannot grow {self.arrays.size[place]} slots to {size}: intervals never shrink, and have 1 or more")
        if not grow_interval(self.arrays, place, size):
            return None
        moves = self.arrays.moves[: self.arrays.counts[NUM_MOVES]].tolist()
        return np.concatenate([_copies(*move) for move in moves]) if moves else NO_COPIES

    def release(self, place: int) -> None:
        """Give back the interval of `place`. O(intervals).

        Raises:
            ConfigError: If it has none.
        """
        if not self.arrays.size[place]:
            raise ConfigError(f"place {place} has no interval of this heap: it was released, or never grew")
        release_interval(self.arrays, place)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless intervals are in order, apart and within the heap, and free slots are counted right."""
        intervals, places = self.intervals(), self.arrays.order[: self.arrays.counts[USED]]
        state = f"{intervals} of {self.num_slots} slots, {self.free_slots} free, sizes by place {self.arrays.size.tolist()}"
        end = 0
        for start, size in intervals:
            if start < end or size < 1:
                raise IntegrityError(f"intervals overlap, are out of order or empty: {state}")
            end = start + size
        if end > self.num_slots or self.free_slots != self.num_slots - self.arrays.size.sum():
            raise IntegrityError(f"intervals go beyond the heap, or free slots are miscounted: {state}")
        if not np.array_equal(np.sort(places), np.flatnonzero(self.arrays.size)):
            raise IntegrityError(f"the order has {places.tolist()}: {state}")


def _copies(source: int, destination: int, size: int) -> Int64Array:
    """Return the copies of one move, from the end that is safe if both places overlap."""
    slots = np.arange(source, source + size)
    copies: Int64Array = np.stack((slots, slots + (destination - source)), axis=1)
    return copies[::-1] if destination > source else copies
