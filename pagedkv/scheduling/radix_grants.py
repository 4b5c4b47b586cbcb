"""What the rows of a running batch hold of SGLang's radix-cached memory, compiled: admission, growth, storing, giving back."""

from typing import NamedTuple

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import lean_jit
from pagedkv.radix_arrays import EVICTABLE, PROTECTED, RadixRules
from pagedkv.radix_cache import CacheArrays, make_room, num_free_slots
from pagedkv.radix_walks import copy_blocks, insert, lock_path, match_prefix, piece_end, unlock_path
from pagedkv.slot_list import give_back, num_listed, take_listed
from pagedkv.step_memory import (
    moved_blocks,
    nothing_moved,
    rows_of,
    slots_of,
)

NOBODY = -1
"""In `RowArrays.ends`: nobody has the row."""


class RowArrays(NamedTuple):
    """A radix cache, and who holds which blocks of it."""

    cache: CacheArrays
    tables: Int32Array
    """Block tables [max_num_seqs, max_blocks]. The first num_shared tokens of a row lie in the tree's, the rest is its own."""
    units_held: Int32Array
    """By row: blocks in its table."""
    num_shared: Int64Array
    """By row: leading tokens that lie in the tree's slots."""
    num_counted: Int64Array
    """By row: leading tokens whose nodes have counted it as a hit."""
    ends: Int64Array
    """By row: the node where the shared part ends, locked once for it; NOBODY."""
    states: Int32Array
    """By row: blocks of its state [max_num_seqs, blocks]."""


class RowRules(NamedTuple):
    """What is the same for all rows."""

    tree: RadixRules
    caches: bool
    """Whether anything is stored at all."""
    refreshes: bool
    """Whether prompts that wait count as used now and then: under lru."""


moved_blocks.register(RowArrays)(nothing_moved)


@slots_of.register(RowArrays)
@lean_jit
def _slots_of(memory: RowArrays, rules: RowRules) -> tuple[int, int, int, int]:
    shared = -memory.cache.tree.sizes[PROTECTED]
    for row in range(memory.num_shared.size):
        shared += memory.num_shared[row]
    return num_free_slots(memory.cache, rules.tree), memory.cache.tree.sizes[EVICTABLE], shared, 0


@rows_of.register(RowArrays)
@lean_jit
def _rows_of(memory: RowArrays, rules: RowRules) -> tuple[Int32Array, int, int]:
    return memory.units_held, rules.tree.block_size, memory.states.shape[1]


@lean_jit
def admit_row(memory: RowArrays, rules: RowRules, row: int, node: int) -> None:
    """Let an empty `row` begin with the prefix that ends at `node`, whose lock it takes over, and take the slots of its state."""
    cache, size, num_states = memory.cache, rules.tree.block_size, memory.states.shape[1]
    cached = cache.tree.nodes["depth"][node]
    copy_blocks(cache.tree, rules.tree, node, memory.tables[row])
    memory.units_held[row], memory.num_shared[row], memory.ends[row] = cached // size, cached, node
    if num_states > 0:
        make_room(cache, rules.tree, num_states * size)
        take_listed(cache.slots, memory.states[row], 0, num_states)


@lean_jit
def grow_row(memory: RowArrays, rules: RowRules, row: int, num_tokens: int) -> None:
    """Give `row` blocks for its `num_tokens`: the free list has them. O(blocks taken).

    Raises:
        IntegrityError: If it has not.
    """
    needed, held = -(-num_tokens // rules.tree.block_size), int(memory.units_held[row])
    if needed > held:
        if num_listed(memory.cache.slots) < needed - held:
            raise IntegrityError("a row was promised blocks that are not there")
        take_listed(memory.cache.slots, memory.tables[row], held, needed)
        memory.units_held[row] = needed


@lean_jit
def shrink_row(memory: RowArrays, rules: RowRules, row: int, num_tokens: int) -> None:
    """Give back the blocks of `row` behind its first `num_tokens`: they were for drafts that were not accepted."""
    size = rules.tree.block_size
    kept, held = -(-num_tokens // size), int(memory.units_held[row])
    if kept < held:
        give_back(memory.cache.slots, memory.tables[row], kept, held, size > 1)
        memory.units_held[row] = kept


@lean_jit
def _insert_row(
    memory: RowArrays, rules: RowRules, row: int, tokens: Int32Array, num_tokens: int, namespace: int, priority: int
) -> int:
    """Insert `tokens` in whole blocks, give duplicates back, return how many were inserted."""
    tree, size, start = memory.cache.tree, rules.tree.block_size, memory.num_shared[row]
    end = max(num_tokens // size * size, start)
    num_present, present, _ = insert(
        tree, rules.tree, tokens, end, namespace, memory.tables[row], memory.num_counted[row], priority
    )
    while start < present:
        last = piece_end(tree, rules.tree, num_present, start)
        give_back(memory.cache.slots, memory.tables[row], start // size, last // size, size > 1)
        start = last
    memory.num_counted[row] = end
    return int(end)


@lean_jit
def store_row(
    memory: RowArrays, rules: RowRules, row: int, tokens: Int32Array, num_tokens: int, namespace: int, priority: int
) -> None:
    """Put what `row` has computed into the tree in whole blocks; where another was first, hold the tree's blocks."""
    tree = memory.cache.tree
    end = _insert_row(memory, rules, row, tokens, num_tokens, namespace, priority)
    node = match_prefix(tree, rules.tree, tokens, end, namespace)
    copy_blocks(tree, rules.tree, node, memory.tables[row])
    lock_path(tree, rules.tree, node)
    unlock_path(tree, rules.tree, memory.ends[row])
    memory.ends[row], memory.num_shared[row] = node, end


@lean_jit
def _release_row(memory: RowArrays, rules: RowRules, row: int, first: int) -> None:
    """Give back the slots of `row` from `first` on and its state, and unlock its prefix."""
    cache, size = memory.cache, rules.tree.block_size
    give_back(cache.slots, memory.tables[row], first // size, int(memory.units_held[row]), size > 1)
    give_back(cache.slots, memory.states[row], 0, memory.states.shape[1], size > 1)
    unlock_path(cache.tree, rules.tree, memory.ends[row])
    memory.units_held[row] = memory.num_shared[row] = memory.num_counted[row] = 0
    memory.ends[row] = NOBODY


@lean_jit
def finish_row(
    memory: RowArrays, rules: RowRules, row: int, tokens: Int32Array, num_tokens: int, namespace: int, priority: int
) -> None:
    """Put all that `row` has computed into the tree, if anything is, and give back the rest."""
    end = 0
    if rules.caches:
        end = _insert_row(memory, rules, row, tokens, num_tokens, namespace, priority)
    _release_row(memory, rules, row, end)


@lean_jit
def retract_row(memory: RowArrays, rules: RowRules, row: int) -> None:
    """Give back what `row` has alone, without storing it."""
    _release_row(memory, rules, row, memory.num_shared[row])
