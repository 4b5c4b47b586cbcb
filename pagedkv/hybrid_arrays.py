"""KV memory of several groups of layers, over one pool, as the arrays and rules that compiled code works on.

`pagedkv.hybrid_cache_manager` is the same request by request, in Python; a test holds the two to each other.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_moves import release_behind, release_blocks
from pagedkv.free_queue import NUM_SHARES, Blocks, FreeQueue
from pagedkv.group_rules import GroupRule, key_salt
from pagedkv.jit import lean_jit
from pagedkv.prefix_cache import Buckets, KeyIndex
from pagedkv.step_memory import free_row

GROUP = np.dtype(
    [("block_size", "<i8"), ("kind", "<i8"), ("window", "<i8"), ("keys_per_block", "<i8"), ("salt_a", "<u8"), ("salt_b", "<u8")]
)
"""What a group of layers keeps, as in `GroupRule`. A block's key is that of its last `keys_per_block`-th part, salted."""
FULL, SLIDING_WINDOW, CHUNKED = 0, 1, 2
"""Kinds. A state that each request has for itself is no group here: see `HybridArrays.states`."""
_KINDS = {"full": FULL, "mla": FULL, "sliding_window": SLIDING_WINDOW, "chunked": CHUNKED}

Groups: TypeAlias = npt.NDArray[np.void]
"""`GROUP` [groups]."""


class HybridArrays(NamedTuple):
    """Paged KV memory of the running batch, with a block table per group of layers."""

    blocks: Blocks
    queue: FreeQueue
    key_index: KeyIndex
    buckets: Buckets
    groups: Groups
    tables: Int32Array
    """Block tables, int32 [groups, max_num_seqs, max_blocks]: null where a window has left a block behind."""
    num_blocks: Int32Array
    """Blocks in each table, null ones included, int32 [groups, max_num_seqs]."""
    num_given_back: Int32Array
    """Leading blocks of each table that are null for good, int32 [groups, max_num_seqs]."""
    num_registered: Int32Array
    """Leading blocks of each table that carry their key, or will never get one, int32 [groups, max_num_seqs]."""
    held: Int32Array
    """By row: blocks in all its tables, null ones not included."""
    states: Int32Array
    """By row: blocks of its state of fixed size, int32 [max_num_seqs, state blocks]."""
    hits: Int32Array
    """Room for one request's hits, int32 [groups, max_blocks]: at the places that they have in its tables."""
    shares: Int64Array
    """By group: references to its blocks beyond the first of each."""
    forks: Int64Array
    """See `ForkedMemory`."""
    copies: Int32Array
    """Likewise; room for one of each row and group."""


class HybridRules(NamedTuple):
    """How it is given, as plain numbers."""

    unit_slots: int
    """Slots in a block of the pool: those of the group with the longest blocks."""
    hash_block_size: int
    """Tokens per key."""
    alignment: int
    """Tokens of which every hit is a multiple."""
    max_new_tokens: int
    """Most tokens of a step, which bounds what windows hold."""
    watermark_blocks: int
    reserve_full_isl: bool
    caches: bool
    """Prefixes are kept."""
    freed_to_front: bool
    """Freed blocks without a key are handed out next; if not (vLLM 0.19), last."""


def groups_of(rules: Sequence[GroupRule], hash_block_size: int) -> Groups:
    """Return `rules` for compiled code."""
    groups = np.zeros(len(rules), GROUP)
    for i, rule in enumerate(rules):
        stride = max(rule.block_size // hash_block_size, 1)
        groups[i] = (rule.block_size, _KINDS[rule.kind], rule.window or 0, stride, *key_salt(i))
    return groups


@lean_jit
def first_block(groups: Groups, group: int, num_computed_tokens: int) -> int:
    """Return the first block that a group still needs when so many tokens are computed: `GroupRule.first_block`."""
    kind, window = groups["kind"][group], groups["window"][group]
    skipped = 0
    if kind == SLIDING_WINDOW:
        skipped = max(0, num_computed_tokens - window + 1)
    elif kind == CHUNKED:
        skipped = num_computed_tokens // window * window
    return int(skipped // groups["block_size"][group])


@lean_jit
def peak_blocks(groups: Groups, group: int, num_tokens: int, max_new_tokens: int) -> int:
    """Return the most blocks of a group that a request of up to `num_tokens` holds at once: `GroupRule.peak_blocks`."""
    kind, window, size = groups["kind"][group], groups["window"][group], groups["block_size"][group]
    most = -(-num_tokens // size)
    if kind == SLIDING_WINDOW:
        most = min(most, -(-(window - 1 + max_new_tokens) // size) + 1)
    elif kind == CHUNKED:
        most = min(most, -(-(window + max_new_tokens) // size) + (window % size > 0))
    return int(most)


@lean_jit
def release_part(memory: HybridArrays, rules: HybridRules, group: int, row: int, first: int, last: int) -> None:
    """Give blocks `first` to `last` (exclusive) of a table back, which are there, the last one first. O(blocks)."""
    table, shares = memory.tables[group, row, first:last], memory.queue[NUM_SHARES]
    if rules.freed_to_front:
        release_blocks(memory.blocks, memory.queue, table, last - first)
    else:
        release_behind(memory.blocks, memory.queue, table, last - first)
    memory.shares[group] += memory.queue[NUM_SHARES] - shares
    memory.held[row] -= last - first


@free_row.register(HybridArrays)
@lean_jit
def _free_row(memory: HybridArrays, rules: HybridRules, row: int) -> None:
    """Give back all that `row` holds, group by group. O(groups + blocks)."""
    holds = memory.num_blocks[0, row] > 0
    for group in range(memory.groups.size):
        release_part(memory, rules, group, row, memory.num_given_back[group, row], memory.num_blocks[group, row])
        memory.num_blocks[group, row] = memory.num_given_back[group, row] = memory.num_registered[group, row] = 0
    if holds and memory.states.shape[1] > 0:  # a row that holds nothing has a stale state table
        if rules.freed_to_front:
            release_blocks(memory.blocks, memory.queue, memory.states[row], memory.states.shape[1])
        else:
            release_behind(memory.blocks, memory.queue, memory.states[row], memory.states.shape[1])
