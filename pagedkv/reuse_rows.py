"""What live requests hold of a pool of reusable blocks, row by row: admission, growth, storing and release, compiled."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.priority_queue import is_queued
from pagedkv.reuse_moves import (
    NUM_COPIES,
    UNSAID,
    PoolArrays,
    hold_node,
    is_on_gpu,
    num_free_blocks,
    onboard_node,
    release_block,
    store_block,
    take_block,
    take_copy,
    take_over,
    unhold_node,
)
from pagedkv.reuse_nodes import NO_NODE, find_child, match_prefix
from pagedkv.token_source import write_tokens

NUM_HITS, PARTIAL, NUM_PARTIAL = range(3)
"""In `ReuseArrays.found`: full blocks, whose nodes are in the tree's path; the node hit in part; how many tokens of it."""
NOTHING_FOUND = (0, NO_NODE, 0)

STORED = np.dtype([("num_stored", "<i8"), ("tail", "<i8"), ("tail_stamp", "<i8"), ("next_full", "<i8")])
"""What others can find of a row:

* num_stored: leading blocks whose content is in the tree, be it in the block of another request;
* tail: the node of the last of them, or NO_NODE; tail_stamp: its stamp: if the node has another now, it was evicted since;
* next_full: with so many computed tokens there is another full block.
"""

SAID = np.dtype([("priority", "<i8"), ("duration", "<f8")])
"""What a block is worth from its release on, or UNSAID, and for how long."""


class ReuseArrays(NamedTuple):
    """A pool of reusable blocks and who holds which."""

    pool: PoolArrays
    tables: Int32Array
    """Block tables, int32 [max_num_seqs, max_blocks]."""
    num_blocks: Int32Array
    """By row: blocks in its table."""
    states: Int32Array
    """By row: the blocks of its state, int32 [max_num_seqs, state blocks]."""
    rows: npt.NDArray[np.void]
    """`STORED`, by row."""
    found: Int64Array
    """What `find_prefix` found."""
    said: npt.NDArray[np.void]
    """`SAID`, by place in the table of a row that is about to be released."""

    @classmethod
    def empty(cls, pool: PoolArrays, *, max_num_seqs: int, max_blocks: int, num_state_blocks: int) -> "ReuseArrays":
        """Return rows that hold nothing."""
        rows, said = np.zeros(max_num_seqs, STORED), np.zeros(max_blocks, SAID)
        rows["tail"], said["priority"] = NO_NODE, UNSAID
        return cls(
            pool,
            np.zeros((max_num_seqs, max_blocks), np.int32),
            np.zeros(max_num_seqs, np.int32),
            np.zeros((max_num_seqs, num_state_blocks), np.int32),
            rows,
            np.array(NOTHING_FOUND),
            said,
        )


class ReuseRules(NamedTuple):
    """How blocks are given, as plain numbers."""

    block_size: int
    watermark_blocks: int
    reserve_full_isl: bool
    caches: bool
    """Blocks are kept for others."""


@lean_jit
def find_prefix(memory: ReuseArrays, rules: ReuseRules, root: int, source: Any, num_known: int) -> int:
    """Find what a request of so many known tokens begins with, but for its last one; return how many tokens that are."""
    hits, partial, shared = match_prefix(memory.pool.tree, root, source, num_known - 1)
    memory.found[NUM_HITS], memory.found[PARTIAL], memory.found[NUM_PARTIAL] = hits, partial, shared
    return hits * rules.block_size + shared


@lean_jit
def find_nothing(memory: ReuseArrays) -> int:
    """Let nothing be found for a request that shares nothing."""
    memory.found[NUM_HITS], memory.found[PARTIAL], memory.found[NUM_PARTIAL] = NOTHING_FOUND
    return 0


@lean_jit
def admit_row(memory: ReuseArrays, rules: ReuseRules, row: int, num_new: int, num_known: int, kept_free: int) -> bool:
    """Give an empty row what was found, and blocks for `num_new` tokens behind it; return whether they fit. O(blocks * log blocks).

    Full blocks are shared. Of the block that follows, what it begins with alike is taken over in place if nobody holds it and
    nothing is stored behind it, else copied; if not even one block would be left to copy from, it is taken over with all behind it.
    """
    pool, table, found = memory.pool, memory.tables[row], memory.found
    path, nodes = pool.tree.path, pool.tree.nodes
    hits, partial, num_states = found[NUM_HITS], found[PARTIAL], memory.states.shape[1]
    num_cached = hits * rules.block_size + found[NUM_PARTIAL]
    num_tokens = num_cached + num_new
    if rules.reserve_full_isl:
        num_tokens = max(num_tokens, num_known)
    num_blocks = -(-num_tokens // rules.block_size)
    num_taken, num_free = num_blocks + num_states, num_free_blocks(pool)
    for i in range(hits):
        num_taken -= is_on_gpu(pool, path[i])
        num_free -= is_queued(pool.gpu, path[i])
    if num_taken + kept_free > num_free:
        return False
    pool.counts[NUM_COPIES] = 0
    for i in range(hits):
        hold_node(pool, path[i])
    place = hits
    if partial != NO_NODE:
        if is_queued(pool.gpu, partial) and (nodes["first_child"][partial] == NO_NODE or num_taken == num_free):
            table[hits] = take_over(pool, partial)
            partial, place = NO_NODE, hits + 1
        else:
            hold_node(pool, partial)  # it must outlast this admission: its content is copied
    for i in range(hits):
        if not is_on_gpu(pool, path[i]):
            onboard_node(pool, path[i])
        table[i] = nodes["block"][path[i]]
    if partial != NO_NODE:
        table[hits] = take_copy(pool, partial, found[NUM_PARTIAL])
        place = hits + 1
    for i in range(place, num_blocks):
        table[i] = take_block(pool)
    for i in range(num_states):
        memory.states[row, i] = take_block(pool)
    if partial != NO_NODE:
        unhold_node(pool, partial)
    memory.num_blocks[row] = num_blocks
    memory.rows["num_stored"][row], memory.rows["tail"][row] = hits, NO_NODE
    if hits > 0:
        _remember_tail(memory, row, path[hits - 1])
    memory.rows["next_full"][row] = (num_cached // rules.block_size + 1) * rules.block_size
    return True


@lean_jit
def _remember_tail(memory: ReuseArrays, row: int, node: int) -> None:
    memory.rows["tail"][row], memory.rows["tail_stamp"][row] = node, memory.pool.tree.nodes["stamp"][node]


@lean_jit
def grow_row(memory: ReuseArrays, rules: ReuseRules, row: int, num_slots: int) -> bool:
    """Let `row` have blocks for `num_slots` tokens; return whether they are free. O(blocks taken * log blocks)."""
    held, needed = int(memory.num_blocks[row]), -(-num_slots // rules.block_size)
    if needed - held > num_free_blocks(memory.pool):
        return False
    memory.pool.counts[NUM_COPIES] = 0
    for i in range(held, needed):
        memory.tables[row, i] = take_block(memory.pool)
    memory.num_blocks[row] = max(held, needed)
    return True


@lean_jit
def store_row(memory: ReuseArrays, rules: ReuseRules, root: int, source: Any, row: int, num_tokens: int) -> None:
    """Store the blocks of the first `num_tokens` tokens of a row, but for those whose content is stored already. O(tokens)."""
    pool, size = memory.pool, rules.block_size
    tree, rows = pool.tree, memory.rows
    tail = rows["tail"][row]
    if tail != NO_NODE and tree.nodes["stamp"][tail] != rows["tail_stamp"][row]:
        tail = rows["tail"][row] = NO_NODE  # evicted since: what lay behind it is not in the tree either
        rows["num_stored"][row] = 0
    first = rows["num_stored"][row] * size
    if num_tokens <= first:
        return
    node = root if tail == NO_NODE else tail
    while first < num_tokens:
        last = min(first + size, num_tokens)
        write_tokens(source, first, last, tree.key)
        child = find_child(tree, node, last - first)
        if child == NO_NODE:
            child = store_block(pool, node, last - first, memory.tables[row, rows["num_stored"][row]])
        node = child
        rows["num_stored"][row] += 1
        first = last
    _remember_tail(memory, row, node)


@lean_jit
def note_row(memory: ReuseArrays, rules: ReuseRules, root: int, source: Any, row: int, num_computed: int, num_known: int) -> None:
    """Store the blocks that have become full, never the last known token. O(tokens in them)."""
    num_full = min(num_computed, num_known - 1) // rules.block_size
    if num_full > memory.rows["num_stored"][row]:
        store_row(memory, rules, root, source, row, num_full * rules.block_size)
    memory.rows["next_full"][row] = (num_computed // rules.block_size + 1) * rules.block_size


@lean_jit
def release_row(memory: ReuseArrays, row: int) -> None:
    """Give back all that `row` holds, tail first, worth what is `said`. O(blocks * log blocks)."""
    if memory.num_blocks[row] == 0:  # its state was given back too
        return
    for i in range(memory.num_blocks[row] - 1, -1, -1):
        release_block(memory.pool, memory.tables[row, i], memory.said["priority"][i], memory.said["duration"][i])
    for i in range(memory.states.shape[1] - 1, -1, -1):
        release_block(memory.pool, memory.states[row, i], UNSAID, 0.0)
    memory.num_blocks[row] = memory.rows["num_stored"][row] = 0
    memory.rows["tail"][row] = NO_NODE
