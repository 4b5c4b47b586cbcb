"""Which blocks carry a key: a hash table in arrays.

The table chains, in each bucket, the first registered block of every key that falls there. Further blocks of the same key form a
ring with it, in the order of registration; when the first one leaves, the next takes its place in the bucket.
"""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import IntegrityError
from pagedkv.jit import jit

_NONE = 0
"""Ends a chain: block 0 never carries a key."""


class PrefixCacheArrays(NamedTuple):
    """The state of a prefix cache."""

    key: BlockKeys
    """By block: its key, uint64 [num_blocks, 2]. Stale unless `next_same` says that the block carries one."""
    next_same: Int32Array
    """By block: the block registered next under its key; the last one's is the first. 0: the block carries no key."""
    prev_same: Int32Array
    """By block: the way back around that ring."""
    next_in_bucket: Int32Array
    """By block that is the first of its key: the next such block in its bucket, 0 at the end."""
    first_in_bucket: Int32Array
    """By bucket. A power of two of them, at least one per block: chains stay short."""


@jit
def _bucket_of(index: PrefixCacheArrays, keys: BlockKeys, i: int) -> int:
    # Keys come from a cryptographic hash: any bits will do. A signed operand would make numba compute in floating point.
    return int(keys[i, 0] & np.uint64(index.first_in_bucket.size - 1))


@jit
def find_block(index: PrefixCacheArrays, keys: BlockKeys, i: int) -> int:
    """Return the block registered first of those that carry keys[i], all 128 bits compared; 0 if there is none. O(1) expected."""
    block: int = index.first_in_bucket[_bucket_of(index, keys, i)]
    while block != _NONE and (index.key[block, 0] != keys[i, 0] or index.key[block, 1] != keys[i, 1]):
        block = index.next_in_bucket[block]
    return block


@jit
def find_prefix(index: PrefixCacheArrays, keys: BlockKeys, blocks: Int32Array) -> int:
    """Write the cached blocks of the longest run of keys[: blocks.size] from its start into `blocks`; return their number."""
    for i in range(blocks.size):
        block = find_block(index, keys, i)
        if block == _NONE:
            return i
        blocks[i] = block
    return blocks.size


@jit
def carry_keys(index: PrefixCacheArrays, blocks: Int32Array, keys: BlockKeys) -> bool:
    """Return whether each of `blocks` is a block of the pool that carries the key of the same place."""
    for i in range(blocks.size):
        block = blocks[i]
        if not _NONE < block < index.next_same.size or index.next_same[block] == _NONE:
            return False
        if index.key[block, 0] != keys[i, 0] or index.key[block, 1] != keys[i, 1]:
            return False
    return True


@jit
def insert_block(index: PrefixCacheArrays, block: int, keys: BlockKeys, i: int) -> None:
    """Let `block`, which carries no key, carry keys[i], behind those that carry it already. O(1) expected."""
    first = find_block(index, keys, i)
    index.key[block, 0], index.key[block, 1] = keys[i, 0], keys[i, 1]
    if first == _NONE:
        bucket = _bucket_of(index, keys, i)
        index.next_in_bucket[block] = index.first_in_bucket[bucket]
        index.first_in_bucket[bucket] = block
        index.next_same[block] = index.prev_same[block] = block
    else:
        last = index.prev_same[first]
        index.next_same[last] = index.prev_same[first] = block
        index.next_same[block], index.prev_same[block] = first, last


@jit
def remove_block(index: PrefixCacheArrays, block: int) -> None:
    """Drop the key that `block` carries. O(1) expected, however many blocks carry the same key."""
    bucket = _bucket_of(index, index.key, block)
    following = index.next_same[block]
    before, first = _NONE, index.first_in_bucket[bucket]
    while index.key[first, 0] != index.key[block, 0] or index.key[first, 1] != index.key[block, 1]:
        before, first = first, index.next_in_bucket[first]
    if first == block:
        heir = index.next_in_bucket[block]
        if following != block:
            index.next_in_bucket[following] = heir
            heir = following
        if before == _NONE:
            index.first_in_bucket[bucket] = heir
        else:
            index.next_in_bucket[before] = heir
    previous = index.prev_same[block]
    index.next_same[previous], index.prev_same[following] = following, previous
    index.next_same[block] = _NONE


class PrefixCache:
    """The blocks of a pool of `num_blocks` that carry a key. At most 36 bytes per block.

    Example:
        >>> import numpy as np
        >>> cache, keys = PrefixCache(num_blocks=8), np.array([[1, 2], [1, 3]], np.uint64)
        >>> insert_block(cache.arrays, 5, keys, 0)
        >>> insert_block(cache.arrays, 4, keys, 0)
        >>> cache.lookup(keys).tolist()
        [5]
        >>> remove_block(cache.arrays, 5)
        >>> cache.lookup(keys).tolist(), cache.blocks().tolist()
        ([4], [4])
    """

    def __init__(self, *, num_blocks: int) -> None:
        self.arrays = PrefixCacheArrays(
            key=np.zeros((num_blocks, 2), np.uint64),
            next_same=np.zeros(num_blocks, np.int32),
            prev_same=np.zeros(num_blocks, np.int32),
            next_in_bucket=np.zeros(num_blocks, np.int32),
            first_in_bucket=np.zeros(1 << (num_blocks - 1).bit_length(), np.int32),
        )

    def lookup(self, keys: BlockKeys) -> Int32Array:
        """Return the cached blocks of the longest run of `keys` from its start. O(hits) expected."""
        blocks = np.empty(len(keys), np.int32)
        return blocks[: find_prefix(self.arrays, keys, blocks)]

    def blocks(self) -> Int32Array:
        """Return the blocks that carry a key, ascending. O(num_blocks)."""
        return np.flatnonzero(self.arrays.next_same).astype(np.int32)

    def clear(self) -> None:
        """Drop all keys. O(num_blocks)."""
        self.arrays.next_same[:] = _NONE
        self.arrays.first_in_bucket[:] = _NONE

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every block with a key is found once, under its key, in one ring per key. O(num_blocks)."""
        index, found, keys = self.arrays, set[int](), set[tuple[int, int]]()
        size = index.next_same.size

        def expect(truth: bool, what: str, block: int) -> None:  # noqa: FBT001
            if not truth:
                state = {name: column.tolist() for name, column in index._asdict().items()}
                raise IntegrityError(f"{what} at block {block} of the prefix cache: {state}")

        for bucket, first in enumerate(index.first_in_bucket.tolist()):
            while first != _NONE:
                expect(_NONE < first < size and first not in found, "a chain leads astray", first)
                key = (int(index.key[first, 0]), int(index.key[first, 1]))
                expect(_bucket_of(index, index.key, first) == bucket, "wrong bucket", first)
                expect(key not in keys, "two rings for one key", first)
                keys.add(key)
                block = first
                while True:
                    following = int(index.next_same[block])
                    expect(_NONE < following < size and index.prev_same[following] == block, "a ring breaks", block)
                    expect(block not in found and tuple(index.key[block].tolist()) == key, "wrong ring", block)
                    found.add(block)
                    block = following
                    if block == first:
                        break
                first = int(index.next_in_bucket[first])
        lost = set(self.blocks().tolist()) ^ found
        expect(not lost, "a key that no lookup finds", min(lost, default=_NONE))
