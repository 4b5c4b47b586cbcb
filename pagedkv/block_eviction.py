"""Eviction from a pool by another policy than the order of its free queue."""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.block_pool import BlockPool
from pagedkv.errors import IntegrityError
from pagedkv.eviction_order import EvictionOrder
from pagedkv.free_queue import FIRST, HEAD, NULL_BLOCK, SPAN, Blocks, FreeQueue
from pagedkv.jit import jit


@jit
def _count_keyless(blocks: Blocks, queue: FreeQueue, most: int) -> int:
    """Return how many blocks without a key are handed out before the first one with a key, if `most` or fewer. O(most)."""
    head, found = queue[HEAD], 0
    for _ in range(queue[SPAN]):
        block = queue[FIRST + head]
        head = head + 1 if head + 1 < queue.size - FIRST else 0
        if found == most or blocks["next_same"][block] != NULL_BLOCK:
            break
        found += block != NULL_BLOCK
    return found


class BlockEviction:
    """Tells an `EvictionOrder` what happens to the blocks of a pool, and evicts what it names.

    Blocks without a key stand before those with one in the free queue, and are handed out first. When they do not suffice, the
    victims lose their keys, and so stand before them.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, eviction: str) -> None:
        """Make the eviction of `pool`.

        Raises:
            ConfigError: If there is no policy `eviction`.
        """
        self._pool, self._block_size, self._eviction = pool, block_size, eviction
        self.clear()

    def clear(self) -> None:
        """Begin anew: no block carries a key."""
        self._order = EvictionOrder(num_blocks=self._pool.num_blocks, block_size=self._block_size, eviction=self._eviction)

    def used(self, blocks: Int32Array, priority: int) -> None:
        """Hear that `blocks` are held once more, or will be before any block is taken: no victims."""
        self._order.used(blocks, priority)

    def make_room(self, num_blocks: int) -> None:
        """See that the next `num_blocks` of the free queue carry no key; so many that are not in use are there."""
        num_victims = num_blocks - _count_keyless(self._pool.blocks, self._pool.queue, num_blocks)
        if num_victims > 0:
            victims = self._order.victims(num_victims)
            self._pool.evict(victims)
            self._order.removed(victims)

    def removed(self, blocks: Int32Array) -> None:
        """Hear that `blocks`, in use, lost their keys."""
        self._order.removed(blocks)

    def registered(self, table: Int32Array, first: int, last: int, priority: int) -> None:
        """Hear that table[first:last] carry keys now; leading ones may have carried them before."""
        first += int((self._order.records.created[table[first:last]] > 0).sum())
        if first < last:
            self._order.stored(table[first:last], first * self._block_size, priority, before=table[:first])

    def released(self, blocks: Int32Array) -> None:
        """Hear that `blocks` are held once less."""
        self._order.released(blocks[self._pool.ref_cnt[blocks] == 0])

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the order knows who carries a key and who is free, and the queue fits. O(num_blocks)."""
        self._order.check_integrity()
        queue = self._pool.free_queue()
        carries = self._pool.blocks["next_same"][queue] > 0
        if (carries[:-1] & ~carries[1:]).any():
            raise IntegrityError(f"a block with a key goes before one without: queue {queue.tolist()}, keys {carries.tolist()}")
        keyed, records = self._pool.cache.blocks(), self._order.records
        free = keyed[self._pool.ref_cnt[keyed] == 0]
        if not np.array_equal(np.flatnonzero(records.created), keyed) or not np.array_equal(np.flatnonzero(records.free), free):
            raise IntegrityError(
                f"blocks {keyed.tolist()} carry a key, {free.tolist()} of them are free; the eviction order says "
                f"{np.flatnonzero(records.created).tolist()} and {np.flatnonzero(records.free).tolist()}"
            )
