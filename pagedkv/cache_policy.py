"""What a pool keeps for reuse beyond vLLM's default: another eviction policy, and prefixes that end inside a block."""

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.block_eviction import BlockEviction
from pagedkv.block_grant import SHORTAGE, BlockCopy, count_new_blocks
from pagedkv.block_moves import release_blocks, touch_blocks
from pagedkv.block_pool import BlockPool
from pagedkv.grant_plan import Growth
from pagedkv.kv_request import KVRequest
from pagedkv.partial_tails import CachedTail, PartialTails


class CachePolicy:
    """Goes along with every grant and every release of a `KVCacheManager` whose settings ask for more than lru and full blocks."""

    def __init__(self, pool: BlockPool, settings: KVPoolSettings) -> None:
        self._pool = pool
        self._eviction: BlockEviction | None = None
        """None: what stands first in the free queue goes first."""
        if settings.eviction != "lru":
            self._eviction = BlockEviction(pool, block_size=settings.block_size, eviction=settings.eviction)
        self.tails: PartialTails | None = None
        """None: hits end with a block."""
        if 0 < settings.prefix_match_unit < settings.block_size:
            self.tails = PartialTails(
                num_blocks=settings.num_blocks,
                block_size=settings.block_size,
                unit=settings.prefix_match_unit,
                max_num_seqs=settings.max_num_seqs,
            )

    def make_room(self, growth: Growth, tail: CachedTail | None, *, num_states: int, priority: int) -> bool:
        """See that the blocks that a grant will take may lose their content; if it does not fit, change nothing and return False.

        The source of a tail is held until `granted`, if there is room besides; else it becomes the first block to be taken, with
        its content: then nothing need be copied.
        """
        pool, source = self._pool, np.array([] if tail is None else [tail.block], np.int32)
        idle_sources = int((pool.ref_cnt[source] == 0).sum())
        num_kept_free = growth.num_kept_free + idle_sources
        wanted = count_new_blocks(pool.blocks, pool.queue, *growth._replace(num_kept_free=num_kept_free))
        taken_over = wanted == SHORTAGE and idle_sources > 0
        if taken_over:
            wanted = count_new_blocks(pool.blocks, pool.queue, *growth)
        if wanted == SHORTAGE:
            return False
        touch_blocks(pool.blocks, pool.queue, source)
        if self._eviction is not None:
            self._eviction.used(np.concatenate((growth.hits, source)), priority)
            self._eviction.make_room(wanted + num_states - taken_over)
        if taken_over:
            if pool.blocks["next_same"][source[0]]:
                pool.cache.remove(source[0])
            if self._eviction is not None:
                self._eviction.removed(source)
            release_blocks(pool.blocks, pool.queue, source, source.size)
        return True

    def granted(
        self,
        request: KVRequest,
        row: int,
        growth: Growth,
        tail: CachedTail | None,
        *,
        registered: tuple[int, int],
        replaced: Int32Array,
        states: Int32Array,
    ) -> tuple[BlockCopy, ...]:
        """Hear what came of a grant that `make_room` prepared; return what is to be copied for `tail`.

        Args:
            request: Who got it.
            row: Its row.
            growth: What it asked for.
            tail: The hit inside a block.
            registered: The first and the last (exclusive) of the blocks that carry a key now and may not have done before.
            replaced: The replaced blocks and their places, [2, blocks].
            states: Blocks taken for its state.
        """
        table, num_hits = growth.table, growth.hits.size
        if self._eviction is not None:
            self._eviction.registered(table, *registered, request.priority)
            self._eviction.released(replaced[0])
        if self.tails is not None:
            if not growth.held:
                self.tails.start(row)
            taken = np.concatenate((table[growth.held + num_hits : growth.num_needed], table[replaced[1]], states))
            self.tails.granted(row, first_written=growth.first_written, taken=taken)
        if tail is None or table[num_hits] == tail.block:
            return ()
        source = np.array([tail.block], np.int32)
        release_blocks(self._pool.blocks, self._pool.queue, source, source.size)
        self.released(source)
        return (BlockCopy(tail.block, int(table[num_hits]), tail.num_tokens),)

    def released(self, blocks: Int32Array) -> None:
        """Hear that `blocks` are held once less."""
        if self._eviction is not None:
            self._eviction.released(blocks)

    def clear(self) -> None:
        """Begin anew: no block carries a key, and none is held."""
        if self._eviction is not None:
            self._eviction.clear()
        if self.tails is not None:
            self.tails.clear()

    def idle_tail_slots(self) -> Int64Array:
        """Return the slots of units that can be found in blocks that nobody holds. O(entries)."""
        return NO_SLOTS if self.tails is None else self.tails.slots(self._pool.ref_cnt == 0)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless it agrees with the pool. O(num_blocks)."""
        if self._eviction is not None:
            self._eviction.check_integrity()
        if self.tails is not None:
            self.tails.check_integrity()
