"""vAttention's virtual memory for a whole step at once, in compiled code: pages are mapped behind rows as tokens come."""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.allocators.vattention import VAttentionAllocator
from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_table import block_slots
from pagedkv.errors import IntegrityError
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
from pagedkv.virtual_pages import NUM_FREE, PageArrays, best_row, need_pages, release_pages


class VirtualArrays(NamedTuple):
    """Who has which row of addresses."""

    pages: PageArrays
    places: Int32Array
    """By row of the batch: its row of addresses, if it holds pages."""
    held: Int32Array
    """By row of the batch: pages that its tokens reach into."""


class VirtualRules(NamedTuple):
    """How pages are given, as plain numbers."""

    page_tokens: int
    state_pages: int
    watermark_pages: int
    reserve_full_isl: bool


@lean_jit
def _pages_needed(rules: VirtualRules, num_tokens: int) -> int:
    return rules.state_pages + -(-num_tokens // rules.page_tokens)


@lean_jit
def _grow(memory: VirtualArrays, rules: VirtualRules, row: int, num_slots: int) -> bool:
    """Let `row`, which runs, have pages for `num_slots` tokens; return whether there are. O(pages mapped)."""
    needed = max(_pages_needed(rules, num_slots), rules.state_pages + memory.held[row])
    if not need_pages(memory.pages, memory.places[row], needed):
        return False
    memory.held[row] = needed - rules.state_pages
    return True


@lean_jit
def _start(
    memory: VirtualArrays,
    rules: VirtualRules,
    row: int,
    num_slots: int,
    num_known: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Let `row` have the row of addresses that has just enough pages, and those that it lacks. O(rows + pages mapped)."""
    needed = _pages_needed(rules, num_slots)
    gated = max(needed, _pages_needed(rules, num_known)) if rules.reserve_full_isl else needed
    if gated + (rules.watermark_pages if something_runs else 0) > memory.pages.counts[NUM_FREE]:
        return False
    memory.places[row] = best_row(memory.pages, needed)
    need_pages(memory.pages, memory.places[row], needed)
    memory.held[row] = needed - rules.state_pages
    return True


begin_step.register(VirtualArrays)(no_news)
find_cached.register(VirtualArrays)(nothing_cached)


@covers.register(VirtualArrays)
@lean_jit
def _covers(memory: VirtualArrays, rules: VirtualRules, row: int, num_slots: int, num_computed: int) -> bool:
    return num_slots <= int(memory.held[row]) * rules.page_tokens


@grant.register(VirtualArrays)
@lean_jit
def _grant(
    memory: VirtualArrays, rules: VirtualRules, requests: Any, segments: Any, request: int, row: int, num_tokens: int
) -> bool:
    return _grow(memory, rules, row, requests["num_computed_tokens"][request] + num_tokens)


@admit.register(VirtualArrays)
@lean_jit
def _admit(
    memory: VirtualArrays,
    rules: VirtualRules,
    requests: Any,
    segments: Any,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    return _start(memory, rules, row, num_tokens, requests["num_known_tokens"][request], something_runs)


@free_row.register(VirtualArrays)
@lean_jit
def _free_row(memory: VirtualArrays, rules: VirtualRules, row: int) -> None:
    """Make its row of addresses idle: its pages stay mapped, and are free."""
    if memory.held[row] > 0:
        release_pages(memory.pages, memory.places[row])
        memory.held[row] = 0


moved_blocks.register(VirtualArrays)(nothing_moved)


@slots_of.register(VirtualArrays)
@lean_jit
def _slots_of(memory: VirtualArrays, rules: VirtualRules) -> tuple[int, int, int, int]:
    return memory.pages.counts[NUM_FREE] * rules.page_tokens, 0, 0, 0


@rows_of.register(VirtualArrays)
@lean_jit
def _rows_of(memory: VirtualArrays, rules: VirtualRules) -> tuple[Int32Array, int, int]:
    return memory.held, rules.page_tokens, rules.state_pages


@lean_jit
def _allocate_slots(memory: VirtualArrays, rules: VirtualRules, batch: StepBatch, first: int, last: int) -> int:
    for i in range(first, last):
        row, slots = batch["row"][i], batch["num_slots_needed"][i]
        if memory.held[row] > 0:
            fits = _grow(memory, rules, row, slots)
        else:
            fits = _start(memory, rules, row, slots, batch["num_known_tokens"][i], i > 0)
        if not fits:
            return i
    return last


class VirtualStepAllocator:
    """What `allocator` does request by request, row by row, in its pages."""

    rounding_slots = lookahead_slots = cached_slots = shared_slots = 0

    def __init__(self, allocator: VAttentionAllocator) -> None:
        self.name, self.placement = allocator.name, allocator.placement
        self.num_slots, self.usable_slots = allocator.num_slots, allocator.usable_slots
        self.max_model_len = allocator.max_model_len
        self.unit_slots, self.state_units = allocator.unit_slots, allocator.state_pages
        self.pages = allocator.pages
        self.admission_slots = allocator.admission_slots
        self.rules = VirtualRules(
            int(allocator.unit_slots), allocator.state_pages, allocator.watermark_pages, bool(allocator.reserve_full_isl)
        )
        self.arrays = VirtualArrays(self.pages.arrays, *np.zeros((2, allocator.max_num_seqs), np.int32))
        self.units_held = self.arrays.held

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        return each_admission_slots(self.admission_slots, prompt_tokens, output_tokens)

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Map pages in order until one entry does not fit; return its index. O(entries + pages mapped)."""
        del num_running
        return int(_allocate_slots(self.arrays, self.rules, batch, first, last))

    def free(self, row: int) -> None:
        """Make the row of addresses of `row` idle."""
        free_row(self.arrays, self.rules, row)

    def slots_of_row(self, row: int) -> Int64Array:
        """Return the physical slots of the pages that the tokens of `row` reach into."""
        first, number = self.state_units, int(self.arrays.held[row])
        return block_slots(self.pages.arrays.table[self.arrays.places[row], first : first + number], self.unit_slots)

    def taken_slots(self) -> Int64Array:
        """Return the slots of pages that somebody holds, be it for state."""
        rows = np.flatnonzero(self.arrays.held)
        table, needed = self.pages.arrays.table[self.arrays.places[rows]], self.arrays.held[rows] + self.state_units
        return block_slots(table[np.arange(table.shape[1]) < needed[:, None]], self.unit_slots)

    @property
    def free_slots(self) -> int:
        """Slots of pages that no request needs, mapped ones included."""
        return self.pages.free_pages * self.unit_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pages have one place each and exactly the rows that hold some have addresses."""
        self.pages.check_integrity()
        rows = np.flatnonzero(self.arrays.held)
        pages = self.arrays.held[rows] + self.state_units
        held = dict(zip(self.arrays.places[rows].tolist(), pages.tolist(), strict=True))
        needed = self.pages.arrays.num_needed
        if len(held) != rows.size or held != {int(place): int(needed[place]) for place in np.flatnonzero(needed)}:
            raise IntegrityError(f"rows have {held} pages by place, the memory says {needed.tolist()}")
