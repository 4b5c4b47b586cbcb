"""Contiguous KV allocation: at admission a request reserves one interval for its whole life. The baselines of PagedAttention."""

from collections.abc import Callable

import numpy as np

from pagedkv.allocation import KVPoolSettings, StepBatch
from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.heaps import HEAPS

NOT_HELD = -1


class ContiguousAllocator:
    """Reserves `reservation(prompt_tokens, output_tokens)` adjacent slots at admission, found by the heap of the settings."""

    unit_slots = 1

    def __init__(self, name: str, settings: KVPoolSettings, *, reservation: Callable[[int, int], int]) -> None:
        self.name = name
        self.placement = settings.contiguous_heap
        self.heap = HEAPS.load(settings.contiguous_heap)(settings.num_slots)
        self.usable_slots = settings.num_slots
        self.max_model_len = settings.max_model_len
        self.address: Int64Array = np.full(settings.max_num_seqs, NOT_HELD, np.int64)
        """By row: first slot of its reservation. Token t of the row lies in slot address + t."""
        self.state_units = settings.state_slots
        self.units_held: Int32Array = np.zeros(settings.max_num_seqs, np.int32)
        self.rounding_slots = 0
        self._reservation = reservation

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return the reservation, or None if the empty heap could not place it."""
        slots = self._reservation(prompt_tokens, output_tokens)
        return slots if slots + self.state_units <= self.heap.largest_reservation else None

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Reserve for admissions in order until one does not fit; return its index. Running entries have all they need."""
        for i in range(max(first, num_running), last):
            size = int(batch.admission_slots[i])
            address = self.heap.reserve(size + self.state_units)  # state behind the tokens
            if address is None:
                return i
            self.address[batch.row[i]] = address
            self.units_held[batch.row[i]] = size
            self.rounding_slots += self._rounding(size)
        return last

    def free(self, row: int) -> None:
        """Give the reservation of `row` back."""
        size = int(self.units_held[row])
        self.heap.release(int(self.address[row]))
        self.rounding_slots -= self._rounding(size)
        self.address[row] = NOT_HELD
        self.units_held[row] = 0

    def _rounding(self, size: int) -> int:
        taken = size + self.state_units
        return self.heap.rounded(taken) - taken

    @property
    def free_slots(self) -> int:
        """Slots in free extents of the heap."""
        return self.heap.free_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the rows' reservations are exactly what the heap has given out."""
        self.heap.check_integrity()
        rows = np.flatnonzero(self.address != NOT_HELD)
        held = {int(self.address[row]): self.heap.rounded(max(int(self.units_held[row]) + self.state_units, 1)) for row in rows}
        rounding = sum(held.values()) - int(self.units_held.sum()) - rows.size * self.state_units
        one_each = len(held) == rows.size and np.array_equal(rows, np.flatnonzero(self.units_held))
        if not one_each or held != self.heap.reserved() or rounding != self.rounding_slots:
            raise IntegrityError(
                f"addresses {self.address.tolist()} of {self.units_held.tolist()} slots, {self.rounding_slots} lost to rounding; "
                f"the heap has given out {self.heap.reserved()}"
            )
