"""Contiguous without foresight: a request holds one interval that grows with it, and is moved when its neighbour is in the way.

What a tensor per request that is enlarged as it fills would do in a fixed pool. It wastes as little as paging; it pays in slots
moved instead, and with memory nearly full nearly every growth moves somebody.
"""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.growing_heap import GrowingHeap
from pagedkv.kv_request import KVRequest


@ALLOCATORS.register("contiguous-growing")
class ContiguousGrowingAllocator:
    """An interval is as long as its tokens, rounded up to block_size: token t lies in slot start + state_slots + t.

    Growing token by token, a request whose neighbour is in the way would move at every step. With steps of block_size it takes what
    a paged allocator takes, token for token, and has as many steps to rest between two growths: what differs is contiguity alone.

    A move copies the interval as a whole, state and unfilled end included. It changes the slots of requests other than the one
    that grows: the copies are in the grant of the one that grows.
    """

    name = "contiguous-growing"
    placement = "growing"
    unit_slots = num_groups = 1
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings) -> None:
        self.heap = GrowingHeap(settings.num_slots, num_places=settings.max_num_seqs)
        self.num_slots = self.usable_slots = settings.num_slots
        self.max_model_len = settings.max_model_len
        self.max_num_seqs = settings.max_num_seqs
        self.state_slots = settings.state_slots
        self.block_size = settings.block_size
        self.watermark_slots = int(settings.watermark * settings.num_blocks) * settings.block_size
        self.reserve_full_isl = settings.reserve_full_isl
        self._places: dict[KVRequest, int] = {}
        """By live request: the place of its interval in the heap: its state, then its tokens, then what is unfilled."""
        self._free_places = list(range(settings.max_num_seqs))

    @property
    def moved_slots(self) -> int:
        """Slots copied so far, to count as bytes read and written."""
        return self.heap.moved_slots

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if it is longer than max_model_len or even the empty heap is too small."""
        tokens = prompt_tokens + output_tokens - 1
        return 0 if tokens <= self.max_model_len and self._size(tokens) <= self.num_slots else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return 0: nothing is shared."""
        return 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Let its interval grow as tokens come. O(live requests + slots moved), O(1) if it is long enough.

        Refused only if too few slots are free, wherever they are.

        Raises:
            ConfigError: If the tokens go beyond max_model_len, or all places in the batch are taken.
        """
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=self.num_slots_held(request))
        tokens = request.num_computed_tokens + num_new_tokens
        request.check_length(tokens, self.max_model_len)
        size, place = self._size(tokens), self._places.get(request)
        if place is None:
            request.check_place(len(self._places), self.max_num_seqs)
            gated = max(size, self._size(request.num_tokens)) if self.reserve_full_isl else size
            if gated + (self.watermark_slots if has_scheduled_reqs else 0) > self.heap.free_slots:
                return None
            place = self._places[request] = self._free_places.pop()
        elif size <= self.heap.interval(place)[1]:
            return Grant()
        copies = self.heap.grow(place, size)
        return None if copies is None else Grant(copies=copies)

    def note_computed(self, request: KVRequest) -> None:
        """Nothing is kept for others."""

    def free(self, request: KVRequest) -> None:
        """Give its interval back. O(live requests).

        Raises:
            ConfigError: If it has none.
        """
        if request not in self._places:
            raise request.holds_nothing()
        place = self._places.pop(request)
        self.heap.release(place)
        self._free_places.append(place)

    def preempt(self, request: KVRequest) -> None:
        """Give its interval back; it will start anew."""
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that have an interval."""
        return tuple(self._places)

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots of its interval that are for tokens."""
        place = self._places.get(request)
        return 0 if place is None else self.heap.interval(place)[1] - self.state_slots

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return them. They are others after somebody's grant with copies."""
        place = self._places.get(request)
        if place is None:
            return NO_SLOTS
        start, size = self.heap.interval(place)
        return np.arange(start + self.state_slots, start + size)

    def cached_slots(self) -> Int64Array:
        """Return none."""
        return NO_SLOTS

    def taken_slots(self) -> Int64Array:
        """Return the slots of all intervals, state included. O(num_slots)."""
        return np.concatenate([NO_SLOTS, *(np.arange(start, start + size) for start, size in self.heap.intervals())])

    @property
    def num_cached_slots(self) -> int:
        """None: see `cached_slots`."""
        return 0

    @property
    def free_slots(self) -> int:
        """Slots in no interval."""
        return self.heap.free_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the heap is sound and its intervals are exactly those of the live requests."""
        self.heap.check_integrity()
        held = sorted(self._places.values())
        if held != np.flatnonzero(self.heap.arrays.size).tolist() or sorted(held + self._free_places) != [
            *range(self.max_num_seqs)
        ]:
            raise IntegrityError(f"requests hold the intervals of {held}, the heap has {self.heap.intervals()}")

    def _size(self, tokens: int) -> int:
        return self.state_slots + -(-tokens // self.block_size) * self.block_size
