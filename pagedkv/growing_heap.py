"""A heap of intervals that grow: in place if there is room behind, else by moving, at worst everything."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from pagedkv.allocation import NO_COPIES
from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError, IntegrityError


@dataclass(slots=True, kw_only=True)
class Interval:
    """`size` adjacent slots from `start` on. The heap changes both."""

    start: int
    """First slot."""
    size: int
    """Slots."""

    @property
    def end(self) -> int:
        """One past the last slot."""
        return self.start + self.size


class GrowingHeap:
    """`num_slots` slots, and intervals among them. As long as enough slots are free, wherever they are, an interval can have them.

    Example:
        >>> heap = GrowingHeap(10)
        >>> first, _ = heap.reserve(3)
        >>> second, _ = heap.reserve(3)
        >>> heap.grow(first, 4).tolist()  # behind the second there is room
        [[2, 8], [1, 7], [0, 6]]
        >>> heap.grow(first, 5).tolist()  # no room for 5, but with the 3 slots below the second there is: all move
        [[3, 0], [4, 1], [5, 2], [6, 3], [7, 4], [8, 5], [9, 6]]
        >>> heap.grow(first, 8) is None
        True
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ConfigError(f"a heap of {num_slots} slots: needs 1 or more")
        self.num_slots = num_slots
        self.free_slots = num_slots
        """Slots in no interval."""
        self.intervals: list[Interval] = []
        """By address."""

    def reserve(self, size: int) -> tuple[Interval, Int64Array] | None:
        """Place a new interval of `size` slots; None if fewer are free. See `grow` for the copies.

        Raises:
            ConfigError: If `size` is below 1.
        """
        if size < 1:
            raise ConfigError(f"cannot reserve {size} slots: the number must be 1 or more")
        interval = Interval(start=self.num_slots, size=0)
        self.intervals.append(interval)
        copies = self.grow(interval, size)
        if copies is None:
            self.intervals.pop()
            return None
        return interval, copies

    def grow(self, interval: Interval, size: int) -> Int64Array | None:
        """Make `interval` `size` slots long; None if too few are free: nothing has changed then. O(intervals + slots moved).

        It stays where it is if the slots behind it are free. Else it moves to the lowest place that is large enough, its own slots
        counted as free. If there is none, the intervals up to it slide down as far as they can, and those beyond it up: all free
        slots then lie right behind it, where its next growth finds them.

        Returns:
            Slots to copy one after the other: int64 [n, 2], source and destination. No slot is overwritten before it is copied.

        Raises:
            ConfigError: If the interval is not of this heap, or would shrink.
        """
        at = self._index(interval)
        more = size - interval.size
        if more < 0:
            raise ConfigError(f"cannot grow {interval.size} slots to {size}: intervals never shrink")
        if more > self.free_slots:
            return None
        copies = NO_COPIES
        if interval.start + size > self._room_ends(at):
            del self.intervals[at]
            place = self._first_fit(size)
            if place is None:
                self.intervals.insert(at, interval)
                copies = self._compact(at)
            else:
                copies = _move(interval, place)
                self.intervals.insert(self._place_of(place), interval)
        interval.size = size
        self.free_slots -= more
        return copies

    def room_behind(self, interval: Interval) -> int:
        """Return how many slots `interval` can grow by where it is. O(log intervals).

        Raises:
            ConfigError: If it is not of this heap.
        """
        return self._room_ends(self._index(interval)) - interval.end

    def release(self, interval: Interval) -> None:
        """Give back `interval`. O(intervals).

        Raises:
            ConfigError: If it is not of this heap.
        """
        del self.intervals[self._index(interval)]
        self.free_slots += interval.size

    def check_integrity(self) -> None:
        """Raise IntegrityError unless intervals are in order, apart and within the heap, and free slots are counted right."""
        state = f"{self.intervals} of {self.num_slots} slots, {self.free_slots} free"
        end = 0
        for interval in self.intervals:
            if interval.start < end or interval.size < 1:
                raise IntegrityError(f"intervals overlap, are out of order or empty: {state}")
            end = interval.end
        if end > self.num_slots or self.free_slots != self.num_slots - sum(interval.size for interval in self.intervals):
            raise IntegrityError(f"intervals go beyond the heap, or free slots are miscounted: {state}")

    def _first_fit(self, size: int) -> int | None:
        """Return the lowest address with `size` free slots."""
        end = 0
        for interval in self.intervals:
            if interval.start - end >= size:
                return end
            end = interval.end
        return end if self.num_slots - end >= size else None

    def _compact(self, at: int) -> Int64Array:
        """Slide the intervals up to index `at` down, the lowest first, then the others up, the highest first.

        Whoever slides down writes below what has not been copied yet, and whoever slides up above it: nothing is lost.
        """
        copies, bottom, top = [], 0, self.num_slots
        for interval in self.intervals[: at + 1]:
            copies.append(_move(interval, bottom))
            bottom = interval.end
        for interval in reversed(self.intervals[at + 1 :]):
            top -= interval.size
            copies.append(_move(interval, top))
        return np.concatenate(copies)

    def _room_ends(self, at: int) -> int:
        return self.intervals[at + 1].start if at + 1 < len(self.intervals) else self.num_slots

    def _place_of(self, start: int) -> int:
        return bisect_left(self.intervals, start, key=lambda interval: interval.start)

    def _index(self, interval: Interval) -> int:
        at = self._place_of(interval.start)
        if at == len(self.intervals) or self.intervals[at] is not interval:
            raise ConfigError(f"no interval of this heap: {interval}; it was released, or is another heap's")
        return at


def _move(interval: Interval, start: int) -> Int64Array:
    """Let `interval` begin at `start`; return the copies, from the end that is safe if both places overlap."""
    if start == interval.start:
        return NO_COPIES
    source = np.arange(interval.start, interval.end)
    copies: Int64Array = np.stack((source, source + (start - interval.start)), axis=1)
    up = start > interval.start
    interval.start = start
    return copies[::-1] if up else copies
