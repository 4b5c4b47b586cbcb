"""Contiguous KV allocation: at admission a request reserves one interval for its whole life. The baselines of PagedAttention."""

from collections.abc import Callable, Sequence

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.heaps import HEAPS
from pagedkv.kv_request import KVRequest


class ContiguousAllocator:
    """Reserves `reservation(prompt_tokens, output_tokens)` adjacent slots at admission, found by the heap of the settings."""

    unit_slots = num_groups = 1

    def __init__(self, name: str, settings: KVPoolSettings, *, reservation: Callable[[int, int], int]) -> None:
        self.name = name
        self.placement = settings.contiguous_heap
        self.heap = HEAPS.load(settings.contiguous_heap)(settings.num_slots)
        self.num_slots = self.usable_slots = settings.num_slots
        self.max_model_len = settings.max_model_len
        self.max_num_seqs = settings.max_num_seqs
        self.state_slots = settings.state_slots
        self.rounding_slots = 0
        self._reservation = reservation
        self._addresses: dict[KVRequest, int] = {}
        """By live request: the first slot of its reservation. Token t lies in slot address + t, the state behind the tokens."""

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return the reservation, or None if the empty heap could not place it."""
        slots = self._reservation(prompt_tokens, output_tokens)
        return slots if slots + self.state_slots <= self.heap.largest_reservation else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return 0: nothing is shared."""
        return 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Reserve `request.admission_slots` at admission; later tokens must lie within them. O(log num_slots) with a buddy heap.

        Raises:
            ConfigError: If the tokens do not fit into its reservation, or all places in the batch are taken.
        """
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=self.num_slots_held(request))
        if request.num_computed_tokens + num_new_tokens > request.admission_slots:
            raise request.error(
                f"{request.num_computed_tokens + num_new_tokens} tokens, but its reservation is {request.admission_slots} slots: "
                "set admission_slots to what the allocator says for its prompt and output"
            )
        if request not in self._addresses:
            request.check_place(len(self._addresses), self.max_num_seqs)
            address = self.heap.reserve(request.admission_slots + self.state_slots)
            if address is None:
                return None
            self._addresses[request] = address
            self.rounding_slots += self._rounding(request)
        return Grant()

    def note_computed(self, request: KVRequest) -> None:
        """Nothing is kept for others."""

    def free(self, request: KVRequest) -> None:
        """Give its reservation back.

        Raises:
            ConfigError: If it has none.
        """
        if request not in self._addresses:
            raise request.holds_nothing()
        self.heap.release(self._addresses.pop(request))
        self.rounding_slots -= self._rounding(request)

    def preempt(self, request: KVRequest) -> None:
        """Give its reservation back; it will start anew."""
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold a reservation."""
        return tuple(self._addresses)

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the length of its reservation."""
        return request.admission_slots if request in self._addresses else 0

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return its interval."""
        return np.arange(self.num_slots_held(request)) + self._addresses.get(request, 0)

    def cached_slots(self) -> Int64Array:
        """Return none."""
        return NO_SLOTS

    def taken_slots(self) -> Int64Array:
        """Return the slots that the heap has given out, rounding included. O(num_slots)."""
        taken = (np.arange(address, address + size) for address, size in self.heap.reserved().items())
        return np.concatenate([NO_SLOTS, *taken])

    @property
    def num_cached_slots(self) -> int:
        """None: see `cached_slots`."""
        return 0

    @property
    def free_slots(self) -> int:
        """Slots in free extents of the heap."""
        return self.heap.free_slots

    def _rounding(self, request: KVRequest) -> int:
        taken = request.admission_slots + self.state_slots
        return self.heap.rounded(taken) - taken

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the requests' reservations are exactly what the heap has given out."""
        self.heap.check_integrity()
        held = {address: self.heap.rounded(r.admission_slots + self.state_slots) for r, address in self._addresses.items()}
        if held != self.heap.reserved() or sum(map(self._rounding, self._addresses)) != self.rounding_slots:
            raise IntegrityError(
                f"reservations {held}, {self.rounding_slots} slots lost to rounding; the heap has given out {self.heap.reserved()}"
            )
