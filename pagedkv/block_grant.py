"""How one block table grows by cached and by new blocks, and parts with shared ones, or stays as it is."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.block_moves import release_blocks, take_blocks, touch_blocks
from pagedkv.free_queue import NULL_BLOCK, NUM_FREE, Blocks, FreeQueue
from pagedkv.jit import lean_jit
from pagedkv.prefix_cache import Buckets, KeyIndex, insert_block

SHORTAGE = -1


class BlockCopy(NamedTuple):
    """The content of one block that is wanted in another."""

    source: int
    destination: int
    num_tokens: int
    """Leading tokens of the block."""

    def slots(self, block_size: int) -> Int64Array:
        """Return the slots to copy, int64 [num_tokens, 2]: source and destination."""
        slots: Int64Array = np.arange(self.num_tokens)[:, None] + np.array((self.source, self.destination)) * block_size
        return slots


@lean_jit
def _is_not_its_own(blocks: Blocks, block: int) -> bool:
    """Return whether a block that its holder does not know to be full must not be written: others hold it, or may find it."""
    return bool(blocks["ref_cnt"][block] > 1 or blocks["next_same"][block] != NULL_BLOCK)


@lean_jit
def count_new_blocks(
    blocks: Blocks,
    queue: FreeQueue,
    table: Int32Array,
    held: int,
    hits: Int32Array,
    num_needed: int,
    num_gated: int,
    num_kept_free: int,
    first_written: int,
) -> int:
    """Return how many blocks `grant_blocks` would take from the queue besides the hits; SHORTAGE if there are too few."""
    num_new = max(num_needed - held - hits.size, 0)
    for i in range(first_written, min(held, num_needed)):
        num_new += _is_not_its_own(blocks, table[i])
    revived = 0
    for block in hits:
        revived += blocks["ref_cnt"][block] == 0
    fits = max(num_gated - held - hits.size, num_new) + revived + num_kept_free <= queue[NUM_FREE]
    return num_new if fits else SHORTAGE


@lean_jit
def grant_blocks(
    blocks: Blocks,
    queue: FreeQueue,
    index: KeyIndex,
    buckets: Buckets,
    table: Int32Array,
    held: int,
    hits: Int32Array,
    num_needed: int,
    num_gated: int,
    num_kept_free: int,
    first_written: int,
    keys: BlockKeys,
    num_registered: int,
    num_full: int,
    replaced: Int32Array,
) -> int:
    """Grow `table` from `held` blocks by `hits` and new blocks to `num_needed`, and put new blocks in place of shared ones.

    Hits that nobody holds leave the free queue, so they need room like new blocks. O(hits + new blocks + newly full blocks).

    Args:
        blocks: The pool.
        queue: Its free queue.
        index: Its prefix cache.
        buckets: The same.
        table: One request's block table.
        held: Blocks in it.
        hits: Cached blocks that come next.
        num_needed: Blocks it must have.
        num_gated: Blocks for which there must be room.
        num_kept_free: Blocks that must stay free.
        first_written: Blocks of the table from this one on, up to `num_needed`, will be written: the request must have them alone.
        keys: Keys of the request's full blocks.
        num_registered: Blocks that carry their key already.
        num_full: Blocks that must carry it afterwards.
        replaced: Takes the replaced blocks and their places, ascending, int32 [2, at least as many as a table has].

    Returns:
        How many were replaced; SHORTAGE if there is too little room: then nothing has changed.
    """
    num_new = count_new_blocks(blocks, queue, table, held, hits, num_needed, num_gated, num_kept_free, first_written)
    if num_new == SHORTAGE:
        return SHORTAGE
    touch_blocks(blocks, queue, hits)
    for i in range(hits.size):
        table[held + i] = hits[i]
    num_replaced = 0
    for i in range(first_written, min(held, num_needed)):
        if _is_not_its_own(blocks, table[i]):
            replaced[0, num_replaced], replaced[1, num_replaced] = table[i], i
            num_replaced += 1
            take_blocks(blocks, queue, index, buckets, 1, table, i)
    take_blocks(blocks, queue, index, buckets, num_new - num_replaced, table, held + hits.size)
    if num_replaced > 0:
        release_blocks(blocks, queue, replaced[0], num_replaced)
    for i in range(num_registered, num_full):
        if blocks["next_same"][table[i]] == NULL_BLOCK:  # one shared when it was full already may carry its key
            insert_block(blocks, index, buckets, table[i], keys, i)
    return num_replaced
