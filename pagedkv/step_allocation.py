"""The contract between a scheduler and an allocator: one batched call per step.

The scheduler writes what it would like to run into a `StepBatch`; the allocator grants slots in that order and stops at the first
entry that does not fit now. A row is a place in the running batch; a request owns one from admission until it finishes or is
preempted. Every allocator of the registry can be driven so; paged blocks, contiguous intervals, reserved or growing, vAttention's
pages and TensorRT-LLM's reusable blocks have compiled code for it.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from pagedkv.allocation import Allocator, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.contiguous_growing import ContiguousGrowingAllocator
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.allocators.vattention import VAttentionAllocator
from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.contiguous_allocator import ContiguousAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.growing_steps import GrowingStepAllocator
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.interval_steps import IntervalStepAllocator
from pagedkv.kv_request import KVRequest
from pagedkv.offload_steps import OffloadStepAllocator
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.reuse_steps import ReuseStepAllocator
from pagedkv.step_batch import StepBatch
from pagedkv.virtual_steps import VirtualStepAllocator


class RowMemory(Protocol):
    """What a running batch holds, row by row, as far as somebody who watches must know."""

    name: str
    """Of the allocator, in the registry."""
    placement: str
    """How it finds room: see `Allocator.placement`."""
    usable_slots: int
    """Slots that requests can get: the denominator of every share."""
    max_model_len: int
    """Longest request, in tokens, that its tables have room for."""
    unit_slots: int
    """Slots in one unit of `units_held`: the block size, or 1."""
    units_held: Int32Array
    """Units that each row holds for tokens now, by row."""
    state_units: int
    """Units that each running request holds for its state besides."""

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""

    @property
    def rounding_slots(self) -> int:
        """Slots lost to the heap's rounding of live reservations."""

    def check_integrity(self) -> None:
        """Raise IntegrityError, with the state dumped, if an invariant is broken."""


class StepAllocator(RowMemory, Protocol):
    """Hands out KV slots, a step at a time. A shortage is a value, and the entry that is refused changes nothing."""

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return the slots to take in one piece at admission, 0 if the request grows step by step, None if it can never fit."""

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Grant slots to entries `first` to `last` of `batch`, in order, until one does not fit.

        Args:
            batch: The step; entries from `num_running` on are admissions.
            first: First entry to serve.
            last: One past the last entry to serve.
            num_running: How many entries run already.

        Returns:
            The index of the first entry not served: `last` if all were.
        """

    def free(self, row: int) -> None:
        """Take back all that `row` holds."""


@runtime_checkable
class CompiledMemory(RowMemory, Protocol):
    """Memory whose `arrays` and `rules` are of a kind that compiled code knows: `pagedkv.step_memory`."""

    arrays: Any
    rules: Any
    lookahead_slots: int
    """Slots that a request may take beyond its known tokens, for drafts."""

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""


class RequestByRequest:
    """Drives an allocator entry by entry: the plain path, for those without compiled code of their own.

    It owns a `KVRequest` for each row from admission until the row is freed; who was preempted comes again as a new one. Requests
    bring neither tokens nor keys, so that nothing is shared. A step is taken to be computed when its request asks again or ends.
    """

    unit_slots = 1

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self.name, self.placement = allocator.name, allocator.placement
        self.usable_slots, self.max_model_len = allocator.usable_slots, allocator.max_model_len
        self.state_units = allocator.state_slots
        self.units_held: Int32Array = np.zeros(allocator.max_num_seqs, np.int32)
        self.admission_slots = allocator.admission_slots
        self._requests: list[KVRequest | None] = [None] * allocator.max_num_seqs
        self._num_slots: Int64Array = np.zeros(allocator.max_num_seqs, np.int64)
        """By row: tokens that have slots; its `KVRequest` hears of them when the allocator is asked again."""
        self._in_units = allocator.unit_slots > 1

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Grant slots in order until one entry does not fit; return its index. What a row holds already needs no call."""
        rows, slots = batch["row"][first:last], batch["num_slots_needed"][first:last]
        if self._in_units:
            asks = first + np.flatnonzero(slots > self.units_held[rows])
        else:  # who has taken all in one piece asks no more
            asks = first + np.flatnonzero((self.units_held[rows] == 0) | (batch["admission_slots"][first:last] == 0))
        for i in asks.tolist():
            if not self._ask(batch[i].item(), has_scheduled_reqs=i > 0):
                self._num_slots[rows[: i - first]] = slots[: i - first]
                return i
        self._num_slots[rows] = slots
        return last

    def _ask(self, entry: tuple[int, ...], *, has_scheduled_reqs: bool) -> bool:
        """Ask for the slots of one entry; return whether it gets them."""
        index, num_new, num_slots, num_known, admission_slots, _, row = entry
        request = self._requests[row]
        if request is None:
            request = KVRequest(request_id=index, num_tokens=num_known, admission_slots=admission_slots)
        elif request.admission_slots > 0:
            return True
        else:
            self._tell(row, request)
            request.num_tokens = num_known
        granted = self.allocator.allocate_slots(request, num_new, has_scheduled_reqs=has_scheduled_reqs)
        if granted is None:
            return False
        self.units_held[row] = self.allocator.num_slots_held(request)
        self._requests[row] = request
        request.num_computed_tokens = num_slots
        return True

    def _tell(self, row: int, request: KVRequest) -> None:
        """Let `request` and the allocator hear of the tokens that were computed since they were asked."""
        request.num_computed_tokens = int(self._num_slots[row])
        request.num_tokens = max(request.num_tokens, request.num_computed_tokens)
        self.allocator.note_computed(request)

    def up_to_date(self) -> Allocator:
        """Return the allocator, after its requests have heard of all tokens that have slots."""
        for row, request in enumerate(self._requests):
            if request is not None:
                self._tell(row, request)
        return self.allocator

    def free(self, row: int) -> None:
        """Take back all that `row` holds. Its last step is computed."""
        request = self._requests[row]
        if request is not None:
            self._tell(row, request)
            self.allocator.free(request)
            self._requests[row] = None
            self.units_held[row] = self._num_slots[row] = 0

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return self.allocator.free_slots

    @property
    def rounding_slots(self) -> int:
        """Slots lost to the heap's rounding of live reservations."""
        return self.allocator.rounding_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows and allocator agree on who holds how much."""
        self.allocator.check_integrity()
        held = [0 if request is None else self.allocator.num_slots_held(request) for request in self._requests]
        if self.units_held.tolist() != held or len(self.allocator.live_requests()) != sum(r is not None for r in self._requests):
            raise IntegrityError(f"rows hold {self.units_held.tolist()} slots, the allocator says {held}")


def step_allocator(name: str, settings: KVPoolSettings) -> StepAllocator:
    """Return the allocator `name` for a scheduler: its compiled code where there is some, else the plain path.

    Raises:
        ConfigError: If there is no such allocator, or a setting asks for what is not done step by step: prefixes shared by others
            than `paged`, `paged-offload` and `hybrid`, hits inside a block, or another eviction than lru. Request by request, the
            allocators do these.
    """
    if settings.prefix_match_unit or settings.eviction != "lru":
        raise ConfigError(
            f"a scheduler drives whole blocks and lru: prefix-match-unit is {settings.prefix_match_unit}, needs 0, and eviction "
            f"{settings.eviction!r}, needs 'lru'"
        )
    for kind in (PagedStepAllocator, OffloadStepAllocator, HybridStepAllocator):
        if name == kind.name:
            return kind(settings)
    if settings.enable_prefix_caching:
        raise ConfigError(
            f"a scheduler shares prefixes in paged or hybrid memory only: {name} needs enable_prefix_caching off here"
        )
    allocator = ALLOCATORS.load(name)(settings)
    if isinstance(allocator, ContiguousAllocator):
        return IntervalStepAllocator(allocator)
    if isinstance(allocator, ContiguousGrowingAllocator):
        return GrowingStepAllocator(allocator)
    if isinstance(allocator, VAttentionAllocator):
        return VirtualStepAllocator(allocator)
    if isinstance(allocator, TensorRTLLMAllocator):
        return ReuseStepAllocator(allocator)
    return RequestByRequest(allocator)
