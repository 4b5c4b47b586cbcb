"""What one grant of blocks comes to, before anything is changed: the slots asked for, checked, as blocks of a table."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_BLOCKS, Int32Array
from pagedkv.kv_request import KVRequest
from pagedkv.partial_tails import CachedTail
from pagedkv.prefix_lookup import PrefixLookup
from pagedkv.request_rows import TableRows


class Growth(NamedTuple):
    """What one grant asks of the pool: see `grant_blocks`."""

    table: Int32Array
    held: int
    hits: Int32Array
    num_needed: int
    num_gated: int
    num_kept_free: int
    first_written: int


class GrantPlan(NamedTuple):
    """What one grant will do: the fields of `Growth`, and what becomes of the request. Flat, since there is one for every grant."""

    table: Int32Array
    held: int
    hits: Int32Array
    num_needed: int
    num_gated: int
    num_kept_free: int
    first_written: int
    row: int
    """Where its block table is."""
    is_admission: bool
    """It holds nothing yet, not even the row."""
    num_registered: int
    """Leading blocks of the table, hits included, that carry their key already."""
    num_full: int
    """Those that carry it afterwards."""
    num_states: int
    """Blocks for a state of fixed size, which an admission takes besides."""

    @property
    def growth(self) -> Growth:
        """What it asks of the pool."""
        return Growth(*self[:7])


class GrantPlanner:
    """Turns what is asked for a request into blocks, and refuses numbers that cannot be. Nothing here changes anything."""

    def __init__(self, rows: TableRows, lookup: PrefixLookup, settings: KVPoolSettings, *, enable_caching: bool) -> None:
        self._rows, self._lookup, self._enable_caching = rows, lookup, enable_caching
        self._block_size, self._max_model_len = settings.block_size, settings.max_model_len
        self._num_state_blocks: int = rows.states.shape[1]
        self._watermark_blocks = int(settings.watermark * settings.num_blocks)
        self._reserve_full_isl = settings.reserve_full_isl

    def plan(
        self,
        request: KVRequest,
        num_new_tokens: int,
        computed_blocks: Sequence[int] | Int32Array,
        computed_tail: CachedTail | None,
        *,
        num_lookahead_tokens: int,
        has_scheduled_reqs: bool,
        full_sequence_must_fit: bool | None,
    ) -> GrantPlan:
        """Return what `KVCacheManager.allocate_slots` has to do, which says what the arguments are. O(hits).

        Raises:
            ConfigError: If the numbers cannot be, or a hit is stale.
        """
        self._lookup.check_known(request)
        rows, size = self._rows, self._block_size
        row = rows.of.get(request)
        held = 0 if row is None else int(rows.tables.num_blocks[row])
        hits, num_slots = NO_BLOCKS, request.num_computed_tokens + num_new_tokens
        if len(computed_blocks) or computed_tail is not None:
            if row is not None:
                raise request.error("holds blocks already: only an admission takes hits")
            hits = np.asarray(computed_blocks, np.int32)
            self._lookup.check(request, hits, computed_tail)
            num_slots += hits.size * size + (0 if computed_tail is None else computed_tail.num_tokens)
        request.check_slots(num_new_tokens=num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, num_slots_held=held * size)
        request.check_length(num_slots, self._max_model_len)
        gated, kept_free = 0, 0
        if row is None:
            if not rows.free:
                raise request.error(f"all {len(rows.of)} rows are in use: free a request first, or raise max_num_seqs")
            gate = self._reserve_full_isl if full_sequence_must_fit is None else full_sequence_must_fit
            gated = -(-request.num_tokens // size) if gate else 0
            kept_free = self._num_state_blocks + (self._watermark_blocks if has_scheduled_reqs else 0)
        needed = -(-min(num_slots + num_lookahead_tokens, self._max_model_len) // size)
        place = rows.free[-1] if row is None else row
        registered = max(int(rows.num_registered[place]), hits.size)
        full = max(min(num_slots, request.num_tokens) // size, registered) if self._enable_caching else 0
        first_written = max(request.num_computed_tokens // size, registered)
        table, num_states = rows.tables.blocks[place], self._num_state_blocks if row is None else 0
        return GrantPlan(
            table, held, hits, needed, gated, kept_free, first_written, place, row is None, registered, full, num_states
        )
