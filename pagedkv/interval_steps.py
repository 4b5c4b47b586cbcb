"""Contiguous reservations for a whole step at once, in compiled code: one interval per row, from admission to the end."""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.contiguous_allocator import ContiguousAllocator
from pagedkv.errors import IntegrityError
from pagedkv.heap_arrays import NO_ADDRESS, num_free_slots, release_slots, reserve_slots, rounded_size
from pagedkv.jit import lean_jit
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import (
    admit,
    begin_step,
    covers,
    each_admission_slots,
    find_cached,
    free_row,
    grant,
    moved_blocks,
    no_news,
    nothing_cached,
    nothing_moved,
    rows_of,
    slots_of,
)


class IntervalArrays(NamedTuple):
    """Who has which interval."""

    heap: Any
    """The heap's arrays: `pagedkv.heap_arrays`."""
    addresses: Int64Array
    """By row: the first slot of its interval, where tokens begin; its state lies behind them."""
    held: Int32Array
    """By row: slots of its interval that are for tokens, 0 if it has none."""
    rounding: Int64Array
    """Length 1: slots that the heap's rounding takes besides."""


class IntervalRules(NamedTuple):
    """What is the same for all rows."""

    state_slots: int


@lean_jit
def _reserve(memory: IntervalArrays, rules: IntervalRules, row: int, num_slots: int) -> bool:
    """Give `row` an interval for `num_slots` tokens and a state; return whether there is one. As long as the heap takes."""
    size = num_slots + rules.state_slots
    address = reserve_slots(memory.heap, size)
    if address == NO_ADDRESS:
        return False
    memory.addresses[row] = address
    memory.held[row] = num_slots
    memory.rounding[0] += rounded_size(memory.heap, size) - size
    return True


begin_step.register(IntervalArrays)(no_news)
find_cached.register(IntervalArrays)(nothing_cached)


@covers.register(IntervalArrays)
@lean_jit
def _covers(memory: IntervalArrays, rules: IntervalRules, row: int, num_slots: int, num_computed: int) -> bool:
    """Who runs has all that it will ever need."""
    return True


@grant.register(IntervalArrays)
@lean_jit
def _grant(
    memory: IntervalArrays, rules: IntervalRules, requests: Any, segments: Any, request: int, row: int, num_tokens: int
) -> bool:
    return True


@admit.register(IntervalArrays)
@lean_jit
def _admit(
    memory: IntervalArrays,
    rules: IntervalRules,
    requests: Any,
    segments: Any,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    return _reserve(memory, rules, row, requests["admission_slots"][request])


@free_row.register(IntervalArrays)
@lean_jit
def _free_row(memory: IntervalArrays, rules: IntervalRules, row: int) -> None:
    if memory.held[row] > 0:
        size = memory.held[row] + rules.state_slots
        release_slots(memory.heap, memory.addresses[row])
        memory.held[row] = 0
        memory.rounding[0] -= rounded_size(memory.heap, size) - size


moved_blocks.register(IntervalArrays)(nothing_moved)


@slots_of.register(IntervalArrays)
@lean_jit
def _slots_of(memory: IntervalArrays, rules: IntervalRules) -> tuple[int, int, int, int]:
    return num_free_slots(memory.heap), 0, 0, memory.rounding[0]


@rows_of.register(IntervalArrays)
@lean_jit
def _rows_of(memory: IntervalArrays, rules: IntervalRules) -> tuple[Int32Array, int, int]:
    return memory.held, 1, rules.state_slots


@lean_jit
def _allocate_slots(memory: IntervalArrays, rules: IntervalRules, batch: StepBatch, first: int, last: int) -> int:
    for i in range(first, last):
        row = batch["row"][i]
        if memory.held[row] == 0 and not _reserve(memory, rules, row, batch["admission_slots"][i]):
            return i
    return last


class IntervalStepAllocator:
    """What `allocator` does request by request, row by row, in its heap."""

    unit_slots = 1
    lookahead_slots = cached_slots = shared_slots = 0

    def __init__(self, allocator: ContiguousAllocator) -> None:
        self.name, self.placement = allocator.name, allocator.placement
        self.num_slots, self.usable_slots = allocator.num_slots, allocator.usable_slots
        self.max_model_len = allocator.max_model_len
        self.state_units = allocator.state_slots
        self.heap = allocator.heap
        self.heap.make_room(allocator.max_num_seqs)
        self.admission_slots = allocator.admission_slots
        self.rules = IntervalRules(allocator.state_slots)
        self.arrays = IntervalArrays(
            self.heap.arrays,
            np.zeros(allocator.max_num_seqs, np.int64),
            np.zeros(allocator.max_num_seqs, np.int32),
            np.zeros(1, np.int64),
        )
        self.units_held = self.arrays.held

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        return each_admission_slots(self.admission_slots, prompt_tokens, output_tokens)

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Reserve for entries that have nothing until one does not fit; return its index. O(entries), and the heap's."""
        del num_running
        return int(_allocate_slots(self.arrays, self.rules, batch, first, last))

    def free(self, row: int) -> None:
        """Give the interval of `row` back."""
        free_row(self.arrays, self.rules, row)

    def slots_of_row(self, row: int) -> Int64Array:
        """Return the slots of `row` that are for tokens."""
        slots: Int64Array = np.arange(self.arrays.held[row]) + self.arrays.addresses[row]
        return slots

    def taken_slots(self) -> Int64Array:
        """Return the slots that the heap has given out, rounding included. O(usable_slots)."""
        taken = (np.arange(address, address + size) for address, size in self.heap.reserved().items())
        return np.concatenate([np.zeros(0, np.int64), *taken])

    @property
    def free_slots(self) -> int:
        """Slots in free extents of the heap."""
        return self.heap.free_slots

    @property
    def rounding_slots(self) -> int:
        """Slots lost to the heap's rounding of live reservations."""
        return int(self.arrays.rounding[0])

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the rows' intervals are exactly what the heap has given out."""
        self.heap.check_integrity()
        rows = np.flatnonzero(self.arrays.held).tolist()
        sizes = [int(self.arrays.held[row]) + self.state_units for row in rows]
        held = {int(self.arrays.addresses[row]): self.heap.rounded(size) for row, size in zip(rows, sizes, strict=True)}
        if held != self.heap.reserved() or sum(map(self.heap.rounded, sizes)) - sum(sizes) != self.rounding_slots:
            raise IntegrityError(
                f"rows have {held}, {self.rounding_slots} slots lost to rounding; the heap has given out {self.heap.reserved()}"
            )
