"""The blocks of the KV cache: who is free, in which order, how many hold each, and which are kept for their prefix."""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockKeys
from pagedkv.block_moves import evict_blocks, hold_prefix, register_blocks, release_blocks, take_blocks, touch_blocks
from pagedkv.errors import ConfigError
from pagedkv.free_queue import NULL_BLOCK, NUM_FREE, NUM_KEYED, check_queue, new_queue, queued
from pagedkv.prefix_cache import PrefixCache


class BlockPool:
    """`num_blocks` blocks of which block 0 is the null block and the others are free or held, with reference counts.

    With `enable_caching` a block may carry the key of its content, which survives `free_blocks` and ends when the block is handed
    out again: until then the block can be found and held again. 24 bytes of state per block, at most 56 with caching.

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
        if not 2 <= num_blocks <= np.iinfo(np.int32).max // 2:
            raise ConfigError(f"a pool of {num_blocks} blocks: needs 2 or more, since block 0 is the null block")
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self.blocks, self.queue = new_queue(num_blocks)
        self.cache = PrefixCache(self.blocks, enable_caching=enable_caching)
        self._arrays = (self.blocks, self.queue, self.cache.index, self.cache.buckets)

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the free queue, those that carry a key included."""
        return int(self.queue[NUM_FREE])

    @property
    def ref_cnt(self) -> Int32Array:
        """By block: how many tables hold it. A view."""
        counts: Int32Array = self.blocks["ref_cnt"]
        return counts

    @property
    def num_bytes(self) -> int:
        """Bytes of bookkeeping."""
        return sum(array.nbytes for array in (self.blocks, self.queue, self.cache.index, self.cache.buckets))

    def get_new_blocks(self, num_blocks: int) -> Int32Array | None:
        """Take blocks from the front of the free queue; None, and nothing changed, if there are not so many. O(num_blocks).

        Raises:
            ConfigError: If `num_blocks` is negative.
        """
        if not 0 <= num_blocks < self.num_blocks:
            if num_blocks < 0:
                raise ConfigError(f"cannot take {num_blocks} blocks: the number must be 0 or more")
            return None
        table = np.empty(num_blocks, np.int32)
        return table if take_blocks(*self._arrays, num_blocks, table, 0) else None

    def free_blocks(self, table: Sequence[int] | Int32Array) -> None:
        """Drop one reference to each block of `table`. O(len(table)).

        Raises:
            ConfigError: If a block is not of this pool or has fewer references than are dropped; nothing has changed then.
        """
        if type(table) is not np.ndarray:
            table = np.asarray(table, np.int32)
        wrong = release_blocks(self.blocks, self.queue, table, table.size)
        if wrong >= 0:
            raise self._not_held(table, wrong)

    def touch(self, table: Sequence[int] | Int32Array, keys: BlockKeys) -> None:
        """Hold each block of `table`, cached under `keys`, once more: a prefix hit. O(len(table)).

        Raises:
            ConfigError: If a block does not carry its key any more; nothing has changed then.
        """
        table = np.asarray(table, np.int32)
        if len(keys) != table.size or not self.cache.carry(table, keys):
            raise ConfigError(f"cannot hold blocks {table.tolist()}: they are not cached under these {len(keys)} keys")
        touch_blocks(self.blocks, self.queue, table)

    def hold_prefix(self, keys: BlockKeys) -> Int32Array:
        """Look up the longest run of `keys` from its start and hold its blocks once more. O(hits) expected."""
        hits = np.empty(len(keys), np.int32)
        return hits[: hold_prefix(*self._arrays, keys, hits)]

    def share(self, table: Sequence[int] | Int32Array) -> None:
        """Hold each block of `table`, which somebody holds, once more: a fork. O(len(table)).

        Raises:
            ConfigError: If nobody holds one of them; nothing has changed then.
        """
        table = np.asarray(table, np.int32)
        self._expect_own(table, "share")
        if (self.ref_cnt[table] == 0).any():
            raise ConfigError(f"cannot share blocks {table.tolist()}: nobody holds {table[self.ref_cnt[table] == 0].tolist()}")
        touch_blocks(self.blocks, self.queue, table)

    def cache_full_blocks(self, table: Sequence[int] | Int32Array, keys: BlockKeys) -> None:
        """Let each block of `table`, held and full, be found under its key from now on. O(len(table)) expected.

        Raises:
            ConfigError: If caching is off, or a block is not held or carries a key already; nothing has changed then.
        """
        table = np.asarray(table, np.int32)
        if not self.enable_caching or len(keys) != table.size:
            raise ConfigError(f"cannot cache {table.size} blocks under {len(keys)} keys: needs a key each, and a pool with caching")
        cache = self.cache
        if not register_blocks(self.blocks, cache.index, cache.buckets, table, keys, 0, table.size):
            self._expect_own(table, "cache")
            raise ConfigError(f"cannot cache blocks {table.tolist()}: each must be held, and carry no key yet")

    def evict(self, victims: Int32Array) -> None:
        """Take the keys of `victims`, free blocks with a key, and hand them out next. O(len(victims)) expected.

        Raises:
            ConfigError: If one of them is held or carries no key; nothing has changed then.
        """
        self._expect_own(victims, "evict")
        chosen = self.blocks[victims]
        if np.unique(victims).size < victims.size or chosen["ref_cnt"].any() or not chosen["next_same"].all():
            raise ConfigError(f"cannot evict blocks {victims.tolist()}: each must be free, and carry a key")
        evict_blocks(*self._arrays, victims)

    def reset_prefix_cache(self) -> bool:
        """Drop all keys and return True, if no block is held; else change nothing and return False.

        The queue keeps its order. O(num_blocks).
        """
        if self.num_free_blocks < self.num_blocks - 1:
            return False
        self.cache.clear()
        self.queue[NUM_KEYED] = 0
        return True

    def _expect_own(self, table: Int32Array, verb: str) -> None:
        if table.size and not (table.min() > NULL_BLOCK and table.max() < self.num_blocks):
            raise ConfigError(f"cannot {verb} blocks {table.tolist()}: this pool hands out 1 to {self.num_blocks - 1}")

    def _not_held(self, table: Int32Array, place: int) -> ConfigError:
        self._expect_own(table, "free")
        times = int((table == table[place]).sum())
        return ConfigError(
            f"double free of block {table[place]}: it is held {self.ref_cnt[table[place]]} times, and {times} are to be dropped"
        )

    def free_queue(self) -> Int32Array:
        """Return the free blocks, the next to be handed out first. O(num_blocks)."""
        return queued(self.queue)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the queue is exactly the blocks that nobody holds, and keys are in order. O(num_blocks)."""
        check_queue(self.blocks, self.queue)
        self.cache.check_integrity()
