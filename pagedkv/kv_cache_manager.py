"""Block tables of requests over one pool, with prefix caching: vLLM's cache manager for one group of full-attention layers."""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int32Array
from pagedkv.block_grant import grant_blocks
from pagedkv.block_moves import release_blocks
from pagedkv.block_pool import BlockPool
from pagedkv.block_table import BlockTables
from pagedkv.errors import IntegrityError
from pagedkv.free_queue import NULL_BLOCK
from pagedkv.kv_request import KVRequest

_NO_BLOCKS: Int32Array = np.empty(0, np.int32)


class KVCacheManager:
    """Gives requests blocks, shares cached prefixes between them, and takes the blocks back.

    `None` from `allocate_slots` is "does not fit now", and nothing has changed. Blocks become findable when their slots are given,
    before anything is computed, so a request that follows in the same step can share them.

    Example:
        >>> from pagedkv.block_hash import BlockHashChain
        >>> manager = KVCacheManager(KVPoolSettings(num_blocks=9, block_size=2, max_model_len=8))
        >>> chain = BlockHashChain(block_size=2)
        >>> chain.extend([7, 8, 9, 10, 11])
        >>> first, second = (KVRequest(request_id=i, num_tokens=5, block_keys=chain.keys) for i in "ab")
        >>> manager.allocate_slots(first, 5).tolist()
        [1, 2, 3]
        >>> hits, num_tokens = manager.get_computed_blocks(second)
        >>> hits.tolist(), num_tokens
        ([1, 2], 4)
        >>> manager.allocate_slots(second, 1, hits).tolist()
        [4]
        >>> manager.free(first)
        >>> manager.free_queue().tolist()
        [3, 5, 6, 7, 8]
    """

    def __init__(self, settings: KVPoolSettings, *, enable_caching: bool = True) -> None:
        self.block_size = settings.block_size
        self.max_model_len = settings.max_model_len
        self.enable_caching = enable_caching
        self.pool = BlockPool(num_blocks=settings.num_blocks, enable_caching=enable_caching)
        self.tables = BlockTables(
            max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len, block_size=settings.block_size
        )
        self.num_state_blocks = -(-settings.state_slots // settings.block_size)
        """Blocks that each request takes at admission for state of fixed size."""
        self._states: Int32Array = np.zeros((settings.max_num_seqs, self.num_state_blocks), np.int32)
        self._num_registered: Int32Array = np.zeros(settings.max_num_seqs, np.int32)
        """By row: leading blocks that carry their key."""
        self._rows: dict[KVRequest, int] = {}
        """By request that holds blocks: its row of the tables."""
        self._free_rows = list(range(settings.max_num_seqs))[::-1]
        self._watermark_blocks = int(settings.watermark * settings.num_blocks)
        self._reserve_full_isl = settings.reserve_full_isl

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the free queue, cached ones included."""
        return self.pool.num_free_blocks

    def free_queue(self) -> Int32Array:
        """Return the free blocks, the next to be handed out first."""
        return self.pool.free_queue()

    def block_table(self, request: KVRequest) -> Int32Array:
        """Return the blocks that `request` holds, a view; empty if none."""
        row = self._rows.get(request)
        return _NO_BLOCKS if row is None else self.tables.of(row)

    def live_requests(self) -> tuple[KVRequest, ...]:
        """Return the requests that hold blocks, in order of admission."""
        return tuple(self._rows)

    def get_computed_blocks(self, request: KVRequest) -> tuple[Int32Array, int]:
        """Return the cached blocks of its longest known prefix, and their tokens. Changes nothing. O(hits) expected.

        At most floor((num_tokens - 1) / block_size) blocks: the last token is always computed, for its logits.

        Raises:
            ConfigError: If the request has too few keys.
        """
        self._check_known(request)
        if not self.enable_caching:
            return _NO_BLOCKS, 0
        hits = self.pool.cache.lookup(request.block_keys[: (request.num_tokens - 1) // self.block_size])
        return hits, hits.size * self.block_size

    def allocate_slots(
        self,
        request: KVRequest,
        num_new_tokens: int,
        computed_blocks: Sequence[int] | Int32Array = _NO_BLOCKS,
        *,
        num_lookahead_tokens: int = 0,
        has_scheduled_reqs: bool = False,
        full_sequence_must_fit: bool | None = None,
    ) -> Int32Array | None:
        """Give `request` slots for `num_new_tokens` beyond its computed ones and its hits. O(hits + blocks taken + blocks filled).

        Args:
            request: The request. Its `num_computed_tokens` is left to its owner, who adds hits and new tokens.
            num_new_tokens: Tokens to compute now, drafts included.
            computed_blocks: Its hits, as `get_computed_blocks` returned them. Only for a request that holds nothing yet.
            num_lookahead_tokens: Slots for drafts beyond that; never beyond max_model_len.
            has_scheduled_reqs: Something runs, so an admission must leave the watermark free.
            full_sequence_must_fit: An admission must find room for all known tokens; by default as in the settings.

        Returns:
            The blocks taken newly, hits not included; None if they do not fit now.

        Raises:
            ConfigError: If the numbers cannot be, or a hit is stale; nothing has changed then.
        """
        row = self._rows.get(request)
        held = 0 if row is None else int(self.tables.num_blocks[row])
        hits = np.asarray(computed_blocks, np.int32)
        num_slots = request.num_computed_tokens + hits.size * self.block_size + num_new_tokens
        self._check_known(request)
        request.check_slots(
            num_new_tokens=num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, num_slots_held=held * self.block_size
        )
        if num_slots > self.max_model_len:
            raise request.error(f"{num_slots} slots are more than max_model_len {self.max_model_len}")
        if hits.size:
            self._check_hits(request, hits)
        gated, kept_free = 0, 0
        if row is None:
            if not self._free_rows:
                raise request.error(f"all {len(self._rows)} rows are in use: free a request first, or raise max_num_seqs")
            gate = self._reserve_full_isl if full_sequence_must_fit is None else full_sequence_must_fit
            gated = self._blocks(request.num_tokens) if gate else 0
            kept_free = self.num_state_blocks + (self._watermark_blocks if has_scheduled_reqs else 0)
        needed = max(self._blocks(min(num_slots + num_lookahead_tokens, self.max_model_len)), held)
        place = self._free_rows[-1] if row is None else row
        table, registered = self.tables.blocks[place], max(int(self._num_registered[place]), hits.size)
        full = max(min(num_slots, request.num_tokens) // self.block_size, registered) if self.enable_caching else 0
        pool, cache, keys = self.pool, self.pool.cache, request.block_keys
        if not grant_blocks(
            pool.blocks, pool.queue, cache.index, cache.buckets, table, held, hits, needed, gated, kept_free, keys, registered, full
        ):
            return None
        if row is None:
            self._rows[request] = self._free_rows.pop()
            states = self.pool.get_new_blocks(self.num_state_blocks)
            assert states is not None  # the grant has kept them free
            self._states[place] = states
        self.tables.num_blocks[place], self._num_registered[place] = needed, full
        taken: Int32Array = table[held + hits.size : needed].copy()
        return taken

    def free_lookahead(self, request: KVRequest) -> int:
        """Give back the blocks beyond its computed tokens, once a step has told which drafts were right; return their number.

        Raises:
            ConfigError: If the request holds nothing or has computed nothing.
        """
        row = self._row(request)
        if not 0 < request.num_computed_tokens <= self.tables.num_blocks[row] * self.block_size:
            raise request.error(f"{request.num_computed_tokens} computed tokens: needs 1 or more, each with a slot")
        kept = max(self._blocks(request.num_computed_tokens), int(self._num_registered[row]))
        surplus = self.tables.of(row)[kept:]
        self._release(surplus)
        self.tables.num_blocks[row] = kept
        return surplus.size

    def free(self, request: KVRequest) -> None:
        """Take back all that a finished request holds: blocks without a key to the front of the queue, the others to the back.

        Raises:
            ConfigError: If it holds nothing: it was never allocated, or freed before.
        """
        row = self._row(request)
        self._release(self.tables.of(row))
        self._release(self._states[row])
        self.tables.num_blocks[row] = self._num_registered[row] = 0
        del self._rows[request]
        self._free_rows.append(row)

    def preempt(self, request: KVRequest) -> None:
        """Free a request that will come back: nothing of it counts as computed any more, but its keys live on until reuse.

        Raises:
            ConfigError: If it holds nothing.
        """
        self.free(request)
        request.num_computed_tokens = 0

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes and return True, if no request holds a block; else change nothing and return False."""
        return self.pool.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Raise IntegrityError unless reference counts, tables, rows and keys fit together. O(num_blocks + blocks held)."""
        self.pool.check_integrity()
        tables = {
            request.request_id: [*self.tables.of(row).tolist(), *self._states[row].tolist()] for request, row in self._rows.items()
        }
        held = np.array([block for table in tables.values() for block in table], np.int64)
        inside = ((held > NULL_BLOCK) & (held < self.pool.num_blocks)).all() and len(tables) == len(self._rows)
        if not inside or not np.array_equal(np.bincount(held, minlength=self.pool.num_blocks), self.pool.ref_cnt):
            raise IntegrityError(f"reference counts {self.pool.ref_cnt.tolist()} do not match the tables {tables}")
        if sorted([*self._rows.values(), *self._free_rows]) != list(range(len(self.tables.num_blocks))):
            raise IntegrityError(f"rows {sorted(self._rows.values())} in use, {sorted(self._free_rows)} free: not each once")
        for request, row in self._rows.items():
            registered = self.tables.of(row)[: self._num_registered[row]]
            if self.enable_caching and not self.pool.cache.carry(registered, request.block_keys):
                raise IntegrityError(f"blocks {registered.tolist()} of request {request.request_id!r} do not carry its keys")

    def _blocks(self, num_slots: int) -> int:
        return -(-num_slots // self.block_size)

    def _row(self, request: KVRequest) -> int:
        row = self._rows.get(request)
        if row is None:
            raise request.holds_nothing()
        return row

    def _check_known(self, request: KVRequest) -> None:
        num_keys = request.num_tokens // self.block_size if self.enable_caching else 0
        request.check_known(max_model_len=self.max_model_len, num_keys=num_keys)

    def _check_hits(self, request: KVRequest, hits: Int32Array) -> None:
        if request in self._rows:
            raise request.error(f"hits {hits.tolist()}, but it holds blocks already: only an admission takes hits")
        if hits.size * self.block_size >= request.num_tokens:
            raise request.error(f"{hits.size} hits leave none of {request.num_tokens} tokens to compute: the last one must be")
        if not self.pool.cache.carry(hits, request.block_keys):
            raise request.error(f"hits {hits.tolist()} do not carry its keys (any more): look them up again")

    def _release(self, blocks: Int32Array) -> None:
        release_blocks(self.pool.blocks, self.pool.queue, blocks, blocks.size)
