"""Which blocks carry a key: a hash table in arrays.

The table chains, in each bucket, the first registered block of every key that falls there. Further blocks of the same key form a
ring with it, in the order of registration; when the first one leaves, the next takes its place in the bucket.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import IntegrityError
from pagedkv.free_queue import Blocks
from pagedkv.jit import lean_jit

_NONE = 0
"""Ends a chain: block 0 never carries a key."""

KEYED = np.dtype([("key_a", "<u8"), ("key_b", "<u8"), ("next_in_bucket", "<i4")], align=True)
"""What is known of a block that carries a key: the key, and, if it is the first of its key, the next such block in its bucket (0 at
the end). Stale unless `next_same` says that the block carries one: the block registered next under its key; the last one's is the
first. `prev_same` is the way back around that ring."""

KeyIndex: TypeAlias = npt.NDArray[np.void]
"""`KEYED` [num_blocks], or [0] where caching is off."""
Buckets: TypeAlias = Int32Array
"""The first block of each bucket. A power of two of them, at least one per block: chains stay short."""


@lean_jit
def _bucket_of(buckets: Buckets, key_a: np.uint64) -> int:
    # Low bits are as good as random, or count the blocks of a prompt. A signed operand would make numba compute in floating point.
    return int(key_a & np.uint64(buckets.size - 1))


@lean_jit
def find_block(index: KeyIndex, buckets: Buckets, keys: BlockKeys, i: int) -> int:
    """Return the block registered first of those that carry keys[i]; 0 if there is none. O(1) expected."""
    return find_key(index, buckets, keys[i, 0], keys[i, 1])


@lean_jit
def find_key(index: KeyIndex, buckets: Buckets, a: np.uint64, b: np.uint64) -> int:
    """Return the block registered first of those that carry the key (a, b), all 128 bits compared; 0 if there is none."""
    block: int = buckets[_bucket_of(buckets, a)]
    while block != _NONE and (index["key_a"][block] != a or index["key_b"][block] != b):
        block = index["next_in_bucket"][block]
    return block


@lean_jit
def find_prefix(index: KeyIndex, buckets: Buckets, keys: BlockKeys, hits: Int32Array) -> int:
    """Write the cached blocks of the longest run of keys[: hits.size] from its start into `hits`; return their number."""
    for i in range(hits.size):
        block = find_block(index, buckets, keys, i)
        if block == _NONE:
            return i
        hits[i] = block
    return hits.size


@lean_jit
def carry_keys(blocks: Blocks, index: KeyIndex, table: Int32Array, keys: BlockKeys) -> bool:
    """Return whether each block of `table` is one of the pool and carries the key of the same place."""
    for i in range(table.size):
        block = table[i]
        if not _NONE < block < index.size or blocks["next_same"][block] == _NONE:
            return False
        if index["key_a"][block] != keys[i, 0] or index["key_b"][block] != keys[i, 1]:
            return False
    return True


@lean_jit
def insert_block(blocks: Blocks, index: KeyIndex, buckets: Buckets, block: int, keys: BlockKeys, i: int) -> None:
    """Let `block`, which carries no key, carry keys[i], behind those that carry it already. O(1) expected."""
    insert_key(blocks, index, buckets, block, keys[i, 0], keys[i, 1])


@lean_jit
def insert_key(blocks: Blocks, index: KeyIndex, buckets: Buckets, block: int, a: np.uint64, b: np.uint64) -> None:
    """Let `block`, which carries no key, carry (a, b), behind those that carry it already. O(1) expected."""
    next_same, prev_same = blocks["next_same"], blocks["prev_same"]
    first = find_key(index, buckets, a, b)
    index["key_a"][block], index["key_b"][block] = a, b
    if first == _NONE:
        bucket = _bucket_of(buckets, a)
        index["next_in_bucket"][block] = buckets[bucket]
        buckets[bucket] = block
        next_same[block] = prev_same[block] = block
    else:
        last = prev_same[first]
        next_same[last] = prev_same[first] = block
        next_same[block], prev_same[block] = first, last


@lean_jit
def remove_block(blocks: Blocks, index: KeyIndex, buckets: Buckets, block: int) -> None:
    """Drop the key that `block` carries. O(1) expected, however many blocks carry the same key."""
    next_same, prev_same, next_in_bucket = blocks["next_same"], blocks["prev_same"], index["next_in_bucket"]
    a, b = index["key_a"][block], index["key_b"][block]
    bucket = _bucket_of(buckets, a)
    following = next_same[block]
    before, first = _NONE, buckets[bucket]
    while index["key_a"][first] != a or index["key_b"][first] != b:
        before, first = first, next_in_bucket[first]
    if first == block:
        heir = next_in_bucket[block]
        if following != block:
            next_in_bucket[following] = heir
            heir = following
        if before == _NONE:
            buckets[bucket] = heir
        else:
            next_in_bucket[before] = heir
    previous = prev_same[block]
    next_same[previous], prev_same[following] = following, previous
    next_same[block] = _NONE


class PrefixCache:
    """Which of a pool's `blocks` carry a key. Without `enable_caching` none can. 24 bytes per block, and 4 to 8 for the buckets.

    Example:
        >>> from pagedkv.free_queue import new_queue
        >>> blocks, _ = new_queue(8)
        >>> cache, keys = PrefixCache(blocks), np.array([[1, 2], [1, 3]], np.uint64)
        >>> cache.insert(5, keys, 0)
        >>> cache.insert(4, keys, 0)
        >>> cache.lookup(keys).tolist()
        [5]
        >>> cache.remove(5)
        >>> cache.lookup(keys).tolist(), cache.blocks().tolist()
        ([4], [4])
    """

    def __init__(self, blocks: Blocks, *, enable_caching: bool = True) -> None:
        self._blocks = blocks
        size = len(blocks) if enable_caching else 0
        self.index: KeyIndex = np.zeros(size, KEYED)
        self.buckets: Buckets = np.zeros(1 << max(size - 1, 0).bit_length(), np.int32)

    def lookup(self, keys: BlockKeys) -> Int32Array:
        """Return the cached blocks of the longest run of `keys` from its start. O(hits) expected."""
        hits = np.empty(len(keys), np.int32)
        return hits[: find_prefix(self.index, self.buckets, keys, hits)]

    def insert(self, block: int, keys: BlockKeys, i: int) -> None:
        """Let `block`, which carries no key, carry keys[i]. O(1) expected."""
        insert_block(self._blocks, self.index, self.buckets, block, keys, i)

    def remove(self, block: int) -> None:
        """Drop the key that `block` carries. O(1) expected."""
        remove_block(self._blocks, self.index, self.buckets, block)

    def carry(self, table: Int32Array, keys: BlockKeys) -> bool:
        """Return whether each block of `table` is one of the pool and carries the key of the same place."""
        return len(keys) >= table.size and carry_keys(self._blocks, self.index, table, keys)

    def blocks(self) -> Int32Array:
        """Return the blocks that carry a key, ascending. O(num_blocks)."""
        return np.flatnonzero(self._blocks["next_same"]).astype(np.int32)

    def clear(self) -> None:
        """Drop all keys. O(num_blocks)."""
        self._blocks["next_same"] = _NONE
        self.buckets[:] = _NONE

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every block with a key is found once, under its key, in one ring per key. O(num_blocks)."""
        index, blocks, found, keys = self.index, self._blocks, set[int](), set[tuple[int, int]]()

        def expect(truth: bool, what: str, block: int) -> None:  # noqa: FBT001
            if not truth:
                state = f"blocks {blocks.tolist()}, keys {index.tolist()}, buckets {self.buckets.tolist()}"
                raise IntegrityError(f"{what} at block {block} of the prefix cache: {state}")

        def key_of(block: int) -> tuple[int, int]:
            return int(index["key_a"][block]), int(index["key_b"][block])

        for bucket, first in enumerate(self.buckets.tolist()):
            while first != _NONE:
                expect(_NONE < first < index.size and first not in found, "a chain leads astray", first)
                key = key_of(first)
                expect(_bucket_of(self.buckets, index["key_a"][first]) == bucket, "wrong bucket", first)
                expect(key not in keys, "two rings for one key", first)
                keys.add(key)
                block = first
                while True:
                    following = int(blocks["next_same"][block])
                    expect(_NONE < following < index.size and blocks["prev_same"][following] == block, "a ring breaks", block)
                    expect(block not in found and key_of(block) == key, "wrong ring", block)
                    found.add(block)
                    block = following
                    if block == first:
                        break
                first = int(index["next_in_bucket"][first])
        lost = set(self.blocks().tolist()) ^ found
        expect(not lost, "a key that no lookup finds", min(lost, default=_NONE))
