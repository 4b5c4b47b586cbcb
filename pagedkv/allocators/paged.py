"""PagedAttention's allocator: a request grows block by block, its blocks lie anywhere, and full blocks can be shared.

vLLM's semantics: see `pagedkv.kv_cache_manager`, which has them in vLLM's own words.
"""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import NO_COPIES, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_BLOCKS, Int64Array
from pagedkv.block_table import block_slots
from pagedkv.free_queue import NUM_KEYED
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest


@ALLOCATORS.register("paged")
class PagedAllocator:
    """One pool of blocks of `block_size` slots; slot = block * block_size + offset."""

    name = "paged"
    placement = "block"
    num_groups = 1
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings) -> None:
        self.manager = KVCacheManager(settings, enable_caching=settings.enable_prefix_caching)
        self.num_slots = settings.num_slots
        self.usable_slots = settings.num_slots - settings.block_size
        self.max_model_len = settings.max_model_len
        self.max_num_seqs = settings.max_num_seqs
        self.unit_slots = settings.block_size
        self.state_slots = self.manager.num_state_blocks * settings.block_size

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if even the empty pool is too small."""
        slots = -(-(prompt_tokens + output_tokens - 1) // self.unit_slots) * self.unit_slots + self.state_slots
        return 0 if slots <= self.usable_slots else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the tokens in the longest cached run of its full blocks, and in what is cached of the next one. O(hits)."""
        hits, num_cached = self.manager.get_computed_blocks(request)
        tail = self.manager.get_computed_tail(request, hits.size)
        return num_cached if tail is None else num_cached + tail.num_tokens

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take blocks as tokens come. O(hits + blocks taken + blocks filled)."""
        manager, hits, num_cached, tail = self.manager, NO_BLOCKS, 0, None
        if not manager.holds_blocks(request):
            hits, num_cached = manager.get_computed_blocks(request)
            tail = manager.get_computed_tail(request, hits.size)
            num_cached += 0 if tail is None else tail.num_tokens
        taken = manager.allocate_slots(request, num_new_tokens, hits, computed_tail=tail, has_scheduled_reqs=has_scheduled_reqs)
        if taken is None:
            return None
        copies = manager.take_copies()
        return Grant(num_cached, np.concatenate([copy.slots(self.unit_slots) for copy in copies]) if copies else NO_COPIES)

    def note_computed(self, request: KVRequest) -> None:
        """Full blocks are findable from the moment their slots are given, as in vLLM; their beginnings from now on."""
        self.manager.note_computed(request)

    def fork(self, parent: KVRequest, child: KVRequest) -> None:
        """Let `child` hold the blocks of `parent` too. Who first writes into one gets a copy of it; the last has it for itself.

        Raises:
            ConfigError: Also if the keys differ, all rows are in use, or requests have a state of fixed size.
        """
        self.manager.fork(parent, child)

    def free(self, request: KVRequest) -> None:
        """Give its blocks back: unhashed ones to the front of the free queue, hashed ones to the back."""
        self.manager.free(request)

    def preempt(self, request: KVRequest) -> None:
        """Give its blocks back; what is not reused until it comes again, it finds."""
        self.manager.preempt(request)

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold blocks."""
        return self.manager.live_requests()

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots of its blocks."""
        return self.manager.block_table(request).size * self.unit_slots

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots of its blocks."""
        return block_slots(self.manager.block_table(request), self.unit_slots)

    def cached_slots(self) -> Int64Array:
        """Return the slots of blocks that carry a key and that nobody holds, and of the beginnings of others that can be found."""
        pool, policy = self.manager.pool, self.manager.policy
        keyed = pool.cache.blocks()
        slots = block_slots(keyed[pool.ref_cnt[keyed] == 0], self.unit_slots)
        return slots if policy is None else np.union1d(slots, policy.idle_tail_slots())

    def taken_slots(self) -> Int64Array:
        """Return the slots of the blocks that somebody holds, for tokens or for state. O(num_slots)."""
        return block_slots(np.flatnonzero(self.manager.pool.ref_cnt), self.unit_slots)

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are. O(1), but with hits inside a block as costly as these."""
        if self.manager.policy is not None:
            return self.cached_slots().size
        return int(self.manager.pool.queue[NUM_KEYED]) * self.unit_slots

    @property
    def free_slots(self) -> int:
        """Slots in the free queue."""
        return self.manager.num_free_blocks * self.unit_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pool, tables and keys fit together."""
        self.manager.check_integrity()
