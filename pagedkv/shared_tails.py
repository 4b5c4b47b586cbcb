"""The last blocks of forks, partly filled and shared: who writes there first gets a copy. Compiled functions over a pool."""

from pagedkv.block_moves import take_blocks
from pagedkv.free_queue import NUM_SHARES
from pagedkv.jit import lean_jit
from pagedkv.paged_arrays import NUM_COPIES, PagedArrays, PagedRules


@lean_jit
def shares_tail(pool: PagedArrays, rules: PagedRules, row: int, num_tokens: int) -> bool:
    """Return whether the block that `row` writes next, behind `num_tokens`, is held by others too: then it needs a copy of it.

    A fork shares blocks up to its last token, so that this block is the only one. One that carries its key is full: what is
    written there is what is there.
    """
    place = num_tokens // rules.block_size
    if place >= pool.num_blocks[row] or place < pool.num_registered[row]:
        return False
    return bool(pool.blocks["ref_cnt"][pool.tables[row, place]] > 1)


@lean_jit
def part_tail(pool: PagedArrays, rules: PagedRules, row: int, num_tokens: int) -> None:
    """Put a block of its own in place of the one that `row` shares behind `num_tokens`; one must be free. O(1)."""
    place = num_tokens // rules.block_size
    source = pool.tables[row, place]
    take_blocks(pool.blocks, pool.queue, pool.key_index, pool.buckets, 1, pool.tables[row], place)
    pool.blocks["ref_cnt"][source] -= 1
    pool.queue[NUM_SHARES] -= 1
    pair = pool.copies[pool.forks[NUM_COPIES]]
    pair[0], pair[1] = source, pool.tables[row, place]
    pool.forks[NUM_COPIES] += 1
