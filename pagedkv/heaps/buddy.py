"""The buddy heap: extents are powers of two, and two halves of one extent merge when both are free.

Source: the PagedAttention paper (Kwon et al., SOSP 2023, section 6.1) places Orca's reservations with a buddy allocator.
"""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int8Array, Int32Array, Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.heap_arrays import NO_ADDRESS, num_free_slots, release_slots, reserve_slots, rounded_size
from pagedkv.heaps import HEAPS
from pagedkv.jit import lean_jit

NONE = -1


class BuddyArrays(NamedTuple):
    """Free extents in one doubly linked list per order; an extent of order k is 2**k slots at a multiple of 2**k."""

    first: Int32Array
    """By order: address of the first free extent, or NONE."""
    next_free: Int32Array
    """By address of a free extent: the next one of its order."""
    prev_free: Int32Array
    """By address of a free extent: the one before, or NONE."""
    free_order: Int8Array
    """By address: order of the free extent that starts there, or NONE."""
    taken_order: Int8Array
    """By address: order of the reservation that starts there, or NONE."""
    free_slots: Int64Array
    """Length 1: slots in free extents."""


@lean_jit
def _link(heap: BuddyArrays, address: int, order: int) -> None:
    head = heap.first[order]
    heap.next_free[address] = head
    heap.prev_free[address] = NONE
    if head != NONE:
        heap.prev_free[head] = address
    heap.first[order] = address
    heap.free_order[address] = order


@lean_jit
def _unlink(heap: BuddyArrays, address: int) -> None:
    before, after = heap.prev_free[address], heap.next_free[address]
    if before == NONE:
        heap.first[heap.free_order[address]] = after
    else:
        heap.next_free[before] = after
    if after != NONE:
        heap.prev_free[after] = before
    heap.free_order[address] = NONE


@lean_jit
def _order_of(size: int) -> int:
    order = 0
    while (1 << order) < size:
        order += 1
    return order


@rounded_size.register(BuddyArrays)
@lean_jit
def _rounded(heap: BuddyArrays, size: int) -> int:
    """Return the next power of two."""
    return 1 << _order_of(size)


@num_free_slots.register(BuddyArrays)
@lean_jit
def _num_free(heap: BuddyArrays) -> int:
    return int(heap.free_slots[0])


@reserve_slots.register(BuddyArrays)
@lean_jit
def _reserve(heap: BuddyArrays, size: int) -> int:
    """Take an extent of the order of `size`, splitting the smallest larger one if none is free. O(log num_slots)."""
    order = _order_of(size)
    found = order
    while found < heap.first.size and heap.first[found] == NONE:
        found += 1
    if found >= heap.first.size:
        return NO_ADDRESS
    address = heap.first[found]
    _unlink(heap, address)
    while found > order:
        found -= 1
        _link(heap, address + (1 << found), found)
    heap.taken_order[address] = order
    heap.free_slots[0] -= 1 << order
    return int(address)


@release_slots.register(BuddyArrays)
@lean_jit
def _release(heap: BuddyArrays, address: int) -> None:
    """Give an extent back and merge it with its buddy as long as that one is free. O(log num_slots)."""
    order = int(heap.taken_order[address])  # outside compiled code an int8 would overflow when it shifts
    heap.taken_order[address] = NONE
    heap.free_slots[0] += 1 << order
    while True:
        buddy = address ^ (1 << order)
        if buddy >= heap.free_order.size or heap.free_order[buddy] != order:
            break
        _unlink(heap, buddy)
        address = min(address, buddy)
        order += 1
    _link(heap, address, order)


@HEAPS.register("buddy")
class BuddyHeap:
    """`num_slots` slots, cut at first into the powers of two of its binary form, largest first.

    18 bytes of state per slot.

    Example:
        >>> heap = BuddyHeap(12)
        >>> heap.reserve(3), heap.reserve(8), heap.free_slots
        (8, 0, 0)
        >>> heap.reserve(1) is None
        True
    """

    def __init__(self, num_slots: int) -> None:
        if not 1 <= num_slots <= np.iinfo(np.int32).max:
            raise ConfigError(f"a heap of {num_slots} slots: needs 1 to {np.iinfo(np.int32).max}")
        orders = num_slots.bit_length()
        self.num_slots = num_slots
        self.arrays = BuddyArrays(
            first=np.full(orders, NONE, np.int32),
            next_free=np.full(num_slots, NONE, np.int32),
            prev_free=np.full(num_slots, NONE, np.int32),
            free_order=np.full(num_slots, NONE, np.int8),
            taken_order=np.full(num_slots, NONE, np.int8),
            free_slots=np.array([num_slots]),
        )
        address = 0
        for order in range(orders - 1, -1, -1):
            if num_slots & (1 << order):
                _link(self.arrays, address, order)
                address += 1 << order

    def make_room(self, num_reservations: int) -> None:
        """Do nothing: there is room for one at every address."""

    def reserve(self, size: int) -> int | None:
        """Take 2**ceil(log2(size)) slots; None if no free extent is that large. O(log num_slots)."""
        if size < 1:
            raise ConfigError(f"cannot reserve {size} slots: the number must be 1 or more")
        address = int(_reserve(self.arrays, size))
        return None if address == NO_ADDRESS else address

    def release(self, address: int) -> None:
        """Give back the reservation at `address`. O(log num_slots)."""
        if not 0 <= address < self.num_slots or self.arrays.taken_order[address] == NONE:
            raise ConfigError(f"cannot release slot {address}: no reservation starts there")
        _release(self.arrays, address)

    def rounded(self, size: int) -> int:
        """Return the next power of two."""
        return int(_rounded(self.arrays, size))

    @property
    def free_slots(self) -> int:
        """Slots in free extents."""
        return int(self.arrays.free_slots[0])

    @property
    def largest_reservation(self) -> int:
        """The largest power of two within the heap."""
        return 1 << (self.num_slots.bit_length() - 1)

    def reserved(self) -> dict[int, int]:
        """Return the slots taken at each address that a reservation starts at. O(num_slots)."""
        return {int(a): 1 << int(self.arrays.taken_order[a]) for a in np.flatnonzero(self.arrays.taken_order != NONE)}

    def check_integrity(self) -> None:
        """Raise IntegrityError unless extents tile the heap, aligned and listed once, and no two free buddies lie side by side."""
        free = {int(a): int(self.arrays.free_order[a]) for a in np.flatnonzero(self.arrays.free_order != NONE)}
        taken = {int(a): int(self.arrays.taken_order[a]) for a in np.flatnonzero(self.arrays.taken_order != NONE)}
        state = f"free {free}, taken {taken}, lists from {self.arrays.first.tolist()}, of {self.num_slots} slots"
        if not all(0 <= order < self.arrays.first.size for order in (*free.values(), *taken.values())):
            raise IntegrityError(f"impossible order: {state}")
        if self._listed(len(free)) != free:
            raise IntegrityError(f"the lists do not hold each free extent once, linked both ways: {state}")
        end = 0
        for address, order in sorted((free | taken).items()):
            if address != end or address % (1 << order):
                raise IntegrityError(f"extent of order {order} at {address}, expected at {end}: {state}")
            end = address + (1 << order)
        unmerged = [a for a, order in free.items() if free.get(a ^ (1 << order)) == order]
        if end != self.num_slots or free.keys() & taken.keys() or unmerged:
            raise IntegrityError(f"extents overlap, do not tile the heap or are free buddies {unmerged}: {state}")
        if sum(1 << order for order in free.values()) != self.free_slots:
            raise IntegrityError(f"free_slots is {self.free_slots}: {state}")

    def _listed(self, expected: int) -> dict[int, int] | None:
        """Return the order of each extent in the free lists; None if they hold more than `expected` or a link is wrong."""
        listed: dict[int, int] = {}
        for order, head in enumerate(self.arrays.first.tolist()):
            before = NONE
            while head != NONE:
                broken = not 0 <= head < self.num_slots or len(listed) == expected or self.arrays.prev_free[head] != before
                if broken:
                    return None
                listed[head] = order
                before, head = head, int(self.arrays.next_free[head])
        return listed
