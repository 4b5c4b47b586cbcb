"""Paged KV memory as the arrays and rules that compiled code works on."""

from typing import NamedTuple

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_moves import release_behind, release_blocks
from pagedkv.free_queue import Blocks, FreeQueue
from pagedkv.jit import lean_jit
from pagedkv.prefix_cache import Buckets, KeyIndex
from pagedkv.step_memory import free_row


class PagedArrays(NamedTuple):
    """Paged KV memory of the running batch."""

    blocks: Blocks
    queue: FreeQueue
    key_index: KeyIndex
    buckets: Buckets
    tables: Int32Array
    """Block tables, int32 [max_num_seqs, max_blocks]."""
    num_blocks: Int32Array
    """By row: blocks in its table."""
    num_registered: Int32Array
    """By row: leading blocks that carry their key."""
    states: Int32Array
    """By row: blocks of its state of fixed size, int32 [max_num_seqs, state blocks]."""
    hits: Int32Array
    """Room for one request's hits."""
    forks: Int64Array
    """See `ForkedMemory`."""
    copies: Int32Array
    """Likewise; room for one of each row."""


class PagedRules(NamedTuple):
    """How paged KV memory is given, as plain numbers."""

    block_size: int
    watermark_blocks: int
    reserve_full_isl: bool
    caches: bool
    """Prefixes are kept."""
    freed_to_front: bool
    """Freed blocks without a key are handed out next; if not (vLLM 0.19), last."""


@free_row.register(PagedArrays)
@lean_jit
def _free_row(pool: PagedArrays, rules: PagedRules, row: int) -> None:
    """Give back all that `row` holds. O(blocks)."""
    if rules.freed_to_front:
        release_blocks(pool.blocks, pool.queue, pool.tables[row], pool.num_blocks[row])
        if pool.num_blocks[row] > 0:  # a row that holds nothing has a stale state table
            release_blocks(pool.blocks, pool.queue, pool.states[row], pool.states.shape[1])
    else:
        release_behind(pool.blocks, pool.queue, pool.tables[row], pool.num_blocks[row])
        if pool.num_blocks[row] > 0:
            release_behind(pool.blocks, pool.queue, pool.states[row], pool.states.shape[1])
    pool.num_blocks[row] = pool.num_registered[row] = 0
