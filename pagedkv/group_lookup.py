"""What of a request is cached in all its groups of layers: the longest prefix for which every group has what it needs."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from pagedkv.arrays import NO_BLOCKS, Int32Array
from pagedkv.block_pool import BlockPool
from pagedkv.group_rules import GroupTables
from pagedkv.kv_request import KVRequest


class GroupLookup:
    """Looks prefixes up for all groups, and checks what somebody says he has found. Nothing here changes anything."""

    def __init__(
        self, pool: BlockPool, groups: Sequence[GroupTables], *, alignment: int, key_block_size: int, max_model_len: int
    ) -> None:
        self._pool, self._groups, self._alignment = pool, tuple(groups), alignment
        self._key_block_size, self._max_model_len = key_block_size, max_model_len

    def check_known(self, request: KVRequest) -> None:
        """Raise ConfigError unless `request` has a number of tokens that can be, and keys for them if there is a cache."""
        num_keys = request.num_tokens // self._key_block_size if self._pool.enable_caching else 0
        request.check_known(max_model_len=self._max_model_len, num_keys=num_keys)

    def blocks(self, request: KVRequest) -> tuple[tuple[Int32Array, ...], int]:
        """Return, by group, the cached blocks of its longest known prefix, null where none is needed, and the prefix's tokens.

        Each group in turn shortens the prefix to one that it has a hit for, until all agree: that is the longest on which they can.
        O(groups * hits) expected.
        """
        self.check_known(request)
        groups = self._groups
        hits = [NO_BLOCKS] * len(groups)
        length = (request.num_tokens - 1) // self._alignment * self._alignment if self._pool.enable_caching else 0
        agreed = i = 0
        while length and agreed < len(hits):
            find_run = partial(groups[i].find_run, request)
            shorter, hits[i] = groups[i].rule.longest_hit(length, self._alignment, find_run)
            agreed = agreed + 1 if shorter == length else 1
            length, i = shorter, (i + 1) % len(hits)
        if not length:
            return (NO_BLOCKS,) * len(hits), 0
        nulls = [np.zeros(group.rule.first_block(length), np.int32) for group in groups]
        return tuple(np.concatenate(parts) for parts in zip(nulls, hits, strict=True)), length

    def by_group(self, request: KVRequest, computed_blocks: Sequence[Int32Array]) -> tuple[tuple[Int32Array, ...], int]:
        """Return hits as arrays by group, and their tokens; no tokens, no hits.

        Raises:
            ConfigError: If there are not as many as groups, or they do not end with the same token.
        """
        hits = tuple(np.asarray(blocks, np.int32) for blocks in computed_blocks)
        lengths = {hit.size * group.rule.block_size for hit, group in zip(hits, self._groups, strict=False)}
        if len(hits) != len(self._groups) or len(lengths) != 1:
            raise request.error(f"hits of {sorted(lengths)} tokens in {len(hits)} groups: needs one length in {len(self._groups)}")
        length = lengths.pop()
        return (hits, length) if length else ((), 0)

    def check(self, request: KVRequest, hits: Sequence[Int32Array], length: int) -> None:
        """Raise ConfigError unless `hits` of `length` tokens are still what a lookup could find."""
        if length >= request.num_tokens:
            raise request.error(f"hits of {length} tokens leave none of {request.num_tokens} to compute: the last one must be")
        for group, hit in zip(self._groups, hits, strict=True):
            first = group.rule.first_block(length)
            if hit[:first].any() or not np.array_equal(group.find_run(request, first, hit.size), hit[first:]):
                raise request.error(f"hits {hit.tolist()} do not carry its keys (any more): look them up again")
