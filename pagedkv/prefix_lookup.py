"""What of a request is cached: its longest known prefix in full blocks, and in part of one more."""

from pagedkv.arrays import NO_BLOCKS, Int32Array
from pagedkv.block_pool import BlockPool
from pagedkv.kv_request import KVRequest
from pagedkv.partial_tails import CachedTail, PartialTails


class PrefixLookup:
    """Looks prefixes up in a pool, and checks what somebody says he has found. Nothing here changes anything."""

    def __init__(self, pool: BlockPool, tails: PartialTails | None, *, block_size: int, max_model_len: int) -> None:
        self._pool, self._tails = pool, tails
        self._block_size, self._max_model_len = block_size, max_model_len

    def check_known(self, request: KVRequest) -> None:
        """Raise ConfigError unless `request` has a number of tokens that can be, and keys for them if there is a cache."""
        num_keys = request.num_tokens // self._block_size if self._pool.enable_caching else 0
        request.check_known(max_model_len=self._max_model_len, num_keys=num_keys)
        if self._tails is not None:
            request.check_units(request.num_tokens // self._tails.unit)

    def blocks(self, request: KVRequest) -> Int32Array:
        """Return the cached blocks of its longest known prefix, short of its last token. O(hits) expected."""
        self.check_known(request)
        if not self._pool.enable_caching:
            return NO_BLOCKS
        return self._pool.cache.lookup(request.block_keys[: (request.num_tokens - 1) // self._block_size])

    def tail(self, request: KVRequest, num_hits: int) -> CachedTail | None:
        """Return what is cached of the block after `num_hits`, short of its last token. O(units per block) expected."""
        self.check_known(request)
        return None if self._tails is None else self._tails.find(request, num_hits)

    def check(self, request: KVRequest, hits: Int32Array, tail: CachedTail | None) -> None:
        """Raise ConfigError unless `hits` and `tail` are still what a lookup could find."""
        what = f"hits {hits.tolist()}" if tail is None else f"hits {hits.tolist()} and {tail}"
        if hits.size * self._block_size + (0 if tail is None else tail.num_tokens) >= request.num_tokens:
            raise request.error(f"{what} leave none of {request.num_tokens} tokens to compute: the last one must be")
        found = self._pool.cache.carry(hits, request.block_keys)
        if tail is not None:
            found = found and self._tails is not None and self._tails.carry(tail, request, hits.size)
        if not found:
            raise request.error(f"{what} do not carry its keys (any more): look them up again")

    def check_fork(self, parent: KVRequest, child: KVRequest, row: int, table: Int32Array, *, num_registered: int) -> None:
        """Raise ConfigError unless `child` knows the tokens of `parent`, whose `table` is that of `row`, as far as keys tell."""
        if child.num_tokens != parent.num_tokens:
            raise child.error(f"{child.num_tokens} known tokens: needs the {parent.num_tokens} of request {parent.request_id!r}")
        self.check_known(child)
        same = self._pool.cache.carry(table[:num_registered], child.block_keys)
        if not same or (self._tails is not None and not self._tails.agree(row, table, child)):
            raise child.error(f"its keys are not those of request {parent.request_id!r}: needs the same tokens and namespace")
