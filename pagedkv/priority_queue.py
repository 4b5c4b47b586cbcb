"""Free blocks in the order in which they are given up: by retention priority, within one priority first released, first out.

Time is what the owner says it is: it moves with `advance_queue`, in whatever unit durations are given.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.indexed_heap import NOWHERE, Heap, push_item, take_out
from pagedkv.jit import lean_jit
from pagedkv.retention import DEFAULT_PRIORITY, FOR_GOOD, Retention

NOBODY = -1
NOT_QUEUED = -1
NUM_QUEUED, NUM_RELEASES = 0, 1
"""In `QueueArrays.counts`: items that are here; releases since the start."""

QUEUED = np.dtype([("order", "<i8"), ("priority", "<i8"), ("duration", "<f8")])
"""An item: which release it was, counted over all, or NOT_QUEUED; its priority, and for how long it has it: see `Retention`."""


class QueueArrays(NamedTuple):
    """Items 0 to capacity - 1 that nobody uses. Those that are ready can be had."""

    items: npt.NDArray[np.void]
    """`QUEUED`, by item."""
    ready: Heap
    """Those that may be given up, leaves, by priority and release."""
    expiring: Heap
    """Those whose priority ends, by when it does and release."""
    counts: Int64Array
    """NUM_QUEUED and NUM_RELEASES."""
    now: Float64Array
    """Length 1: the time."""

    @classmethod
    def empty(cls, capacity: int) -> "QueueArrays":
        """Return one with room for so many items."""
        items = np.zeros(capacity, QUEUED)
        items["order"] = NOT_QUEUED
        return cls(items, Heap.empty(capacity), Heap.empty(capacity), np.zeros(2, np.int64), np.zeros(1))


@lean_jit
def is_queued(queue: QueueArrays, item: int) -> bool:
    """Return whether `item` is here."""
    return bool(queue.items["order"][item] != NOT_QUEUED)


@lean_jit
def set_ready(queue: QueueArrays, item: int, ready: bool) -> None:  # noqa: FBT001
    """Say whether an item that is here may be given up. It keeps the place in the order that its release gave it. O(log items)."""
    if not ready:
        take_out(queue.ready, item)
    elif queue.ready.places[item] == NOWHERE:
        push_item(queue.ready, item, float(queue.items["priority"][item]), queue.items["order"][item])


@lean_jit
def enqueue(queue: QueueArrays, item: int, priority: int, duration: float, ready: bool) -> None:  # noqa: FBT001
    """Append an item that was just released. Its duration begins now. O(log items)."""
    order = queue.counts[NUM_RELEASES]
    queue.counts[NUM_RELEASES] += 1
    queue.counts[NUM_QUEUED] += 1
    queue.items["order"][item], queue.items["priority"][item], queue.items["duration"][item] = order, priority, duration
    set_ready(queue, item, ready)
    if duration < FOR_GOOD:
        push_item(queue.expiring, item, queue.now[0] + duration, order)


@lean_jit
def dequeue(queue: QueueArrays, item: int) -> None:
    """Take out an item that is here; its priority and duration stay readable: the default if it has expired. O(log items)."""
    queue.items["order"][item] = NOT_QUEUED
    queue.counts[NUM_QUEUED] -= 1
    take_out(queue.ready, item)
    take_out(queue.expiring, item)


@lean_jit
def lowest_item(queue: QueueArrays) -> int:
    """Return the item to give up next, NOBODY if none is ready."""
    return int(queue.ready.items[0]) if queue.ready.size[0] > 0 else NOBODY


@lean_jit
def advance_queue(queue: QueueArrays, now: float) -> None:
    """Let it be `now`: what has expired goes to the end of the default priority. O(expired * log items)."""
    queue.now[0] = now
    while queue.expiring.size[0] > 0 and queue.expiring.keys[queue.expiring.items[0]] <= now:
        item = queue.expiring.items[0]
        ready = queue.ready.places[item] != NOWHERE
        dequeue(queue, item)
        enqueue(queue, item, DEFAULT_PRIORITY, FOR_GOOD, ready)


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
        """Let it be `now`: what has expired goes to the end of the default priority. O(expired * log items)."""
        advance_queue(self.arrays, float(now))

    def is_ready(self, item: int) -> bool:
        """Return whether `item`, which is here, may be given up."""
        return bool(self.arrays.ready.places[item] != NOWHERE)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all that is ready, or expires, is here, and will come up in its turn. O(capacity)."""
        queue, queued = self.arrays, self.arrays.items["order"] != NOT_QUEUED
        ready, expiring = (heap.places != NOWHERE for heap in (queue.ready, queue.expiring))
        for heap in (queue.ready, queue.expiring):
            heap.check_integrity()
        if (
            np.count_nonzero(queued) != len(self)
            or (ready & ~queued).any()
            or (expiring != (queued & (queue.items["duration"] < FOR_GOOD))).any()
            or (queue.ready.keys != queue.items["priority"])[ready].any()
            or (queue.ready.ties != queue.items["order"])[ready].any()
            or (queue.expiring.ties != queue.items["order"])[expiring].any()
        ):
            raise IntegrityError(f"{len(self)} items are said to be here, or one has another rank than its own: {queue}")
