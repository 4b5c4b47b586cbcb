"""Block tables of requests over one pool, with prefix caching: vLLM's cache manager for one group of full-attention layers."""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_BLOCKS, Int32Array
from pagedkv.block_grant import SHORTAGE, BlockCopy, grant_blocks
from pagedkv.block_moves import release_behind, release_blocks
from pagedkv.block_pool import BlockPool
from pagedkv.cache_events import CacheEvents
from pagedkv.cache_policy import CachePolicy
from pagedkv.errors import IntegrityError
from pagedkv.events import EventSink
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.grant_plan import GrantPlanner
from pagedkv.kv_request import KVRequest
from pagedkv.partial_tails import CachedTail
from pagedkv.prefix_lookup import PrefixLookup
from pagedkv.request_rows import TableRows


class KVCacheManager:
    """Gives requests blocks, shares cached prefixes between them, and takes the blocks back.

    `None` from `allocate_slots` is "does not fit now", and nothing has changed. Blocks become findable when their slots are given,
    before anything is computed, so a request that follows in the same step can share them. Nobody writes a block that others hold:
    he gets one of his own for it, and `take_copies` tells what of the old one he needs.

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
        EVICTION_POLICIES.load(settings.eviction)  # refuses what is none
        self.block_size = settings.block_size
        self.max_model_len = settings.max_model_len
        self.enable_caching = enable_caching
        self.pool = BlockPool(num_blocks=settings.num_blocks, enable_caching=enable_caching)
        self._requests = rows = TableRows(settings)
        self.tables, self._num_registered, self._states = rows.tables, rows.num_registered, rows.states
        self._rows = rows.of
        self.num_state_blocks: int = rows.states.shape[1]
        """Blocks that each request takes at admission for state of fixed size."""
        more = settings.eviction != "lru" or 0 < settings.prefix_match_unit < settings.block_size
        self.policy = CachePolicy(self.pool, settings) if enable_caching and more else None
        """None: vLLM's default."""
        self._tails = self.policy.tails if self.policy else None
        self._lookup = PrefixLookup(self.pool, self._tails, block_size=self.block_size, max_model_len=self.max_model_len)
        self._planner = GrantPlanner(rows, self._lookup, settings, enable_caching=enable_caching)
        self._arrays = (self.pool.blocks, self.pool.queue, self.pool.cache.index, self.pool.cache.buckets)
        self._copies: list[BlockCopy] = []
        self._replaced: Int32Array = np.empty((2, self.tables.blocks.shape[1]), np.int32)
        """Room for the blocks that one grant replaces, and their places."""
        self._events: CacheEvents | None = None
        self._freed_to_front = settings.freed_to_front

    @property
    def events(self) -> EventSink | None:
        """Hears what happens to blocks: see `pagedkv.events.Observable`. Whoever is set here hears of changes from then on."""
        return None if self._events is None else self._events.sink

    @events.setter
    def events(self, sink: EventSink | None) -> None:
        self._events = None if sink is None else CacheEvents(self.pool, sink)

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the free queue, cached ones included."""
        return self.pool.num_free_blocks

    def free_queue(self) -> Int32Array:
        """Return the free blocks, the next to be handed out first. O(num_blocks)."""
        return self.pool.free_queue()

    def block_table(self, request: KVRequest) -> Int32Array:
        """Return the blocks that `request` holds, a view; empty if none. O(1)."""
        row = self._rows.get(request)
        return NO_BLOCKS if row is None else self.tables.of(row)

    def holds_blocks(self, request: KVRequest) -> bool:
        """Return whether `request` holds blocks. O(1)."""
        return request in self._rows

    def live_requests(self) -> tuple[KVRequest, ...]:
        """Return the requests that hold blocks, in order of admission. O(requests)."""
        return tuple(self._rows)

    def get_computed_blocks(self, request: KVRequest) -> tuple[Int32Array, int]:
        """Return the cached blocks of its longest known prefix, and their tokens. Changes nothing. O(hits) expected.

        At most floor((num_tokens - 1) / block_size) blocks: the last token is always computed, for its logits.

        Raises:
            ConfigError: If the request has too few keys.
        """
        hits = self._lookup.blocks(request)
        return hits, hits.size * self.block_size

    def get_computed_tail(self, request: KVRequest, num_hits: int) -> CachedTail | None:
        """Return what is cached of the block after its `num_hits` hits, if there is any and `prefix_match_unit` is on.

        Short of the last known token. Changes nothing. O(units per block) expected.

        Raises:
            ConfigError: If the request has too few keys.
        """
        return self._lookup.tail(request, num_hits)

    def allocate_slots(
        self,
        request: KVRequest,
        num_new_tokens: int,
        computed_blocks: Sequence[int] | Int32Array = NO_BLOCKS,
        *,
        computed_tail: CachedTail | None = None,
        num_lookahead_tokens: int = 0,
        has_scheduled_reqs: bool = False,
        full_sequence_must_fit: bool | None = None,
    ) -> Int32Array | None:
        """Give `request` slots for `num_new_tokens` beyond its computed ones and its hits. O(hits + blocks taken + blocks filled).

        Args:
            request: The request. Its `num_computed_tokens` is left to its owner, who adds hits and new tokens.
            num_new_tokens: Tokens to compute now, drafts included.
            computed_blocks: Its hits, as `get_computed_blocks` returned them. Only for a request that holds nothing yet.
            computed_tail: What `get_computed_tail` found behind them: its tokens are cached too, once they are copied.
            num_lookahead_tokens: Slots for drafts beyond that; never beyond max_model_len.
            has_scheduled_reqs: Something runs, so an admission must leave the watermark free.
            full_sequence_must_fit: An admission must find room for all known tokens; by default as in the settings.

        Returns:
            The blocks that its table has grown by, hits not included; None if they do not fit now.

        Raises:
            ConfigError: If the numbers cannot be, or a hit is stale; nothing has changed then.
        """
        plan = self._planner.plan(
            request,
            num_new_tokens,
            computed_blocks,
            computed_tail,
            num_lookahead_tokens=num_lookahead_tokens,
            has_scheduled_reqs=has_scheduled_reqs,
            full_sequence_must_fit=full_sequence_must_fit,
        )
        table, held, hits, needed, gated, kept_free, first_written, row, is_admission, registered, full, num_states = plan
        if self.policy is not None and not self.policy.make_room(
            plan.growth, computed_tail, num_states=num_states, priority=request.priority
        ):
            return None
        keys, replaced = request.block_keys, self._replaced
        num_replaced = grant_blocks(
            *self._arrays, table, held, hits, needed, gated, kept_free, first_written, keys, registered, full, replaced
        )
        if num_replaced == SHORTAGE:
            return None
        if is_admission:
            self._requests.open(request)
            states = self.pool.get_new_blocks(self.num_state_blocks)
            assert states is not None  # the grant has kept them free
            self._states[row] = states
        self.tables.num_blocks[row], self._num_registered[row] = max(needed, held), full
        if num_replaced:
            source, where = replaced[:, 0].tolist()
            if (num_tokens := request.num_computed_tokens - where * self.block_size) > 0:
                self._copies.append(BlockCopy(source, int(table[where]), num_tokens))
        if self.policy is not None:
            replaced, states = replaced[:, :num_replaced], self._states[row, :num_states]
            self._copies += self.policy.granted(
                request, row, plan.growth, computed_tail, registered=(registered, full), replaced=replaced, states=states
            )
        taken: Int32Array = table[held + hits.size : needed].copy()
        if self._events is not None and (taken.size or num_replaced or full > registered):
            self._events.granted(request, hits, table[:needed], registered, self._states[row, :num_states])
        return taken

    def take_copies(self) -> Sequence[BlockCopy]:
        """Return what the grants since the last call want copied: in this order, before the step computes anything. O(copies)."""
        if not self._copies:
            return ()
        copies, self._copies = self._copies, []
        if self._events is not None:
            self._events.copied(copies)
        return copies

    def note_computed(self, request: KVRequest) -> None:
        """Hear that its computed tokens are in their slots: with `prefix_match_unit`, hits may end at any of their units now.

        O(units newly computed), O(1) without `prefix_match_unit`.

        Raises:
            ConfigError: If it holds nothing, has too few keys, or has computed more than it holds.
        """
        if self._tails is not None:
            row = self._requests.expect(request)
            self._lookup.check_known(request)
            request.check_slots(num_new_tokens=1, num_slots_held=int(self.tables.num_blocks[row]) * self.block_size)
            self._tails.register(row, self.tables.of(row), request)

    def fork(self, parent: KVRequest, child: KVRequest) -> None:
        """Let `child`, which knows the same tokens, hold all blocks of `parent`. O(blocks).

        Its `num_computed_tokens` is left to its owner, who sets it to that of `parent`.

        Raises:
            ConfigError: If `parent` holds nothing, `child` holds something or knows other tokens, or requests have a state, which
                nobody can share; nothing has changed then.
        """
        row, table = self._requests.expect(parent), self.block_table(parent)
        if child in self._rows:
            raise child.error("holds blocks already: only a request that holds nothing can be forked into")
        self._lookup.check_fork(parent, child, row, table, num_registered=int(self._num_registered[row]))
        if self.num_state_blocks:
            raise child.error("cannot share a state of fixed size: compute its tokens anew instead")
        child.check_place(len(self._rows), len(self.tables.num_blocks))
        self.pool.share(table)
        place = self._requests.fork(row, child)
        if self._tails:
            self._tails.fork(row, place)

    def free_lookahead(self, request: KVRequest) -> int:
        """Give back the blocks beyond its computed tokens, once a step has told which drafts were right; return their number.

        O(blocks given back), more by log candidates under another eviction than lru.

        Raises:
            ConfigError: If the request holds nothing or has computed nothing.
        """
        row = self._requests.expect(request)
        if not 0 < request.num_computed_tokens <= self.tables.num_blocks[row] * self.block_size:
            raise request.error(f"{request.num_computed_tokens} computed tokens: needs 1 or more, each with a slot")
        kept = max(-(-request.num_computed_tokens // self.block_size), int(self._num_registered[row]))
        surplus = self.tables.of(row)[kept:]
        self._release(surplus)
        self.tables.num_blocks[row] = kept
        return surplus.size

    def free(self, request: KVRequest) -> None:
        """Take back all that a finished request holds: blocks without a key to the front of the queue, the others to the back.

        O(blocks), more by log candidates under another eviction than lru.

        Raises:
            ConfigError: If it holds nothing: it was never allocated, or freed before.
        """
        row = self._requests.expect(request)
        self._release(self.tables.of(row))
        self._release(self._states[row])
        self._requests.close(request)

    def preempt(self, request: KVRequest) -> None:
        """Free a request that will come back: nothing of it counts as computed any more, but its keys live on until reuse.

        O(blocks), as `free`.

        Raises:
            ConfigError: If it holds nothing.
        """
        self.free(request)
        request.num_computed_tokens = 0

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes and return True, if no request holds a block; else change nothing and return False.

        O(num_blocks), and of a False O(1).
        """
        done = self.pool.reset_prefix_cache()
        if done and self.policy:
            self.policy.clear()
        if done and self._events is not None:
            self._events.cleared()
        return done

    def check_integrity(self) -> None:
        """Raise IntegrityError unless reference counts, tables, rows and keys fit together. O(num_blocks + blocks held)."""
        self.pool.check_integrity()
        self._requests.check_integrity(self.pool)
        if self.policy:
            self.policy.check_integrity()
        if self._events is not None:
            self._events.check_integrity()
        for request, row in self._rows.items():
            if self._tails is not None and not self._tails.agree(row, self.tables.of(row), request):
                raise IntegrityError(f"units of the blocks {self.tables.of(row)} do not carry keys of {request.request_id!r}")

    def _release(self, blocks: Int32Array) -> None:
        release = release_blocks if self._freed_to_front else release_behind
        release(self.pool.blocks, self.pool.queue, blocks, blocks.size)
        if self.policy:
            self.policy.released(blocks)
