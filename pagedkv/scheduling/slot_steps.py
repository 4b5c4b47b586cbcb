"""Server slots for a whole step at once, in compiled code: cells of one stream, or a stream for each slot. A row is a slot.

What a slot remembers is known by the request that ran there last: whoever comes next finds as much as the streams of both agree.
"""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.allocators.llama_cpp_split import SplitStreams
from pagedkv.allocators.llama_cpp_unified import LlamaCppUnified
from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.cell_cache import HELD, USED
from pagedkv.errors import IntegrityError
from pagedkv.jit import by_kind, lean_jit
from pagedkv.scheduling.common_prefix import common_tokens
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.slot_arrays import NUM_BUSY, SlotArrays, choose_slot, end_slot, start_slot
from pagedkv.slot_cells import SlotCells, leave_slot, take_cells
from pagedkv.slot_windows import begin_window, count_computed, reusable_tokens
from pagedkv.step_memory import (
    admit,
    each_admission_slots,
    grant,
    moved_blocks,
    nothing_moved,
    rows_of,
    slots_of,
)

NO_END = np.iinfo(np.int64).max
"""In place of a number of cells: as many as anybody asks for."""


class SlotStreams(NamedTuple):
    """Server slots that have a stream of cells each."""

    slots: SlotArrays
    held: Int32Array
    """By server slot: the cells of its stream while a request runs there, else 0."""


class SlotRules(NamedTuple):
    """What is the same for all slots."""

    usable_slots: int
    stream_cells: int
    """Cells that an admission takes in one piece: a stream; 0: they are taken token by token."""
    state_slots: int
    remembers: bool
    """Whether idle slots keep what they have computed."""


@by_kind
def num_spare_cells(memory: Any, rules: Any) -> Any:
    """Return how many tokens can get cells if all idle slots are purged."""


@by_kind
def end_row(memory: Any, rules: Any, row: int, num_kept: int) -> Any:
    """Make the slot `row` idle; it remembers the first `num_kept` tokens of what ran there, if slots do."""


@lean_jit
def find_slot(slots: SlotArrays, rules: SlotRules, requests: RequestArrays, segments: Segments, request: int) -> tuple[int, int]:
    """Return the slot that waiting `request` would get now and the leading tokens that it would find there, never all of its own.

    One must be idle. O(server slots × segments).
    """
    known = requests["num_known_tokens"][request]
    for slot in range(slots.runs.size):
        slots.num_common[slot] = 0
        if slots.num_kept[slot] > 0:
            most = min(slots.num_kept[slot], known)
            slots.num_common[slot] = common_tokens(requests, segments, slots.requests[slot], request, most)
    slot = choose_slot(slots, known)
    return slot, reusable_tokens(slots.windows, slot, slots.num_kept[slot], slots.num_common[slot], known)


@lean_jit
def message_start(requests: RequestArrays, segments: Segments, request: int) -> int:
    """Return where the last message of a prompt starts: behind the last text that goes before it, a system prompt for example."""
    place = requests["first_segment"][request] + requests["num_segments"][request] - 1
    while place >= requests["first_segment"][request]:
        if segments["end_token"][place] < requests["prompt_tokens"][request]:
            return int(segments["end_token"][place])
        place -= 1
    return 0


@lean_jit
def _begin(slots: SlotArrays, requests: RequestArrays, segments: Segments, request: int, row: int, kept: int, found: int) -> None:
    """Let `request` begin in slot `row`, which remembered `kept` tokens, behind `found` of them."""
    slots.requests[row] = request
    start = message_start(requests, segments, request)
    begin_window(slots.windows, row, kept, found, requests["num_known_tokens"][request], start)


@grant.register(SlotCells)
@lean_jit
def _grant_cells(
    memory: SlotCells, rules: SlotRules, requests: Any, segments: Any, request: int, row: int, num_tokens: int
) -> bool:
    if not take_cells(memory, row, memory.held[row], num_tokens):
        return False
    count_computed(memory.slots.windows, row, num_tokens)
    return True


@admit.register(SlotCells)
@lean_jit
def _admit_to_cells(
    memory: SlotCells,
    rules: SlotRules,
    requests: Any,
    segments: Any,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """There is no watermark, and no gate for the whole prompt."""
    kept = memory.slots.num_kept[row]
    if not take_cells(memory, row, num_cached, num_tokens):
        return False
    _begin(memory.slots, requests, segments, request, row, kept, num_cached)
    count_computed(memory.slots.windows, row, num_tokens)
    return True


@end_row.register(SlotCells)
@lean_jit
def _end_row_of_cells(memory: SlotCells, rules: SlotRules, row: int, num_kept: int) -> None:
    leave_slot(memory, row, num_kept if rules.remembers else 0)


@num_spare_cells.register(SlotCells)
@lean_jit
def _num_spare_cells(memory: SlotCells, rules: SlotRules) -> int:
    return int(memory.cells.num_seqs.size - memory.cells.counters[HELD])


moved_blocks.register(SlotCells)(nothing_moved)


@slots_of.register(SlotCells)
@lean_jit
def _slots_of_cells(memory: SlotCells, rules: SlotRules) -> tuple[int, int, int, int]:
    counters = memory.cells.counters
    free = rules.usable_slots - counters[HELD] - memory.slots.counts[NUM_BUSY] * rules.state_slots
    return free, counters[USED] - counters[HELD], 0, 0


@rows_of.register(SlotCells)
@lean_jit
def _rows_of_cells(memory: SlotCells, rules: SlotRules) -> tuple[Int32Array, int, int]:
    return memory.held, 1, rules.state_slots


@grant.register(SlotStreams)
@lean_jit
def _grant_stream(
    memory: SlotStreams, rules: SlotRules, requests: Any, segments: Any, request: int, row: int, num_tokens: int
) -> bool:
    """Who runs has a whole stream."""
    count_computed(memory.slots.windows, row, num_tokens)
    return True


@admit.register(SlotStreams)
@lean_jit
def _admit_to_stream(
    memory: SlotStreams,
    rules: SlotRules,
    requests: Any,
    segments: Any,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    _begin(memory.slots, requests, segments, request, row, memory.slots.num_kept[row], num_cached)
    start_slot(memory.slots, row)
    count_computed(memory.slots.windows, row, num_tokens)
    memory.held[row] = rules.stream_cells
    return True


@end_row.register(SlotStreams)
@lean_jit
def _end_row_of_stream(memory: SlotStreams, rules: SlotRules, row: int, num_kept: int) -> None:
    memory.held[row] = 0
    end_slot(memory.slots, row, num_kept if rules.remembers else 0)


@num_spare_cells.register(SlotStreams)
@lean_jit
def _num_spare_in_streams(memory: SlotStreams, rules: SlotRules) -> int:
    """Whoever gets a slot has cells to its end."""
    return NO_END


moved_blocks.register(SlotStreams)(nothing_moved)


@slots_of.register(SlotStreams)
@lean_jit
def _slots_of_streams(memory: SlotStreams, rules: SlotRules) -> tuple[int, int, int, int]:
    taken, cached = memory.slots.counts[NUM_BUSY] * (rules.stream_cells + rules.state_slots), 0
    for slot in range(memory.slots.runs.size):
        cached += memory.slots.num_kept[slot]
    return rules.usable_slots - taken, cached, 0, 0


@rows_of.register(SlotStreams)
@lean_jit
def _rows_of_streams(memory: SlotStreams, rules: SlotRules) -> tuple[Int32Array, int, int]:
    return memory.held, 1, rules.state_slots


class SlotStepAllocator:
    """What `allocator` does request by request, row by row, in its slots: a row is a slot, and which one memory says."""

    unit_slots = 1
    lookahead_slots = shared_slots = rounding_slots = 0

    def __init__(self, allocator: LlamaCppUnified | SplitStreams) -> None:
        self.name, self.placement = allocator.name, allocator.placement
        self.num_slots, self.usable_slots = allocator.num_slots, allocator.usable_slots
        self.max_model_len, self.state_units = allocator.max_model_len, allocator.state_slots
        self.slots = allocator.server_slots.arrays
        self.cells = allocator.cells if isinstance(allocator, LlamaCppUnified) else None
        """The cells, if all slots draw from one stream."""
        stream_cells = 0 if isinstance(allocator, LlamaCppUnified) else allocator.stream_cells
        self.rules = SlotRules(int(self.usable_slots), int(stream_cells), int(self.state_units), allocator.server_slots.remembers)
        self.arrays: SlotCells | SlotStreams = (
            allocator.arrays
            if isinstance(allocator, LlamaCppUnified)
            else SlotStreams(self.slots, np.zeros(self.slots.runs.size, np.int32))
        )
        self.units_held = self.arrays.held
        self.admission_slots = allocator.admission_slots

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        return each_admission_slots(self.admission_slots, prompt_tokens, output_tokens)

    def slots_of_row(self, row: int) -> Int64Array:
        """Return the cells of `row`: in a stream, those behind its tokens too."""
        if isinstance(self.arrays, SlotCells):
            return self.arrays.of(row).astype(np.int64)
        return row * self.rules.stream_cells + np.arange(self.arrays.held[row], dtype=np.int64)

    def kept_slots(self) -> Int64Array:
        """Return the cells of what idle slots remember."""
        kept = [(row, self.slots.num_kept[row]) for row in np.flatnonzero(self.slots.num_kept).tolist()]
        if isinstance(self.arrays, SlotCells):
            return np.concatenate([NO_SLOTS, *(self.arrays.of(row) for row, _ in kept)])
        return np.concatenate([NO_SLOTS, *(row * self.rules.stream_cells + np.arange(number) for row, number in kept)])

    @property
    def free_slots(self) -> int:
        """Cells that no running request holds, and the state of idle slots."""
        return int(slots_of(self.arrays, self.rules)[0])

    @property
    def cached_slots(self) -> int:
        """Cells of what idle slots remember."""
        return int(slots_of(self.arrays, self.rules)[1])

    def check_integrity(self) -> None:
        """Raise IntegrityError unless slots and cells agree on who holds how much."""
        slots, held = self.slots, self.arrays.held
        rows = range(slots.runs.size)
        runs = [bool(held[row]) for row in rows]
        alike = slots.runs.tolist() == runs and slots.counts[NUM_BUSY] == sum(runs)
        if not alike or slots.num_kept[slots.runs > 0].any() or not (self.rules.remembers or not slots.num_kept.any()):
            raise IntegrityError(f"slots {slots} hold {held.tolist()} cells")
        if self.cells is not None and isinstance(self.arrays, SlotCells):
            parts = [[self.arrays.of(row) for row in rows if runs[row] is running] for running in (True, False)]
            self.cells.check_integrity(*parts)
        elif any(held[row] not in (0, self.rules.stream_cells) for row in rows):
            raise IntegrityError(f"slots hold {held.tolist()} cells of streams of {self.rules.stream_cells}")
