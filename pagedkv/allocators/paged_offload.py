"""PagedAttention with a second tier: what leaves the prefix cache goes to host memory or NVMe, and comes back on a hit."""

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.arrays import Int64Array
from pagedkv.block_table import block_slots
from pagedkv.errors import ConfigError
from pagedkv.events import BlockRemoved, CacheCleared, Event, EventSink, Key, key_bytes
from pagedkv.kv_request import KVRequest
from pagedkv.offload_tier import OffloadTier, TierKind


@ALLOCATORS.register("paged-offload")
class PagedOffloadAllocator(PagedAllocator):
    """The paged allocator and an `OffloadTier` of `offload_blocks` blocks; with prefix caching that must be 1 or more.

    Where the cached prefix of a request ends in the pool, the lookup goes on in the tier. Blocks found there are loaded into new
    blocks, which count as cached, and carry their key in the pool from then on. Blocks that lose their key because they are handed
    out again are offloaded before anything is written there, unless another block of the pool carries the same key.

    Slots of the tier are numbered from num_slots on and occur in `Grant.copies` only. The copies of one grant come in this order:
    to the tier, within the pool, from the tier.
    """

    name = "paged-offload"

    def __init__(
        self,
        settings: KVPoolSettings,
        *,
        kind: TierKind = "host",
        tier_eviction: str = "lru",
        block_bytes: int | None = None,
        unified_memory: bool = False,
    ) -> None:
        """Make an empty pool and an empty tier; see `OffloadTier` for what a tier is told.

        Raises:
            ConfigError: Also if a prefix cache is to have a tier of no blocks.
        """
        if settings.enable_prefix_caching and not settings.offload_blocks:
            raise ConfigError("offload-blocks is 0: paged-offload needs 1 or more; paged is the allocator without a second tier")
        super().__init__(settings)
        self.tier = OffloadTier(
            num_blocks=settings.offload_blocks,
            block_bytes=block_bytes,
            kind=kind,
            eviction=tier_eviction,
            unified_memory=unified_memory,
        )
        self.events: EventSink | None = None
        """Hears what the pool tells, see `pagedkv.events.Observable`."""
        self._removed: list[tuple[int, Key]] = []
        """Within an allocation: the blocks that lost their key, and the key."""
        self.manager.events = self._hear

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the tokens in the longest run of its full blocks, first in the pool, then in the tier. O(hits)."""
        tokens, found = self._find(request)
        return tokens + len(found) * self.unit_slots if found else super().get_computed_tokens(request)

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take blocks as tokens come, and copy what must leave and what comes back. O(hits + blocks taken * log of the tier)."""
        found = [] if self.manager.block_table(request).size else self._find(request)[1]
        if found:
            grant = self._load(request, num_new_tokens, found, has_scheduled_reqs=has_scheduled_reqs)
        else:
            grant = super().allocate_slots(request, num_new_tokens, has_scheduled_reqs=has_scheduled_reqs)
        if grant is None:
            return None
        offloads = self._offload(pinned=frozenset(found))
        return grant._replace(copies=np.concatenate((offloads, grant.copies))) if offloads.size else grant

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the pool and the tier are sound."""
        super().check_integrity()
        self.tier.check_integrity()

    def _find(self, request: KVRequest) -> tuple[int, list[int]]:
        """Return the tokens that the pool has in full blocks, and the blocks of the tier that go on."""
        hits, tokens = self.manager.get_computed_blocks(request)
        if not len(self.tier):
            return tokens, []
        return tokens, self.tier.lookup(key_bytes(request.block_keys[hits.size : (request.num_tokens - 1) // self.unit_slots]))

    def _load(self, request: KVRequest, num_new_tokens: int, found: list[int], *, has_scheduled_reqs: bool) -> Grant | None:
        """Admit `request` with its hits and what was `found` in the tier."""
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=0)
        hits, tokens = self.manager.get_computed_blocks(request)
        loaded = len(found) * self.unit_slots
        taken = self.manager.allocate_slots(request, num_new_tokens + loaded, hits, has_scheduled_reqs=has_scheduled_reqs)
        if taken is None:
            return None
        self.tier.load(found)
        sources = self._tier_slots(found)
        return Grant(tokens + loaded, np.stack((sources, block_slots(taken[: len(found)], self.unit_slots)), axis=1))

    def _offload(self, *, pinned: frozenset[int]) -> Int64Array:
        """Give the content of removed blocks a place in the tier; return the slots to copy."""
        cache, sources, targets = self.manager.pool.cache, [], []
        for block, key in self._removed:
            if not cache.lookup(np.frombuffer(key, np.uint64).reshape(1, 2)).size:
                place = self.tier.store(key, pinned=pinned)
                if place is not None:
                    sources.append(block)
                    targets.append(place)
        self._removed.clear()
        return np.stack((block_slots(sources, self.unit_slots), self._tier_slots(targets)), axis=1)

    def _tier_slots(self, tier_blocks: list[int]) -> Int64Array:
        return block_slots(tier_blocks, self.unit_slots) + self.num_slots

    def _hear(self, event: Event) -> None:
        if isinstance(event, BlockRemoved):
            self._removed += zip(event.blocks, event.keys, strict=True)
        elif isinstance(event, CacheCleared):
            self.tier.clear()
        if self.events is not None:
            self.events(event)
