"""Tells a sink what changes in the prefix cache of a pool."""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.block_grant import BlockCopy
from pagedkv.block_hash import BlockKeys
from pagedkv.block_pool import BlockPool
from pagedkv.errors import IntegrityError
from pagedkv.events import BlockCopied, BlockRemoved, BlockRevived, BlockStored, CacheCleared, EventSink, block_ids, key_bytes
from pagedkv.kv_request import KVRequest


class CacheEvents:
    """Finds what a grant did to blocks by comparing their keys with those told last: nothing needs to be known beforehand.

    So whatever made a block lose its key, the order of the free queue or a policy, is told in the grant that hands it out. 17 bytes
    per block, and some microseconds per grant.
    """

    def __init__(self, pool: BlockPool, sink: EventSink) -> None:
        """Tell `sink` what changes in `pool` from now on."""
        self.sink = sink
        self._pool = pool
        every = np.arange(pool.num_blocks if pool.enable_caching else 0, dtype=np.int32)
        self._carried, self._keys = self._now(every)

    def granted(self, request: KVRequest, hits: Int32Array, table: Int32Array, first: int, states: Int32Array) -> None:
        """Tell what a grant to `request` has changed. O(blocks given).

        Args:
            request: The request.
            hits: The cached blocks that it found, held now.
            table: Its block table.
            first: Place in the table from which on blocks may have been given, or got their keys.
            states: Blocks for its state that were given with it.
        """
        if not self._pool.enable_caching:
            return
        revived = hits[self._pool.ref_cnt[hits] == 1]
        if revived.size:
            keys = key_bytes(self._now(revived)[1])
            self.sink(BlockRevived(blocks=block_ids(revived), keys=keys, request_id=request.request_id))
        blocks = np.concatenate((table[first:], states))
        carries, keys_now = self._now(blocks)
        carried, keys_before = self._carried[blocks], self._keys[blocks]
        changed = (carries != carried) | (carries & (keys_now != keys_before).any(axis=1))
        if not changed.any():
            return
        self._carried[blocks], self._keys[blocks] = carries, keys_now
        removed = changed & carried
        if removed.any():
            self.sink(BlockRemoved(blocks=block_ids(blocks[removed]), keys=key_bytes(keys_before[removed])))
        places = np.flatnonzero(changed & carries)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            if run.size:
                self._stored(request, blocks[run], keys_now[run], first + int(run[0]))

    def copied(self, copies: Sequence[BlockCopy]) -> None:
        """Tell of copies that grants asked for."""
        for copy in copies:
            self.sink(BlockCopied(source=copy.source, destination=copy.destination, num_tokens=copy.num_tokens))

    def cleared(self) -> None:
        """Tell that no block carries a key any more. O(num_blocks)."""
        self._carried[:] = False
        self.sink(CacheCleared())

    def check_integrity(self) -> None:
        """Raise IntegrityError unless exactly what was told is so. O(num_blocks)."""
        carries, keys = self._now(np.arange(self._carried.size, dtype=np.int32))
        if not np.array_equal(carries, self._carried) or not np.array_equal(keys[carries], self._keys[carries]):
            told = np.flatnonzero(self._carried)
            raise IntegrityError(
                f"keys {key_bytes(keys[carries])} on blocks {np.flatnonzero(carries)}, but events told of "
                f"{key_bytes(self._keys[told])} on {told}"
            )

    def _stored(self, request: KVRequest, blocks: Int32Array, keys: BlockKeys, place: int) -> None:
        parent = key_bytes(request.block_keys[place - 1 : place])[0] if place else None
        self.sink(BlockStored(blocks=block_ids(blocks), keys=key_bytes(keys), parent=parent, request_id=request.request_id))

    def _now(self, blocks: Int32Array) -> tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], BlockKeys]:
        """Return which of `blocks` carry a key, and the keys, stale where they carry none."""
        index = self._pool.cache.index
        keys: BlockKeys = np.stack((index["key_a"][blocks], index["key_b"][blocks]), axis=1)
        return self._pool.blocks["next_same"][blocks] != 0, keys
