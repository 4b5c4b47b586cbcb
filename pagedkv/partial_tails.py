"""Cached prefixes that end inside a block: what a prompt shares of one more block is copied, since it will write the rest."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import IntegrityError
from pagedkv.free_queue import BLOCK, NULL_BLOCK, Blocks
from pagedkv.jit import jit
from pagedkv.kv_request import KVRequest
from pagedkv.prefix_cache import Buckets, KeyIndex, PrefixCache, find_block, insert_block, remove_block


class CachedTail(NamedTuple):
    """A block that begins as the next block of a prompt does."""

    block: int
    num_tokens: int
    """Leading tokens of the block that are alike."""


@jit
def _find_tail(index: KeyIndex, buckets: Buckets, keys: BlockKeys, first: int, last: int) -> int:
    for unit in range(last - 1, first - 1, -1):
        entry = find_block(index, buckets, keys, unit)
        if entry != NULL_BLOCK:
            return entry
    return NULL_BLOCK


@jit
def _register(
    entries: Blocks, index: KeyIndex, buckets: Buckets, table: Int32Array, keys: BlockKeys, first: int, last: int, per_block: int
) -> None:
    for unit in range(first, last):
        place = unit % (per_block + 1)
        entry = table[unit // (per_block + 1)] * per_block + place
        if place < per_block and entries["next_same"][entry] == NULL_BLOCK:
            insert_block(entries, index, buckets, entry, keys, unit)


@jit
def _forget(entries: Blocks, index: KeyIndex, buckets: Buckets, blocks: Int32Array, per_block: int) -> None:
    for block in blocks:
        for entry in range(block * per_block, (block + 1) * per_block):
            if entries["next_same"][entry] != NULL_BLOCK:
                remove_block(entries, index, buckets, entry)


@jit
def _agree(entries: Blocks, index: KeyIndex, table: Int32Array, keys: BlockKeys, last: int, per_block: int) -> bool:
    for unit in range(last):
        place = unit % (per_block + 1)
        entry = table[unit // (per_block + 1)] * per_block + place
        found = place < per_block and entries["next_same"][entry] != NULL_BLOCK
        if found and (index["key_a"][entry] != keys[unit, 0] or index["key_b"][entry] != keys[unit, 1]):
            return False
    return True


class PartialTails:
    """Which blocks begin with which units of a prefix: a second prefix cache, with an entry for each unit of a block but its last.

    Entry block * (units per block - 1) + i carries the key of the prefix that ends with unit i of the block. It stays as long as
    the block is not handed out again, whether the block is full or not. 44 to 48 bytes per entry.

    Content is copied before a step computes anything, so unlike a full block, a unit can be found only when it is computed.
    """

    def __init__(self, *, num_blocks: int, block_size: int, unit: int, max_num_seqs: int) -> None:
        """Make the cache of a pool; `unit` is a divisor of `block_size`, and not the same."""
        self.unit, self._block_size = unit, block_size
        self._per_block = block_size // unit - 1
        self._entries: Blocks = np.zeros(num_blocks * self._per_block, BLOCK)
        self._cache = PrefixCache(self._entries)
        self._num_registered: Int32Array = np.zeros(max_num_seqs, np.int32)
        """By row: leading units that were registered."""

    def find(self, request: KVRequest, num_hits: int) -> CachedTail | None:
        """Return the block that has most of what follows `num_hits` blocks, short of the last known token. O(units per block)."""
        first = num_hits * (self._per_block + 1)
        last = min(first + self._per_block, (request.num_tokens - 1) // self.unit)
        entry = _find_tail(self._cache.index, self._cache.buckets, request.unit_keys, first, last)
        if entry == NULL_BLOCK:
            return None
        block, place = divmod(entry, self._per_block)
        return CachedTail(block, (place + 1) * self.unit)

    def carry(self, tail: CachedTail, request: KVRequest, num_hits: int) -> bool:
        """Return whether `tail` is a block that has what follows `num_hits` blocks of `request`."""
        units, rest = divmod(tail.num_tokens, self.unit)
        if rest or not 1 <= units <= self._per_block or tail.block < 0:
            return False
        entry = np.array([tail.block * self._per_block + units - 1], np.int32)
        return self._cache.carry(entry, request.unit_keys[num_hits * (self._per_block + 1) + units - 1 :])

    def granted(self, row: int, *, first_written: int, taken: Int32Array) -> None:
        """Hear that the table of `row` has new blocks from place `first_written` on, and that `taken` lose their content."""
        self._num_registered[row] = min(self._num_registered[row], first_written * (self._per_block + 1))
        _forget(self._entries, self._cache.index, self._cache.buckets, taken, self._per_block)

    def start(self, row: int) -> None:
        """Hear that a request begins in `row`. Not even of the blocks that it hit must all units be registered."""
        self._num_registered[row] = 0

    def fork(self, row: int, child_row: int) -> None:
        """Hear that a request begins in `child_row` with the blocks of `row`."""
        self._num_registered[child_row] = self._num_registered[row]

    def register(self, row: int, table: Int32Array, request: KVRequest) -> None:
        """Let the units that `request` has computed be found. O(units newly computed)."""
        first, last = int(self._num_registered[row]), min(request.num_computed_tokens, request.num_tokens) // self.unit
        if first < last:
            index, buckets = self._cache.index, self._cache.buckets
            _register(self._entries, index, buckets, table, request.unit_keys, first, last, self._per_block)
            self._num_registered[row] = last

    def agree(self, row: int, table: Int32Array, request: KVRequest) -> bool:
        """Return whether what is registered of the blocks of `row` is what `request` knows."""
        last, keys = int(self._num_registered[row]), request.unit_keys
        return len(keys) >= last and _agree(self._entries, self._cache.index, table, keys, last, self._per_block)

    def slots(self, blocks: npt.NDArray[np.bool_]) -> Int64Array:
        """Return the slots of all units that can be found in those `blocks`, a mask. O(entries)."""
        found, place = np.divmod(self._cache.blocks().astype(np.int64), self._per_block)
        first = (found * self._block_size + place * self.unit)[blocks[found]]
        slots: Int64Array = (first[:, None] + np.arange(self.unit)).reshape(-1)
        return slots

    def clear(self) -> None:
        """Forget all units. No request may hold blocks."""
        self._cache.clear()

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all entries can be found. O(entries)."""
        self._cache.check_integrity()
        if (self._num_registered < 0).any():
            raise IntegrityError(f"units registered by row: {self._num_registered.tolist()}")
