"""The last blocks of forks, partly filled and shared: who writes there first gets a copy. Compiled functions over a pool."""

from typing import Protocol

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_moves import take_blocks
from pagedkv.free_queue import NUM_SHARES, Blocks, FreeQueue
from pagedkv.jit import lean_jit
from pagedkv.prefix_cache import Buckets, KeyIndex

NUM_FORKS, NUM_COPIES = 0, 1
"""In `ForkedMemory.forks`: how often a row was forked since the start; copies that the step decided last wants."""


class ForkedMemory(Protocol):
    """Arrays of memory whose rows may share blocks."""

    @property
    def blocks(self) -> Blocks:
        """Of the pool."""

    @property
    def queue(self) -> FreeQueue:
        """Who is free."""

    @property
    def key_index(self) -> KeyIndex:
        """Which blocks are found by their keys."""

    @property
    def buckets(self) -> Buckets:
        """Of the index."""

    @property
    def forks(self) -> Int64Array:
        """NUM_FORKS and NUM_COPIES."""

    @property
    def copies(self) -> Int32Array:
        """forks[NUM_COPIES] pairs of blocks, source and destination."""


@lean_jit
def is_shared_tail(memory: ForkedMemory, table: Int32Array, place: int, num_registered: int, num_blocks: int) -> bool:
    """Return whether block `place` of a table, where its row writes next, is held by others too: then it needs a copy of it.

    A fork shares blocks up to its last token, so that this block is the only one. One that carries its key is full: what is
    written there is what is there.
    """
    if place >= num_blocks or place < num_registered:
        return False
    return bool(memory.blocks["ref_cnt"][table[place]] > 1)


@lean_jit
def part_tail(memory: ForkedMemory, table: Int32Array, place: int) -> None:
    """Put a block of its own in place of one that a table shares; one must be free. O(1)."""
    source = table[place]
    take_blocks(memory.blocks, memory.queue, memory.key_index, memory.buckets, 1, table, place)
    memory.blocks["ref_cnt"][source] -= 1
    memory.queue[NUM_SHARES] -= 1
    pair = memory.copies[memory.forks[NUM_COPIES]]
    pair[0], pair[1] = source, table[place]
    memory.forks[NUM_COPIES] += 1
