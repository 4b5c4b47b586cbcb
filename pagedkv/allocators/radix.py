"""SGLang's allocator: requests share whole blocks through the radix tree that its server uses. Nothing is stored twice.

Source: behaviour of SGLang 0.5.23.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, NO_TOKENS, Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.radix_cache import RadixCache
from pagedkv.radix_node import TreeNode
from pagedkv.radix_rules import TreeRules
from pagedkv.slot_allocator import int32_array


@dataclass(slots=True, eq=False, kw_only=True)
class _Holding:
    """What one request holds: table[:num_shared] belongs to the tree, the rest of table[:num_slots] and the state to it alone."""

    table: Int32Array
    """Slot of token t at entry t, as long as the longest request; filled in whole blocks."""
    num_slots: int
    """Entries that are filled."""
    node: TreeNode
    """Where the shared part ends; it is locked once for this request."""
    num_shared: int
    """Leading tokens that lie in the tree's slots."""
    num_counted: int = 0
    """Leading tokens whose nodes have counted this request as a hit."""
    num_prompt_tokens: int
    """Tokens known at admission."""
    shares: bool
    """Whether the tree knows of it at all."""
    state: Int32Array
    """Slots of its state, whole blocks."""


@ALLOCATORS.register("radix")
class RadixAllocator:
    """One pool of blocks of `block_size` slots, SGLang's pages; slot = block * block_size + offset, and block 0 is padding.

    An admission locks the longest stored prefix of all tokens but the last. After each chunk of its prompt and when it is done, a
    request stores what it has computed, in whole blocks: where another was first, it gives its own slots back and holds the tree's
    (`slots_held` changes, its content does not). Decode steps and `preempt`, SGLang's retraction, store nothing.

    As in SGLang a lookup is a use: `get_computed_tokens` may split a node, and makes the prefix that it finds the most recent.

    Admission and insertion are O(tokens of the request + nodes met), a decode step is O(1) within a block and O(block_size) beyond
    it; an eviction adds O(nodes freed * log leaves).

    Example:
        >>> pool = KVPoolSettings(num_blocks=5, block_size=2, max_model_len=8, enable_prefix_caching=True)
        >>> allocator = RadixAllocator(pool)
        >>> tokens = np.array([7, 8, 9, 9, 5], np.int32)
        >>> first, second = (KVRequest(request_id=i, num_tokens=5, token_ids=tokens) for i in "ab")
        >>> allocator.allocate_slots(first, 5).num_cached_tokens
        0
        >>> first.num_computed_tokens = 5
        >>> allocator.note_computed(first)
        >>> allocator.allocate_slots(second, 1).num_cached_tokens
        4
        >>> allocator.slots_held(first).tolist(), allocator.slots_held(second).tolist()
        ([2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 8, 9])
    """

    name = "radix"
    placement = "block"
    num_groups = 1
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings, *, rules: TreeRules | None = None) -> None:
        """Make an empty pool; `rules` other than the server's make it SGLang's older tree.

        Raises:
            ConfigError: If there is no block besides the padding, or no such eviction policy.
        """
        self.cache = RadixCache(
            num_blocks=settings.num_blocks - 1, block_size=settings.block_size, eviction=settings.eviction, rules=rules
        )
        self.num_slots = settings.num_slots
        self.usable_slots = settings.num_slots - settings.block_size
        self.max_model_len = settings.max_model_len
        self.max_num_seqs = settings.max_num_seqs
        self.unit_slots = settings.block_size
        self.state_slots = self._whole_blocks(settings.state_slots)
        self._enable_caching = settings.enable_prefix_caching
        self._watermark_slots = int(settings.watermark * settings.num_blocks) * settings.block_size
        self._reserve_full_isl = settings.reserve_full_isl
        self._holdings: dict[KVRequest, _Holding] = {}

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if even the empty pool is too small."""
        return 0 if self._whole_blocks(prompt_tokens + output_tokens - 1) + self.state_slots <= self.usable_slots else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the tokens of the longest stored prefix, in whole blocks. It counts as used now. O(tokens compared)."""
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        return self.cache.tree.match_prefix(self._prefix(request), extra_key=request.namespace).slots.size

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take blocks as tokens come, evicting what is needed for them and no more than whole leaves demand."""
        holding = self._holdings.get(request)
        num_held = 0 if holding is None else holding.num_slots
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=num_held)
        num_tokens = request.num_computed_tokens + num_new_tokens
        request.check_length(num_tokens, self.max_model_len)
        if holding is None:
            return self._admit(request, num_new_tokens, self._watermark_slots if has_scheduled_reqs else 0)
        missing = self._whole_blocks(num_tokens) - num_held
        if missing > 0:
            if missing > self.free_slots:
                return None
            holding.table[num_held : num_held + missing] = self.cache.take(missing)
            holding.num_slots += missing
        return Grant()

    def note_computed(self, request: KVRequest) -> None:
        """Store the computed part of its prompt, and hold the tree's slots for it. Later tokens are stored when it is done.

        Raises:
            ConfigError: If it holds nothing or too little, or its token ids are too few.
        """
        holding = self._computed_holding(request)
        if not holding.shares or request.num_computed_tokens > holding.num_prompt_tokens:
            return
        tokens = self._store(request, holding)
        hit = self.cache.tree.match_prefix(tokens, extra_key=request.namespace)
        holding.table[: tokens.size] = hit.slots
        self.cache.tree.dec_lock_ref(holding.node)
        self.cache.tree.inc_lock_ref(hit.node)
        holding.node, holding.num_shared = hit.node, tokens.size

    def free(self, request: KVRequest) -> None:
        """Store all that it computed, in whole blocks; give back duplicates and the rest.

        Raises:
            ConfigError: If it holds nothing or too little, or its token ids are too few.
        """
        holding = self._computed_holding(request)
        self._release(request, holding, self._store(request, holding).size if holding.shares else 0)

    def preempt(self, request: KVRequest) -> None:
        """Give back its own slots without storing anything; what the tree has already, it may find when it comes again."""
        holding = self._holding(request)
        self._release(request, holding, holding.num_shared)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold slots."""
        return tuple(self._holdings)

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots of its blocks."""
        return self._holdings[request].num_slots if request in self._holdings else 0

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots of its blocks."""
        holding = self._holdings.get(request)
        return (NO_SLOTS if holding is None else holding.table[: holding.num_slots]).astype(np.int64)

    def cached_slots(self) -> Int64Array:
        """Return the slots of the nodes that nobody locks. O(nodes + slots)."""
        return self.cache.cached_slots()

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return self.cache.tree.evictable_size

    @property
    def free_slots(self) -> int:
        """Slots in the free list and in nodes that nobody locks."""
        return self.cache.free_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless free list, tree and holdings share out all slots, and each holding locks its prefix once."""
        locks, alone = Counter[TreeNode](), list[Int32Array]()
        for request, held in self._holdings.items():
            top, *path = held.node.path()
            shared = np.concatenate([NO_SLOTS, *(node.slots for node in path)])
            if top != self.cache.tree.root or not np.array_equal(shared, held.table[: held.num_shared]):
                raise IntegrityError(f"request {request.request_id!r} does not hold the prefix that it locks: {held}, {path}")
            locks.update(path)
            alone += [held.table[held.num_shared : held.num_slots], held.state]
        self.cache.check_integrity(alone)
        if wrong := [node for node in self.cache.tree.root.below() if node.lock_ref != locks[node]]:
            raise IntegrityError(f"locks that no request explains: {wrong}; holdings {list(self._holdings.values())}")

    def _admit(self, request: KVRequest, num_new_tokens: int, kept_free: int) -> Grant | None:
        request.check_place(len(self._holdings), self.max_num_seqs)
        prefix = self._prefix(request)
        num_cached, num_unlocked = self.cache.peek(prefix, request.namespace)
        num_tokens = num_cached + num_new_tokens
        request.check_length(num_tokens, self.max_model_len)
        gated = max(num_tokens, request.num_tokens) if self._reserve_full_isl else num_tokens
        needed = self._whole_blocks(gated) - num_cached + self.state_slots + kept_free
        if needed > self.free_slots - num_unlocked:
            return None
        hit = self.cache.tree.match_prefix(prefix, extra_key=request.namespace)
        self.cache.tree.inc_lock_ref(hit.node)  # first, so that no eviction for this request takes its own prefix
        num_slots = self._whole_blocks(num_tokens)
        taken = self.cache.take(num_slots - num_cached + self.state_slots)
        table: Int32Array = np.zeros(self._whole_blocks(self.max_model_len), np.int32)
        table[:num_cached] = hit.slots
        table[num_cached:num_slots] = taken[: num_slots - num_cached]
        self._holdings[request] = _Holding(
            table=table,
            num_slots=num_slots,
            node=hit.node,
            num_shared=num_cached,
            num_prompt_tokens=request.num_tokens,
            shares=self._shares(request),
            state=taken[num_slots - num_cached :],
        )
        return Grant(num_cached_tokens=num_cached)

    def _store(self, request: KVRequest, holding: _Holding) -> Int32Array:
        """Insert what it has computed, in whole blocks, and give its duplicates back; return the tokens inserted.

        A node counts a request once, however often this is called: else each would look twice used to lfu and slru.
        """
        end = max(request.num_computed_tokens // self.unit_slots * self.unit_slots, holding.num_shared)
        tokens = self._tokens(request, end)
        self.cache.store(
            tokens,
            holding.table[:end],
            namespace=request.namespace,
            held=holding.num_shared,
            hits_beyond=holding.num_counted,
            priority=request.priority,
        )
        holding.num_counted = end
        return tokens

    def _release(self, request: KVRequest, holding: _Holding, first: int) -> None:
        """Give back its state and the slots of its tokens from `first` on, and unlock its prefix."""
        self.cache.slots.free_segment(holding.table[first : holding.num_slots])
        self.cache.slots.free_segment(holding.state)
        self.cache.tree.dec_lock_ref(holding.node)
        del self._holdings[request]

    def _prefix(self, request: KVRequest) -> Int32Array:
        """Return the tokens to look up: all but the last, which is computed for its logits; none if it shares nothing."""
        return self._tokens(request, request.num_tokens)[:-1] if self._shares(request) else NO_TOKENS

    def _shares(self, request: KVRequest) -> bool:
        return self._enable_caching and request.token_ids.size > 0

    def _tokens(self, request: KVRequest, num_tokens: int) -> Int32Array:
        if request.token_ids.size < num_tokens:
            raise request.error(f"{request.token_ids.size} token ids for {num_tokens} tokens: extend them")
        return int32_array(request.token_ids[:num_tokens], what=f"token ids of request {request.request_id!r}")

    def _holding(self, request: KVRequest) -> _Holding:
        holding = self._holdings.get(request)
        if holding is None:
            raise request.holds_nothing()
        return holding

    def _computed_holding(self, request: KVRequest) -> _Holding:
        holding = self._holding(request)
        request.check_slots(num_new_tokens=1, num_slots_held=holding.num_slots)
        return holding

    def _whole_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.unit_slots) * self.unit_slots
