"""llama.cpp with --kv-unified: all server slots draw cells from one stream."""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.cell_cache import CellCache
from pagedkv.cell_slots import ServerSlots
from pagedkv.errors import IntegrityError
from pagedkv.jit import fixed_types
from pagedkv.kv_request import KVRequest
from pagedkv.slot_cells import SlotCells, leave_slot, share_cells, take_cells

# Their arguments have the same types in every allocator.
_take_cells = fixed_types(take_cells)
_leave_slot = fixed_types(leave_slot)


@ALLOCATORS.register("llama-cpp-unified")
class LlamaCppUnified:
    """max_num_seqs server slots over one stream of cells; what a request left in its slot lives on in the same cells.

    State of fixed size is set aside at load for every server slot, in the last slots of the pool; that of idle ones counts as free.
    An admission asks for a free server slot and cells for the tokens of the step: there is no watermark and no full-prompt gate.
    """

    name = "llama-cpp-unified"
    placement = "cell"
    unit_slots = num_groups = 1
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings) -> None:
        self.num_slots = settings.num_slots
        self.max_model_len, self.max_num_seqs, self.state_slots = (
            settings.max_model_len,
            settings.max_num_seqs,
            settings.state_slots,
        )
        size = settings.num_slots - settings.max_num_seqs * settings.state_slots
        self.server_slots = ServerSlots(settings, settings.max_num_seqs if size > 0 else 0, share_cells=True)
        self.cells = CellCache(max(size, 0))
        self.usable_slots = self.cells.size + len(self.server_slots.slots) * self.state_slots
        self.arrays = SlotCells.over(self.cells.arrays, self.server_slots.arrays, self.max_model_len)

    @property
    def n_kv(self) -> int:
        """Cells that attention reads for every token: up to the highest used one, whoever uses it, padded to 256."""
        return self.cells.n_kv

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if even all cells are too few."""
        return 0 if prompt_tokens + output_tokens - 1 <= min(self.cells.size, self.max_model_len) else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the common prefix with what the slot that it would get remembers. O(server slots + tokens compared)."""
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        chosen = self.server_slots.choose(request)
        return chosen[1] if chosen else 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take empty cells from the head on, and purge idle slots, by number, as far as it takes and only if that is enough.

        Cells beyond its computed tokens (rejected drafts) are given back first. O(cells passed, taken and given back), and at
        admission as `get_computed_tokens`.
        """
        slot, num_cached = self.server_slots.of(request), 0
        self.server_slots.check(request, num_new_tokens, self.num_slots_held(request))
        if slot is None:
            chosen = self.server_slots.choose(request)
            if chosen is None:
                return None
            slot, num_cached = chosen
        num_kept, remembered = request.num_computed_tokens + num_cached, slot.tokens.size
        request.check_length(num_kept + num_new_tokens, self.max_model_len)
        if not _take_cells(self.arrays, slot.index, int(num_kept), int(num_new_tokens)):
            return None
        if slot.request is None:
            self.server_slots.begin_window(slot, request, remembered, num_cached)
            self.server_slots.start(slot, request, num_cached)
        else:
            self.server_slots.forget_lost()
        slot.num_computed = min(slot.num_computed, num_kept)
        self.server_slots.count_computed(slot, num_new_tokens)
        return Grant(num_cached_tokens=num_cached)

    def note_computed(self, request: KVRequest) -> None:
        """Note what may stay in its slot when it ends."""
        self.server_slots.note_computed(request, self.num_slots_held(request))

    def free(self, request: KVRequest) -> None:
        """Make its server slot idle. Its computed tokens stay until the slot gets another request or is purged. O(its cells)."""
        slot = self.server_slots.end(request)
        _leave_slot(self.arrays, slot.index, slot.tokens.size)

    def preempt(self, request: KVRequest) -> None:
        """End it as `free` does: llama.cpp has no preemption, it ends all requests with an error when cells run out.

        So its computed tokens stay in the idle slot, where it finds them again unless they are purged.
        """
        self.free(request)
        request.num_computed_tokens = 0

    def fork(self, parent: KVRequest, child: KVRequest) -> None:
        """Let `child` run in the first idle slot, carried by the cells of all computed tokens of `parent`.

        Nothing is ever copied: a cell holds one token, so who writes on takes new cells.

        Raises:
            ConfigError: Also if no server slot is idle.
        """
        slot, target = self.server_slots.slots_of_fork(parent, child)
        self.server_slots.begin_window(target, child, 0, 0)
        share_cells(self.arrays, slot.index, target.index, parent.num_computed_tokens)
        self.server_slots.start(target, child, min(slot.num_computed, parent.num_computed_tokens))

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that run in a server slot."""
        return self.server_slots.running()

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the number of its cells."""
        slot = self.server_slots.of(request)
        return 0 if slot is None else int(self.arrays.held[slot.index])

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return its cells."""
        slot = self.server_slots.of(request)
        return NO_SLOTS if slot is None else self.arrays.of(slot.index).astype(np.int64)

    def cached_slots(self) -> Int64Array:
        """Return the cells of what idle slots remember, without those that a fork still runs on. O(n log n) in these cells."""
        cells = np.unique(np.concatenate([NO_SLOTS, *(self.arrays.of(slot.index) for slot in self.server_slots.idle())]))
        unheld: Int64Array = cells[self.arrays.cells.num_live[cells] == 0]
        return unheld

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return self.cells.size - self.cells.num_empty - self.cells.num_held

    @property
    def free_slots(self) -> int:
        """Cells that no running request holds, and the state of idle server slots."""
        num_running = len(self.server_slots.running())
        return self.usable_slots - self.cells.num_held - num_running * self.state_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless cells, sequences and server slots fit together."""
        self.server_slots.check_integrity()
        parts: tuple[list[Int32Array], list[Int32Array]] = ([], [])
        for slot in self.server_slots.slots:
            cells = self.arrays.of(slot.index)
            parts[slot.request is None].append(cells)
            if slot.num_computed > cells.size or (slot.request is None and self.arrays.held[slot.index]):
                raise IntegrityError(f"{slot} has cells {cells.tolist()}")
        self.cells.check_integrity(*parts)
