"""One pool for layers that cache differently: a table per group of layers, and windows that give back what they have left behind.

vLLM's semantics: see `pagedkv.hybrid_cache_manager`, which has them in vLLM's own words, and `pagedkv.layer_groups` for the groups.
"""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import NO_SLOT, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.block_table import block_slots
from pagedkv.free_queue import NULL_BLOCK, NUM_KEYED
from pagedkv.hybrid_cache_manager import HybridCacheManager
from pagedkv.hybrid_layout import hybrid_layout
from pagedkv.kv_request import KVRequest


@ALLOCATORS.register("hybrid")
class HybridAllocator:
    """Blocks of one pool for all groups of layers.

    A block is a page of one group: `num_blocks` of them have `unit_slots` slots each, those of the group with the longest blocks;
    slot = block * unit_slots + offset. Pages of groups with shorter blocks leave slots unused, which `slots_held` lists at the end.
    free_slots + the slots held in all groups + state_slots per live request = usable_slots.

    Groups come from `layer_groups` of the settings, which must have some.

    State layers: with prefix caching a group like others, which keeps the state of the last block boundary; without it a page per
    request, which counts as `state_slots`. `state_slots` of the settings, for state that no layer group tells of, are such pages
    too, and nothing is shared then: a request cannot begin behind a prefix whose state is not kept.

    A refusal changes nothing but this: what has left a window is given back before.
    """

    name = "hybrid"
    placement = "block"
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings) -> None:
        """Make an empty pool.

        Raises:
            ConfigError: If there are no layer groups, or both they and `state_slots` tell of state.
        """
        layout = hybrid_layout(settings)
        self.unit_slots, self.num_groups = layout.unit_slots, len(layout.token_rules)
        self.manager = HybridCacheManager(
            settings,
            layout.rules,
            enable_caching=settings.enable_prefix_caching,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )
        self.state_slots = layout.num_state_blocks * self.unit_slots
        self.num_slots = settings.num_blocks * self.unit_slots
        self.usable_slots = self.num_slots - self.unit_slots
        self.max_model_len = settings.max_model_len
        self.max_num_seqs = settings.max_num_seqs

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if the empty pool is too small for what the request holds at its peak, or it is too long.

        Only max_num_batched_tokens bounds what windows hold: without it all tokens could come in one step, after a preemption.
        """
        tokens = prompt_tokens + output_tokens - 1
        fits = tokens <= self.max_model_len and self.manager.peak_blocks(tokens) * self.unit_slots <= self.usable_slots
        return 0 if fits else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the tokens of the longest prefix that all groups have. O(groups * hits)."""
        return self.manager.get_computed_blocks(request)[1]

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take blocks as tokens come, in every group or in none. O(groups + hits + blocks taken, filled and given back)."""
        hits: tuple[Int32Array, ...] = ()
        num_cached = 0
        if not self.manager.block_table(request).size:
            hits, num_cached = self.manager.get_computed_blocks(request)
        taken = self.manager.allocate_slots(request, num_new_tokens, hits, has_scheduled_reqs=has_scheduled_reqs)
        return None if taken is None else Grant(num_cached_tokens=num_cached)

    def note_computed(self, request: KVRequest) -> None:
        """Nothing to do: blocks are findable from the moment their slots are given, as in vLLM."""

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
        """Return the slots of its pages in all groups, not those of its state."""
        held = self.manager.num_blocks_held(request) * self.unit_slots
        return held - self.state_slots if held else 0

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots of its tokens in a group, then those that its pages leave unused.

        NO_SLOT stands for tokens whose block was given back, and for those whose state no step left behind.
        """
        if not self.num_groups:
            return NO_SLOTS
        return group_slots(self.manager.block_table(request, group), self.manager.rules[group].block_size, self.unit_slots)

    def cached_slots(self) -> Int64Array:
        """Return the slots of pages that carry a key and that nobody holds."""
        pool = self.manager.pool
        keyed = pool.cache.blocks()
        return block_slots(keyed[pool.ref_cnt[keyed] == 0], self.unit_slots)

    def taken_slots(self) -> Int64Array:
        """Return the slots of the pages that somebody holds, for tokens or for state. O(num_slots)."""
        return block_slots(np.flatnonzero(self.manager.pool.ref_cnt), self.unit_slots)

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return int(self.manager.pool.queue[NUM_KEYED]) * self.unit_slots

    @property
    def free_slots(self) -> int:
        """Slots in the free queue."""
        return self.manager.num_free_blocks * self.unit_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pool, tables and keys fit together."""
        self.manager.check_integrity()


def group_slots(table: Int32Array, block_size: int, unit_slots: int) -> Int64Array:
    """Return the slots of the tokens in a group's `table`, NO_SLOT where a block is null, then those that pages leave unused."""
    tokens = block_slots(table, unit_slots, 0, block_size)
    tokens[np.repeat(table == NULL_BLOCK, block_size)] = NO_SLOT
    return np.concatenate((tokens, block_slots(table[table != NULL_BLOCK], unit_slots, block_size)))
