"""Intervals that grow for a whole step at once, in compiled code: what `contiguous-growing` does request by request, row by row."""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.allocators.contiguous_growing import ContiguousGrowingAllocator
from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.growing_heap import FREE_SLOTS, GrowingArrays, grow_interval, release_interval
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


class GrowingRows(NamedTuple):
    """Who has which interval: that of the place of the row's number."""

    heap: GrowingArrays
    held: Int32Array
    """By row: slots of its interval that are for tokens, 0 if it has none."""


class GrowingRules(NamedTuple):
    """How slots are given, as plain numbers."""

    block_size: int
    """Slots that an interval takes at once."""
    state_slots: int
    watermark_slots: int
    reserve_full_isl: bool


@lean_jit
def _size(rules: GrowingRules, num_tokens: int) -> int:
    return rules.state_slots + -(-num_tokens // rules.block_size) * rules.block_size


@lean_jit
def _grow(memory: GrowingRows, rules: GrowingRules, row: int, num_slots: int) -> bool:
    """Let `row` have slots for `num_slots` tokens; return whether there are. O(rows), O(log rows) where it lies."""
    size = _size(rules, num_slots)
    if size - rules.state_slots > memory.held[row]:
        if not grow_interval(memory.heap, row, size):
            return False
        memory.held[row] = size - rules.state_slots
    return True


@lean_jit
def _start(
    memory: GrowingRows,
    rules: GrowingRules,
    row: int,
    num_slots: int,
    num_known: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Let `row`, which has nothing, have slots for `num_slots` tokens."""
    size = _size(rules, num_slots)
    gated = max(size, _size(rules, num_known)) if rules.reserve_full_isl else size
    if gated + (rules.watermark_slots if something_runs else 0) > memory.heap.counts[FREE_SLOTS]:
        return False
    return _grow(memory, rules, row, num_slots)


begin_step.register(GrowingRows)(no_news)
find_cached.register(GrowingRows)(nothing_cached)


@covers.register(GrowingRows)
@lean_jit
def _covers(memory: GrowingRows, rules: GrowingRules, row: int, num_slots: int, num_computed: int) -> bool:
    return bool(num_slots <= memory.held[row])


@grant.register(GrowingRows)
@lean_jit
def _grant(memory: GrowingRows, rules: GrowingRules, requests: Any, segments: Any, request: int, row: int, num_tokens: int) -> bool:
    return _grow(memory, rules, row, requests["num_computed_tokens"][request] + num_tokens)


@admit.register(GrowingRows)
@lean_jit
def _admit(
    memory: GrowingRows,
    rules: GrowingRules,
    requests: Any,
    segments: Any,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    return _start(memory, rules, row, num_tokens, requests["num_known_tokens"][request], something_runs)


@free_row.register(GrowingRows)
@lean_jit
def _free_row(memory: GrowingRows, rules: GrowingRules, row: int) -> None:
    if memory.held[row] > 0:
        release_interval(memory.heap, row)
        memory.held[row] = 0


moved_blocks.register(GrowingRows)(nothing_moved)


@slots_of.register(GrowingRows)
@lean_jit
def _slots_of(memory: GrowingRows, rules: GrowingRules) -> tuple[int, int, int, int]:
    return memory.heap.counts[FREE_SLOTS], 0, 0, 0


@rows_of.register(GrowingRows)
@lean_jit
def _rows_of(memory: GrowingRows, rules: GrowingRules) -> tuple[Int32Array, int, int]:
    return memory.held, 1, rules.state_slots


@lean_jit
def _allocate_slots(memory: GrowingRows, rules: GrowingRules, batch: StepBatch, first: int, last: int) -> int:
    for i in range(first, last):
        row, slots = batch["row"][i], batch["num_slots_needed"][i]
        if memory.held[row] > 0:
            fits = _grow(memory, rules, row, slots)
        else:
            fits = _start(memory, rules, row, slots, batch["num_known_tokens"][i], i > 0)
        if not fits:
            return i
    return last


class GrowingStepAllocator:
    """What `allocator` does request by request, row by row, in its heap. Moves are counted, not told."""

    unit_slots = 1
    rounding_slots = lookahead_slots = cached_slots = shared_slots = 0

    def __init__(self, allocator: ContiguousGrowingAllocator) -> None:
        self.name, self.placement = allocator.name, allocator.placement
        self.num_slots, self.usable_slots = allocator.num_slots, allocator.usable_slots
        self.max_model_len, self.state_units = allocator.max_model_len, allocator.state_slots
        self.heap = allocator.heap
        self.admission_slots = allocator.admission_slots
        self.rules = GrowingRules(
            int(allocator.block_size), allocator.state_slots, allocator.watermark_slots, bool(allocator.reserve_full_isl)
        )
        self.arrays = GrowingRows(self.heap.arrays, np.zeros(allocator.max_num_seqs, np.int32))
        self.units_held = self.arrays.held

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        return each_admission_slots(self.admission_slots, prompt_tokens, output_tokens)

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Grow in order until one entry does not fit; return its index. O(entries × rows)."""
        del num_running
        return int(_allocate_slots(self.arrays, self.rules, batch, first, last))

    def free(self, row: int) -> None:
        """Give the interval of `row` back."""
        free_row(self.arrays, self.rules, row)

    def slots_of_row(self, row: int) -> Int64Array:
        """Return the slots of `row` that are for tokens."""
        start, size = self.heap.interval(row)
        return np.arange(start + (self.state_units if size else 0), start + size)

    def taken_slots(self) -> Int64Array:
        """Return the slots of all intervals, state included. O(usable_slots)."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(start, start + size) for start, size in self.heap.intervals())])

    @property
    def free_slots(self) -> int:
        """Slots in no interval."""
        return self.heap.free_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the heap is sound and rows hold what their intervals have."""
        self.heap.check_integrity()
        sizes = self.heap.arrays.size
        if not np.array_equal(np.where(sizes > 0, sizes - self.state_units, 0), self.arrays.held):
            raise IntegrityError(f"rows hold {self.arrays.held.tolist()} slots, the heap has {sizes.tolist()}")
