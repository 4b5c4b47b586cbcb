"""What running requests hold, row by row, where an allocator that compares tokens is asked request by request."""

from itertools import groupby
from operator import itemgetter

import numpy as np

from pagedkv.allocation import Allocator, GrowsWhileFree
from pagedkv.arrays import Int32Array
from pagedkv.decode_run import ONE_STEP, DecodeRun, growth, steps_within
from pagedkv.errors import IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.step_batch import StepBatch


class KVRows:
    """Drives `allocator`: who is in which row, and how much that row holds. Whoever counts slots reads it like a step allocator.

    It owns each row's `KVRequest` from admission until the row is freed.
    """

    unit_slots = 1

    def __init__(self, allocator: Allocator, *, num_rows: int) -> None:
        self.allocator = allocator
        self.name, self.placement = allocator.name, allocator.placement
        self.usable_slots, self.max_model_len = allocator.usable_slots, allocator.max_model_len
        self.state_units = allocator.state_slots
        self.units_held: Int32Array = np.zeros(num_rows, np.int32)
        """Slots that each row holds for tokens, shared ones included."""
        self._requests: list[KVRequest | None] = [None] * num_rows
        # What it is, is asked once: asking costs as much as a step.
        self._grows_while_free = isinstance(allocator, GrowsWhileFree)
        self._num_live = 0
        self._noted = [0] * num_rows
        """By row: the computed tokens that the allocator has heard of."""

    def of(self, row: int) -> KVRequest:
        """Return the request in `row`, in which there must be one."""
        request = self._requests[row]
        assert request is not None
        return request

    def admit(self, row: int, request: KVRequest, num_new_tokens: int) -> int | None:
        """Admit `request` to an empty row with slots for `num_new_tokens` behind its cached ones; return how many these are.

        None: it does not fit now, and nothing has changed.
        """
        grant = self.allocator.allocate_slots(request, num_new_tokens)
        if grant is None:
            return None
        request.num_computed_tokens = grant.num_cached_tokens + num_new_tokens
        self._requests[row], self._noted[row] = request, grant.num_cached_tokens
        self._num_live += 1
        self.units_held[row] = self.allocator.num_slots_held(request)
        return grant.num_cached_tokens

    def grow(self, row: int, num_new_tokens: int) -> bool:
        """Give the request in `row` slots for `num_new_tokens` more; return whether they fit."""
        request = self.of(row)
        if self.allocator.unit_slots == 1 or request.num_computed_tokens + num_new_tokens > self.units_held[row]:
            if self.allocator.allocate_slots(request, num_new_tokens) is None:
                return False
            self.units_held[row] = self.allocator.num_slots_held(request)
        request.num_computed_tokens += num_new_tokens
        return True

    def decode_run(self, batch: StepBatch, num_steps: int) -> DecodeRun:
        """Return how many steps, of `num_steps`, the rows of `batch` get through before memory is a question."""
        unit, held = self.allocator.unit_slots, self.units_held
        if not self._grows_while_free:
            return DecodeRun(min(num_steps, steps_within(batch, held)))
        if (held[batch["row"]] - batch["num_slots_needed"] >= unit).any():
            return ONE_STEP  # a unit gets full, of which the allocator must hear, without another being due
        return DecodeRun(num_steps, unit, self.free_slots)

    def grow_in_turn(self, batch: StepBatch, num_steps: int) -> None:
        """Take the slots of `num_steps` more steps of a decode run, after that of `batch`; the last of them is not computed yet."""
        if self.allocator.unit_slots > 1:
            self._grow_by_units(batch, num_steps)
            return
        rows = batch["row"].tolist()
        for row in rows:
            if num_steps > 1:
                self._grow_within(row, num_steps - 1)
            self.note_computed(row, self.of(row).num_computed_tokens + 1)
            self._grow_within(row, 1)

    def _grow_within(self, row: int, num_tokens: int) -> None:
        """Use `num_tokens` of the slots that `row` holds."""
        if not self.grow(row, num_tokens):
            raise IntegrityError(f"row {row} was to have slots for {num_tokens} more tokens")

    def _grow_by_units(self, batch: StepBatch, num_steps: int) -> None:
        """Take a unit for each row whenever it is full, and let the allocator hear of it before."""
        rows, slots = batch["row"].tolist(), batch["num_slots_needed"].tolist()
        held = self.units_held[rows].astype(np.int64)
        due = zip(*(each.tolist() for each in growth(batch, held, self.allocator.unit_slots, num_steps)), strict=True)
        for step, full in groupby(due, key=itemgetter(0)):
            entries = [entry for _, entry in full]
            for i in entries:
                self.of(rows[i]).num_computed_tokens = slots[i] + step - 1
                self.note_computed(rows[i], slots[i] + step)
            for i in entries:
                self._grow_within(rows[i], 1)
        for row, own in zip(rows, slots, strict=True):
            request = self.of(row)
            request.num_tokens = request.num_computed_tokens = own + num_steps

    def note_computed(self, row: int, num_known_tokens: int) -> None:
        """Hear that all slots granted to `row` are filled, and that its request knows so many tokens now.

        The allocator hears of whole blocks, pages or cells.
        """
        request, unit = self.of(row), self.allocator.unit_slots
        request.num_tokens = num_known_tokens
        if request.num_computed_tokens // unit > self._noted[row] // unit:
            self.allocator.note_computed(request)
            self._noted[row] = request.num_computed_tokens

    def free(self, row: int) -> None:
        """Take back all that `row` holds. Its content may stay for others."""
        request = self.of(row)
        self.allocator.note_computed(request)
        self.allocator.free(request)
        request.num_computed_tokens = 0
        self._requests[row], self.units_held[row] = None, 0
        self._num_live -= 1

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return self.allocator.free_slots

    @property
    def cached_slots(self) -> int:
        """Free slots that keep content for reuse."""
        return self.allocator.num_cached_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time. O(rows)."""
        held = self.usable_slots - self.free_slots - self.rounding_slots - self._num_live * self.state_units
        return int(self.units_held.sum(dtype=np.int64)) - held

    @property
    def rounding_slots(self) -> int:
        """Slots lost to the heap's rounding of live reservations."""
        return self.allocator.rounding_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows and allocator agree on who holds how much."""
        self.allocator.check_integrity()
        held = [0 if request is None else self.allocator.num_slots_held(request) for request in self._requests]
        live = {request for request in self._requests if request is not None}
        if self.units_held.tolist() != held or set(self.allocator.live_requests()) != live or len(live) != self._num_live:
            raise IntegrityError(f"rows hold {self.units_held.tolist()} slots, the allocator says {held}")
