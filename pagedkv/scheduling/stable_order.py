"""Sorting for compiled code that makes no arrays: places in order of up to three keys, equals as they were."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.jit import lean_jit


class SortArrays(NamedTuple):
    """What a sort works on."""

    order: Int64Array
    """Receives the places, the first one first."""
    scratch: Int64Array
    keys: Float64Array
    """[3, capacity]: of each place; the first that differs counts."""

    @classmethod
    def empty(cls, capacity: int) -> "SortArrays":
        """Return room for so many places."""
        return cls(np.zeros(capacity, np.int64), np.zeros(capacity, np.int64), np.zeros((3, capacity)))


@lean_jit
def _goes_before(keys: Float64Array, a: int, b: int) -> bool:
    for k in range(3):
        if keys[k, a] != keys[k, b]:
            return bool(keys[k, a] < keys[k, b])
    return False


@lean_jit
def sort_places(sort: SortArrays, number: int) -> None:
    """Sort places 0 to `number`, exclusive, by their keys. A merge sort: O(n log n), stable."""
    order, scratch, keys = sort.order, sort.scratch, sort.keys
    for i in range(number):
        order[i] = i
    width = 1
    while width < number:
        for first in range(0, number, 2 * width):
            middle, last = min(first + width, number), min(first + 2 * width, number)
            left, right = first, middle
            for i in range(first, last):
                if left < middle and (right == last or not _goes_before(keys, order[right], order[left])):
                    scratch[i] = order[left]
                    left += 1
                else:
                    scratch[i] = order[right]
                    right += 1
        for i in range(number):
            order[i] = scratch[i]
        width *= 2
