"""SGLang's free list of blocks as arrays: taken from the front, given back at the back, or at the front where blocks are larger."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import BoolArray, Int32Array, Int64Array
from pagedkv.jit import lean_jit

HEAD, TAIL = 0, 1
"""In `SlotList.ends`."""


class SlotList(NamedTuple):
    """Which blocks are free."""

    order: Int32Array
    """The list is order[head:tail]. Blocks put in front find the room that taken ones left; those put at the back move on."""
    is_free: BoolArray
    """By block: whether it is in the list, or waits to be sorted in."""
    ends: Int64Array
    """Head and tail."""

    @classmethod
    def full(cls, num_blocks: int) -> "SlotList":
        """Return a list of blocks 1 to `num_blocks`, in this order."""
        order, is_free = np.zeros(2 * num_blocks, np.int32), np.ones(num_blocks + 1, np.bool_)
        order[:num_blocks] = np.arange(1, num_blocks + 1)
        is_free[0] = False
        return cls(order, is_free, np.array([0, num_blocks]))


@lean_jit
def num_listed(slots: SlotList) -> int:
    """Return how many blocks are in the list."""
    return int(slots.ends[TAIL] - slots.ends[HEAD])


@lean_jit
def take_listed(slots: SlotList, out: Int32Array, first: int, last: int) -> None:
    """Take blocks off the front, which has enough, and write them to out[first:last]."""
    head = slots.ends[HEAD]
    for i in range(last - first):
        block = slots.order[head + i]
        out[first + i] = block
        slots.is_free[block] = False
    slots.ends[HEAD] = head + last - first


@lean_jit
def make_place(slots: SlotList, num_blocks: int, at_front: bool) -> int:  # noqa: FBT001
    """Make the list longer by `num_blocks` and return where in `order` they are to be written."""
    ends, order = slots.ends, slots.order
    if at_front:
        ends[HEAD] -= num_blocks
        return int(ends[HEAD])
    if ends[TAIL] + num_blocks > order.size:
        size = ends[TAIL] - ends[HEAD]
        for i in range(size):
            order[i] = order[ends[HEAD] + i]
        ends[HEAD], ends[TAIL] = 0, size
    place = ends[TAIL]
    ends[TAIL] += num_blocks
    return int(place)


@lean_jit
def give_back(slots: SlotList, blocks: Int32Array, first: int, last: int, at_front: bool) -> None:  # noqa: FBT001
    """Put blocks[first:last], which are taken, into the list, in their order."""
    place = make_place(slots, last - first, at_front)
    for i in range(last - first):
        slots.order[place + i] = blocks[first + i]
        slots.is_free[blocks[first + i]] = True
