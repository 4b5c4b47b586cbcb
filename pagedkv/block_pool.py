"""The blocks of the KV cache: who is free, in which order, how many hold each, and which are kept for their prefix."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.jit import jit
from pagedkv.prefix_cache import PrefixCache, PrefixCacheArrays, carry_keys, insert_block, remove_block

NULL_BLOCK = 0
"""Never handed out. It stands for "no block" in tables, and closes the ring of the free queue."""


class BlockPoolArrays(NamedTuple):
    """The state of a pool. The free queue is a ring of block ids through `NULL_BLOCK`: next_free[0] is handed out first."""

    next_free: Int32Array
    """By block: the one after it in the free queue. Meaningless while the block is held."""
    prev_free: Int32Array
    """By block: the one before it in the free queue, so that a block can leave from the middle."""
    ref_cnt: Int32Array
    """By block: how many tables hold it. A block is in the free queue exactly when this is 0 (the null block never is)."""
    num_free: Int64Array
    """Length 1: blocks in the free queue."""


@jit
def take_blocks(pool: BlockPoolArrays, num_blocks: int, table: Int32Array, offset: int) -> None:
    """Move the first `num_blocks` of the free queue to table[offset:]. O(num_blocks). The caller has seen that they are there."""
    block = pool.next_free[NULL_BLOCK]
    for i in range(num_blocks):
        table[offset + i] = block
        pool.ref_cnt[block] = 1
        block = pool.next_free[block]
    pool.next_free[NULL_BLOCK] = block
    pool.prev_free[block] = NULL_BLOCK
    pool.num_free[0] -= num_blocks


@jit
def release_blocks(pool: BlockPoolArrays, table: Int32Array, num_blocks: int) -> None:
    """Drop one reference to each of table[:num_blocks], from the last to the first. O(num_blocks).

    Those that nobody holds any more go to the front of the free queue as one batch in this order: the tail is handed out first.
    """
    head = pool.next_free[NULL_BLOCK]
    behind = NULL_BLOCK
    for i in range(num_blocks - 1, -1, -1):
        block = table[i]
        pool.ref_cnt[block] -= 1
        if pool.ref_cnt[block] == 0:
            pool.next_free[behind] = block
            pool.prev_free[block] = behind
            behind = block
            pool.num_free[0] += 1
    pool.next_free[behind] = head
    pool.prev_free[head] = behind


@jit
def take_evicting(pool: BlockPoolArrays, index: PrefixCacheArrays, num_blocks: int, table: Int32Array, offset: int) -> None:
    """Like `take_blocks`; a block that carried a key loses it, since its content will be overwritten. O(num_blocks) expected."""
    block = pool.next_free[NULL_BLOCK]
    for _ in range(num_blocks):
        if index.next_same[block] != NULL_BLOCK:
            remove_block(index, block)
        block = pool.next_free[block]
    take_blocks(pool, num_blocks, table, offset)


@jit
def release_keeping(pool: BlockPoolArrays, index: PrefixCacheArrays, table: Int32Array, num_blocks: int) -> None:
    """Like `release_blocks`; but blocks that carry a key keep it and go, in this order, to the back of the free queue."""
    head = pool.next_free[NULL_BLOCK]
    behind = NULL_BLOCK
    for i in range(num_blocks - 1, -1, -1):
        block = table[i]
        pool.ref_cnt[block] -= 1
        if pool.ref_cnt[block] > 0:
            continue
        pool.num_free[0] += 1
        if index.next_same[block] == NULL_BLOCK:
            pool.next_free[behind] = block
            pool.prev_free[block] = behind
            behind = block
        else:
            last = pool.prev_free[NULL_BLOCK]
            if last == NULL_BLOCK:  # the queue was empty: this is what the batch at the front will be joined to
                head = block
            else:
                pool.next_free[last] = block
            pool.prev_free[block] = last
            pool.prev_free[NULL_BLOCK] = block
            pool.next_free[block] = NULL_BLOCK
    pool.next_free[behind] = head
    pool.prev_free[head] = behind


@jit
def touch_blocks(pool: BlockPoolArrays, blocks: Int32Array) -> None:
    """Add one reference to each of `blocks`; those that nobody held leave the free queue, wherever they are. O(len(blocks))."""
    for i in range(blocks.size):
        block = blocks[i]
        if pool.ref_cnt[block] == 0:
            before, following = pool.prev_free[block], pool.next_free[block]
            pool.next_free[before] = following
            pool.prev_free[following] = before
            pool.num_free[0] -= 1
        pool.ref_cnt[block] += 1


class BlockPool:
    """`num_blocks` blocks of which block 0 is the null block and the others are free or held, with reference counts.

    With `enable_caching` a block may carry the key of its content, which survives `free_blocks` and ends when the block is handed
    out again: until then the block can be found and held again. 12 bytes of state per block, at most 48 with caching.

    Example:
        >>> pool = BlockPool(num_blocks=6)
        >>> pool.get_new_blocks(3).tolist()
        [1, 2, 3]
        >>> pool.free_blocks([1, 2, 3])
        >>> pool.free_queue().tolist()
        [3, 2, 1, 4, 5]
        >>> pool.get_new_blocks(9) is None
        True
    """

    def __init__(self, *, num_blocks: int, enable_caching: bool = False) -> None:
        if not 2 <= num_blocks <= np.iinfo(np.int32).max:
            raise ConfigError(f"a pool of {num_blocks} blocks: needs 2 or more, since block 0 is the null block")
        ids = np.arange(num_blocks, dtype=np.int32)
        self.num_blocks = num_blocks
        self.arrays = BlockPoolArrays(
            next_free=np.roll(ids, -1),
            prev_free=np.roll(ids, 1),
            ref_cnt=np.zeros(num_blocks, np.int32),
            num_free=np.array([num_blocks - 1]),
        )
        self.cache = PrefixCache(num_blocks=num_blocks) if enable_caching else None

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the free queue."""
        return int(self.arrays.num_free[0])

    def get_new_blocks(self, num_blocks: int) -> Int32Array | None:
        """Take blocks from the front of the free queue; None, and nothing changed, if there are not so many. O(num_blocks).

        Raises:
            ConfigError: If `num_blocks` is negative.
        """
        if num_blocks < 0:
            raise ConfigError(f"cannot take {num_blocks} blocks: the number must be 0 or more")
        if num_blocks > self.num_free_blocks:
            return None
        blocks = np.empty(num_blocks, np.int32)
        if self.cache is None:
            take_blocks(self.arrays, num_blocks, blocks, 0)
        else:
            take_evicting(self.arrays, self.cache.arrays, num_blocks, blocks, 0)
        return blocks

    def free_blocks(self, blocks: Sequence[int] | Int32Array) -> None:
        """Drop one reference to each of `blocks`, a table or a part of one. O(len(blocks)).

        Raises:
            ConfigError: If a block is not of this pool or has fewer references than are dropped; nothing has changed then.
        """
        table = np.asarray(blocks, np.int32)
        ids, drops = np.unique(table, return_counts=True)
        self._expect_own(ids, "free")
        over = ids[self.arrays.ref_cnt[ids] < drops]
        if over.size:
            raise ConfigError(f"double free of block {over[0]}: it is held {self.arrays.ref_cnt[over[0]]} times")
        if self.cache is None:
            release_blocks(self.arrays, table, table.size)
        else:
            release_keeping(self.arrays, self.cache.arrays, table, table.size)

    def touch(self, blocks: Sequence[int] | Int32Array, keys: BlockKeys) -> None:
        """Hold each of `blocks`, cached under `keys`, once more: a prefix hit. O(len(blocks)).

        Raises:
            ConfigError: If a block does not carry its key any more; nothing has changed then.
        """
        table = np.asarray(blocks, np.int32)
        if self.cache is None or len(keys) != table.size or not carry_keys(self.cache.arrays, table, keys):
            raise ConfigError(f"cannot hold blocks {table.tolist()}: they are not cached under these {len(keys)} keys")
        touch_blocks(self.arrays, table)

    def cache_full_blocks(self, blocks: Sequence[int] | Int32Array, keys: BlockKeys) -> None:
        """Let each of `blocks`, held and full, be found under its key from now on. O(len(blocks)) expected.

        Raises:
            ConfigError: If caching is off, or a block is not held or carries a key already; nothing has changed then.
        """
        table = np.asarray(blocks, np.int32)
        if self.cache is None or len(keys) != table.size:
            raise ConfigError(f"cannot cache {table.size} blocks under {len(keys)} keys: needs a key each, and a pool with caching")
        self._expect_own(np.sort(table), "cache")
        index = self.cache.arrays
        if np.unique(table).size < table.size or (self.arrays.ref_cnt[table] == 0).any() or index.next_same[table].any():
            raise ConfigError(f"cannot cache blocks {table.tolist()}: each must be held, and carry no key yet")
        for i, block in enumerate(table.tolist()):
            insert_block(index, block, keys, i)

    def reset_prefix_cache(self) -> bool:
        """Drop all keys and return True, if no block is held; else change nothing and return False. The queue keeps its order."""
        if self.num_free_blocks < self.num_blocks - 1:
            return False
        if self.cache is not None:
            self.cache.clear()
        return True

    def _expect_own(self, ids: Int32Array, verb: str) -> None:
        """Refuse sorted `ids` unless all are blocks that this pool hands out."""
        if ids.size and not (ids[0] > NULL_BLOCK and ids[-1] < self.num_blocks):
            raise ConfigError(f"cannot {verb} blocks {ids.tolist()}: this pool hands out 1 to {self.num_blocks - 1}")

    def free_queue(self) -> Int32Array:
        """Return the free blocks, the next to be handed out first. O(free blocks)."""
        order = np.empty(self.num_free_blocks, np.int32)
        block = NULL_BLOCK
        for i in range(order.size):
            block = self.arrays.next_free[block]
            order[i] = block
        return order

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the queue is one ring, both ways, of exactly the blocks that nobody holds. O(num_blocks)."""
        arrays, unheld = self.arrays, self.arrays.ref_cnt == 0
        state = f"{self.num_free_blocks} free, next {arrays.next_free.tolist()}, ref_cnt {arrays.ref_cnt.tolist()}"
        if not unheld[NULL_BLOCK] or (arrays.ref_cnt < 0).any() or self.num_free_blocks != unheld.sum() - 1:
            raise IntegrityError(f"counts do not fit together: {state}")
        block = NULL_BLOCK
        for _ in range(self.num_free_blocks + 1):
            following = int(arrays.next_free[block])
            if not (0 <= following < self.num_blocks and unheld[following] and arrays.prev_free[following] == block):
                raise IntegrityError(f"the free queue breaks behind block {block}: {state}")
            block = following
        if block != NULL_BLOCK or np.unique(self.free_queue()).size != self.num_free_blocks:
            raise IntegrityError(f"the free queue does not come back after {self.num_free_blocks} blocks: {state}")
        if self.cache is not None:
            self.cache.check_integrity()
