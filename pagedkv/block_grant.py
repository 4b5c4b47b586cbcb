"""How one block table grows by cached and by new blocks, or not at all."""

from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockKeys
from pagedkv.block_moves import register_blocks, take_blocks, touch_blocks
from pagedkv.free_queue import NUM_FREE, Blocks, FreeQueue
from pagedkv.jit import jit
from pagedkv.prefix_cache import Buckets, KeyIndex


@jit
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
    keys: BlockKeys,
    num_registered: int,
    num_full: int,
) -> bool:
    """Grow `table` from `held` blocks by `hits` and new blocks to `num_needed`; on a shortage change nothing and return False.

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
        keys: Keys of the request's full blocks.
        num_registered: Blocks that carry their key already.
        num_full: Blocks that must carry it afterwards.
    """
    revived = 0
    for block in hits:
        revived += blocks["ref_cnt"][block] == 0
    num_new = max(num_needed - held - hits.size, 0)
    num_gated = max(num_gated - held - hits.size, num_new)
    if num_gated + revived + num_kept_free > queue[NUM_FREE]:
        return False
    touch_blocks(blocks, queue, hits)
    for i in range(hits.size):
        table[held + i] = hits[i]
    take_blocks(blocks, queue, index, buckets, num_new, table, held + hits.size)
    register_blocks(blocks, index, buckets, table, keys, num_registered, num_full)
    return True
