"""Free blocks in the order in which they are given up: by retention priority, within one priority first released, first out.

Time is what the owner says it is: it moves with `PriorityQueue.advance`, in whatever unit durations are given.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from pagedkv.errors import IntegrityError
from pagedkv.retention import Retention

_SLACK = 64
"""Outdated entries that a heap may carry besides as many as there are items."""

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True)
class _Entry:
    order: int
    """Which release it was, counted over all."""
    retention: Retention
    ready: bool
    """It may be given up: it is a leaf."""


class PriorityQueue(Generic[T]):
    """Items that nobody uses. Those that are ready can be had, lowest priority first, then the one released longest ago.

    Items that are not ready (blocks with others behind them) keep the place in the order that their release gave them. Calls are
    O(log items) amortised unless they say otherwise.

    Example:
        >>> queue = PriorityQueue[str]()
        >>> queue.add("a", Retention(), ready=True)
        >>> queue.add("b", Retention(priority=20, duration=5), ready=True)
        >>> queue.lowest()
        'b'
        >>> queue.advance(5)
        >>> queue.lowest()
        'a'
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._entries: dict[T, _Entry] = {}
        self._items: dict[int, T] = {}
        """By release: the item, for those that are here."""
        self._heap: list[tuple[int, int]] = []
        """(priority, release) of every ready item, and of outdated ones: found out when they come up."""
        self._expiries: list[tuple[float, int]] = []
        """(time, release) of every item whose priority ends, and of outdated ones."""
        self._num_releases = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def add(self, item: T, retention: Retention, *, ready: bool) -> None:
        """Append an item that was just released. Its duration begins now."""
        order = self._num_releases
        self._num_releases += 1
        self._entries[item], self._items[order] = _Entry(order, retention, ready), item
        if ready:
            self._push(retention.priority, order)
        if retention.duration is not None:
            heappush(self._expiries, (self.now + retention.duration, order))
            if len(self._expiries) > 2 * len(self._entries) + _SLACK:
                self._expiries = [expiry for expiry in self._expiries if expiry[1] in self._items]
                heapify(self._expiries)

    def remove(self, item: T) -> Retention:
        """Take an item out and return its retention: the default if that has expired."""
        entry = self._entries.pop(item)
        del self._items[entry.order]
        return entry.retention

    def set_ready(self, item: T, *, ready: bool) -> None:
        """Say whether an item may be given up."""
        entry = self._entries[item]
        if ready and not entry.ready:
            self._push(entry.retention.priority, entry.order)
        entry.ready = ready

    def lowest(self) -> T | None:
        """Return the item to give up next, None if none is ready."""
        while self._heap:
            item = self._items.get(self._heap[0][1])
            if item is not None and self._entries[item].ready:
                return item
            heappop(self._heap)
        return None

    def advance(self, now: float) -> None:
        """Let it be `now`: what has expired goes to the end of the default priority. O(expired * log items)."""
        self.now = now
        while self._expiries and self._expiries[0][0] <= now:
            item = self._items.get(heappop(self._expiries)[1])
            if item is not None:
                ready = self._entries[item].ready
                self.remove(item)
                self.add(item, Retention(), ready=ready)

    def is_ready(self, item: T) -> bool:
        """Return whether `item`, which is here, may be given up."""
        return self._entries[item].ready

    def check_integrity(self) -> None:
        """Raise IntegrityError unless items and releases fit together and all that is ready will come up. O(items)."""
        listed, expiring = set(self._heap), {order for _, order in self._expiries}
        for item, entry in self._entries.items():
            lost = (entry.ready and (entry.retention.priority, entry.order) not in listed) or (
                entry.retention.duration is not None and entry.order not in expiring
            )
            if self._items.get(entry.order) is not item or lost:
                raise IntegrityError(f"{item!r} is lost from its queue: {entry}, items {self._items}, heap {self._heap}")
        if len(self._items) != len(self._entries):
            raise IntegrityError(f"items {self._items} are not those of {self._entries}")

    def _push(self, priority: int, order: int) -> None:
        heappush(self._heap, (priority, order))
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            entries = self._entries.values()
            self._heap = [(entry.retention.priority, entry.order) for entry in entries if entry.ready or entry.order == order]
            heapify(self._heap)
