"""Free blocks in the order in which they are given up: by retention priority, within one priority first released, first out.

Time is what the owner says it is: it moves with `PriorityQueue.advance`, in whatever unit durations are given.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array, Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import lean_jit
from pagedkv.retention import DEFAULT_PRIORITY, FOR_GOOD, Retention

NOBODY = -1
NOT_QUEUED = NOT_READY = -1
NUM_QUEUED, NUM_READY, NUM_RELEASES = range(3)
"""In `QueueArrays.counts`: items that are here; those of them that are ready; releases since the start."""

QUEUED = np.dtype([("order", "<i8"), ("priority", "<i8"), ("duration", "<f8"), ("expires", "<f8"), ("place", "<i8")])
"""An item:

* order: which release it was, counted over all, or NOT_QUEUED;
* priority, and for how long it has it: see `Retention`; expires: when that ends;
* place: in the heap, or NOT_READY.
"""


class QueueArrays(NamedTuple):
    """Items 0 to capacity - 1 that nobody uses. Those that are ready can be had."""

    items: npt.NDArray[np.void]
    """`QUEUED`, by item."""
    heap: Int32Array
    """The first counts[NUM_READY]: those that may be given up, leaves, a binary heap by priority and release."""
    counts: Int64Array
    """NUM_QUEUED and so on."""
    now: Float64Array
    """Length 1: the time."""

    @classmethod
    def empty(cls, capacity: int) -> "QueueArrays":
        """Return one with room for so many items."""
        items = np.zeros(capacity, QUEUED)
        items["order"], items["place"] = NOT_QUEUED, NOT_READY
        return cls(items, np.zeros(capacity, np.int32), np.zeros(3, np.int64), np.zeros(1))


@lean_jit
def is_queued(queue: QueueArrays, item: int) -> bool:
    """Return whether `item` is here."""
    return bool(queue.items["order"][item] != NOT_QUEUED)


@lean_jit
def _goes_before(queue: QueueArrays, one: int, other: int) -> bool:
    priority, other_priority = queue.items["priority"][one], queue.items["priority"][other]
    return bool(
        priority < other_priority or (priority == other_priority and queue.items["order"][one] < queue.items["order"][other])
    )


@lean_jit
def _settle(queue: QueueArrays, place: int, item: int) -> None:
    """Put `item` into the empty `place` of the heap, or to where it belongs above or below it. O(log items)."""
    heap, items, size = queue.heap, queue.items, queue.counts[NUM_READY]
    while True:  # down
        child = 2 * place + 1
        if child + 1 < size and _goes_before(queue, heap[child + 1], heap[child]):
            child += 1
        if child >= size or not _goes_before(queue, heap[child], item):
            break
        heap[place] = heap[child]
        items["place"][heap[place]] = place
        place = child
    while place > 0:
        above = (place - 1) // 2
        if not _goes_before(queue, item, heap[above]):
            break
        heap[place] = heap[above]
        items["place"][heap[place]] = place
        place = above
    heap[place] = item
    items["place"][item] = place


@lean_jit
def set_ready(queue: QueueArrays, item: int, ready: bool) -> None:  # noqa: FBT001
    """Say whether an item that is here may be given up. It keeps the place in the order that its release gave it. O(log items)."""
    place, number = queue.items["place"][item], queue.counts[NUM_READY]
    if ready == (place != NOT_READY):
        return
    if ready:
        queue.counts[NUM_READY] = number + 1
        _settle(queue, number, item)
        return
    queue.items["place"][item], queue.counts[NUM_READY] = NOT_READY, number - 1
    if place < number - 1:
        _settle(queue, place, queue.heap[number - 1])


@lean_jit
def enqueue(queue: QueueArrays, item: int, priority: int, duration: float, ready: bool) -> None:  # noqa: FBT001
    """Append an item that was just released. Its duration begins now. O(log items)."""
    items, counts = queue.items, queue.counts
    items["order"][item], items["priority"][item] = counts[NUM_RELEASES], priority
    items["duration"][item], items["expires"][item] = duration, queue.now[0] + duration
    counts[NUM_RELEASES] += 1
    counts[NUM_QUEUED] += 1
    set_ready(queue, item, ready)


@lean_jit
def dequeue(queue: QueueArrays, item: int) -> None:
    """Take out an item that is here; its priority and duration stay readable: the default if it has expired. O(log items)."""
    set_ready(queue, item, False)  # noqa: FBT003
    queue.items["order"][item] = NOT_QUEUED
    queue.counts[NUM_QUEUED] -= 1


@lean_jit
def lowest_item(queue: QueueArrays) -> int:
    """Return the item to give up next, NOBODY if none is ready."""
    return int(queue.heap[0]) if queue.counts[NUM_READY] > 0 else NOBODY


class PriorityQueue:
    """Items 0 to capacity - 1 that nobody uses: `QueueArrays` for one call at a time.

    Items that are not ready (blocks with others behind them) keep the place in the order that their release gave them.

    Example:
        >>> queue = PriorityQueue(capacity=2)
        >>> queue.add(0, Retention(), ready=True)
        >>> queue.add(1, Retention(priority=20, duration=5), ready=True)
        >>> queue.lowest()
        1
        >>> queue.advance(5)
        >>> queue.lowest()
        0
    """

    def __init__(self, *, capacity: int) -> None:
        self.arrays = QueueArrays.empty(capacity)

    @property
    def now(self) -> float:
        """The time that `advance` told last."""
        return float(self.arrays.now[0])

    def __len__(self) -> int:
        return int(self.arrays.counts[NUM_QUEUED])

    def __contains__(self, item: int) -> bool:
        return bool(self.arrays.items["order"][item] != NOT_QUEUED)

    def __iter__(self) -> Iterator[int]:
        """Yield the items in the order of their releases. O(capacity log capacity)."""
        order = self.arrays.items["order"]
        return iter(np.argsort(order, kind="stable")[order.size - len(self) :].tolist())

    def add(self, item: int, retention: Retention, *, ready: bool) -> None:
        """Append an item that was just released. Its duration begins now."""
        enqueue(self.arrays, item, retention.priority, retention.duration_or_for_good, ready)

    def remove(self, item: int) -> Retention:
        """Take out an item that is here and return its retention: the default if that has expired."""
        dequeue(self.arrays, item)
        priority, duration = self.arrays.items[["priority", "duration"]][item].item()
        return Retention(priority, None if duration == FOR_GOOD else duration)

    def set_ready(self, item: int, *, ready: bool) -> None:
        """Say whether an item that is here may be given up."""
        set_ready(self.arrays, item, ready)

    def lowest(self) -> int | None:
        """Return the item to give up next, None if none is ready."""
        item = lowest_item(self.arrays)
        return None if item == NOBODY else item

    def advance(self, now: float) -> None:
        """Let it be `now`: what has expired goes to the end of the default priority. O(capacity + expired * log items)."""
        self.arrays.now[0] = now
        items = self.arrays.items
        expired = np.flatnonzero((items["order"] != NOT_QUEUED) & (items["expires"] <= now))
        for item in expired[np.lexsort((items["order"][expired], items["expires"][expired]))].tolist():
            ready = self.is_ready(item)
            dequeue(self.arrays, item)
            enqueue(self.arrays, item, DEFAULT_PRIORITY, FOR_GOOD, ready)

    def is_ready(self, item: int) -> bool:
        """Return whether `item`, which is here, may be given up."""
        return bool(self.arrays.items["place"][item] != NOT_READY)

    def ready(self) -> list[int]:
        """Return the items that may be given up, in no order."""
        items: list[int] = self.arrays.heap[: self.arrays.counts[NUM_READY]].tolist()
        return items

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all that is ready is here, and will come up in its turn. O(capacity)."""
        items, heap = self.arrays.items, self.arrays.heap[: self.arrays.counts[NUM_READY]]
        queued, ready = items["order"] != NOT_QUEUED, items["place"] != NOT_READY
        ranks = list(zip(items["priority"][heap].tolist(), items["order"][heap].tolist(), strict=True))
        if (
            np.count_nonzero(queued) != len(self)
            or (ready & ~queued).any()
            or np.count_nonzero(ready) != heap.size
            or (items["place"][heap] != np.arange(heap.size)).any()
            or any(ranks[i] < ranks[(i - 1) // 2] for i in range(1, len(ranks)))
        ):
            raise IntegrityError(f"{len(self)} items are said to be here, or one has another rank than its own: {self.arrays}")
