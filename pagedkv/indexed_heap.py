"""A heap of numbered items out of which any can be taken: compiled functions over its arrays."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import lean_jit

NOWHERE = -1


class Heap(NamedTuple):
    """Items 0 to capacity - 1, those that are in by (key, tie), the lowest first."""

    items: Int32Array
    """The first size[0] are a binary heap."""
    places: Int32Array
    """By item: its place in `items`, NOWHERE if it is not in."""
    keys: Float64Array
    """By item."""
    ties: Int64Array
    """By item: among equal keys, the lowest goes first."""
    size: Int64Array
    """Length 1."""

    @classmethod
    def empty(cls, capacity: int) -> "Heap":
        """Return one with room for so many items."""
        return cls(
            np.zeros(capacity, np.int32),
            np.full(capacity, NOWHERE, np.int32),
            np.zeros(capacity),
            np.zeros(capacity, np.int64),
            np.zeros(1, np.int64),
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless items know their places and none goes before the one above it. O(capacity)."""
        inside = self.items[: self.size[0]]
        above = inside[(np.arange(inside.size) - 1) // 2]
        keys, ties = self.keys[inside], self.ties[inside]
        wrong = (keys < self.keys[above]) | ((keys == self.keys[above]) & (ties < self.ties[above]))
        placed = np.flatnonzero(self.places != NOWHERE)
        if wrong[1:].any() or placed.size != inside.size or (self.places[inside] != np.arange(inside.size)).any():
            raise IntegrityError(f"{inside.tolist()} with keys {keys.tolist()}, ties {ties.tolist()} are no heap, or misplaced")


@lean_jit
def _goes_before(heap: Heap, one: int, other: int) -> bool:
    return bool(heap.keys[one] < heap.keys[other] or (heap.keys[one] == heap.keys[other] and heap.ties[one] < heap.ties[other]))


@lean_jit
def _rise(heap: Heap, place: int, item: int) -> None:
    """Let `item` take `place`, or one above it."""
    while place > 0:
        above = (place - 1) // 2
        if not _goes_before(heap, item, heap.items[above]):
            break
        heap.items[place] = heap.items[above]
        heap.places[heap.items[place]] = place
        place = above
    heap.items[place] = item
    heap.places[item] = place


@lean_jit
def push_item(heap: Heap, item: int, key: float, tie: int) -> None:
    """Put in an item that is not in. O(log items)."""
    heap.keys[item], heap.ties[item] = key, tie
    heap.size[0] += 1
    _rise(heap, heap.size[0] - 1, item)


@lean_jit
def take_out(heap: Heap, item: int) -> None:
    """Take `item` out, if it is in. O(log items)."""
    place = heap.places[item]
    if place == NOWHERE:
        return
    heap.places[item] = NOWHERE
    size = heap.size[0] - 1
    heap.size[0] = size
    last = heap.items[size]
    if place == size:
        return
    while True:  # the last one takes the empty place, or what is below moves up
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _goes_before(heap, heap.items[child + 1], heap.items[child]):
            child += 1
        if not _goes_before(heap, heap.items[child], last):
            break
        heap.items[place] = heap.items[child]
        heap.places[heap.items[place]] = place
        place = child
    _rise(heap, place, last)
