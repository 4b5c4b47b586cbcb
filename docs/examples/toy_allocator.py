"""A complete allocator to start from: every request gets one of a few areas, each as long as the longest request.

A file like this in pagedkv/allocators/, with the class registered under the file's name, and every command and test knows it.
"""
# ruff: noqa: D102 - `pagedkv.allocation.Allocator` says what each method must do

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.kv_request import KVRequest


class ToyAllocator:
    """Area i holds slots i * unit_slots to (i + 1) * unit_slots - 1; the state of a request lies behind its tokens."""

    name = "toy-allocator"
    placement = "block"
    num_groups = 1
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings) -> None:
        self.max_model_len, self.max_num_seqs = settings.max_model_len, settings.max_num_seqs
        self.num_slots, self.state_slots = settings.num_slots, settings.state_slots
        self.unit_slots = self.max_model_len + self.state_slots
        self.free_areas, self.areas = list(range(self.num_slots // self.unit_slots))[::-1], dict[KVRequest, int]()
        self.usable_slots = len(self.free_areas) * self.unit_slots

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        return self.max_model_len if self.usable_slots else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        return 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=self.num_slots_held(request))
        request.check_length(request.num_computed_tokens + num_new_tokens, self.max_model_len)
        if request not in self.areas:
            request.check_place(len(self.areas), self.max_num_seqs)
            if not self.free_areas:
                return None
            self.areas[request] = self.free_areas.pop()
        return Grant()

    def note_computed(self, request: KVRequest) -> None:
        pass

    def free(self, request: KVRequest) -> None:
        if request not in self.areas:
            raise request.holds_nothing()
        self.free_areas.append(self.areas.pop(request))

    def preempt(self, request: KVRequest) -> None:
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        return tuple(self.areas)

    def num_slots_held(self, request: KVRequest) -> int:
        return self.max_model_len if request in self.areas else 0

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        return np.arange(self.num_slots_held(request)) + self.areas.get(request, 0) * self.unit_slots

    def cached_slots(self) -> Int64Array:
        return NO_SLOTS

    @property
    def num_cached_slots(self) -> int:
        return 0

    @property
    def free_slots(self) -> int:
        return len(self.free_areas) * self.unit_slots

    def check_integrity(self) -> None:
        if sorted([*self.free_areas, *self.areas.values()]) != list(range(self.usable_slots // self.unit_slots)):
            raise IntegrityError(f"areas {list(self.areas.values())} held, {self.free_areas} free: not each once")
