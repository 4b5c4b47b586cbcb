"""TensorRT-LLM's KV block manager: a tree of reusable blocks, matched to the token, evicted by retention priority.

Rules, not code, of its KVCacheManager; what it admits when (its capacity scheduler) is decided elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.allocation import NO_COPIES, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import Int64Array
from pagedkv.block_table import block_slots
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.retention import Retention, RetentionRange, check_priority
from pagedkv.reuse_pool import BlockCopies, ReusePool
from pagedkv.reuse_tree import ReuseMatch, ReuseNode


@dataclass(slots=True, eq=False)
class _Holding:
    """What a live request holds."""

    blocks: list[int]
    """Its blocks in order."""
    state: list[int]
    """The blocks of its state."""
    num_walked: int
    """Leading blocks whose content is in the tree, be it in the block of another request."""
    tail: ReuseNode | None
    """The node of the last of them."""
    num_written: int
    """Tokens known to be in their slots."""
    ranges: tuple[RetentionRange, ...] = ()
    """What `set_retention` said."""


@ALLOCATORS.register("tensorrt-llm")
class TensorRTLLMAllocator:
    """One pool of blocks of `block_size` slots; slot = block * block_size + offset. There is no null block.

    Storing. A block is stored when it is full, and at release the last one too, as far as it is filled; never the last token of the
    sequence, and only what `note_computed` was told of. The tree keeps one block per content: who comes second keeps a private
    copy, which is not stored, while what follows it is stored behind the first.

    Hits. All full blocks that match are shared; of the block that follows, what it begins with alike is taken over in place if
    nobody holds it and nothing is stored behind it (its other tokens are lost then), else copied into a new block. If not even one
    block would be left to copy from, it is taken over together with all behind it: the hit is the same.

    Eviction. Blank blocks go first, then leaves: blocks without a stored, free block behind them, lowest priority first, then the
    one released longest ago; the tail of a request is released first. A block of which only merged duplicates are in use can be
    a leaf with held blocks behind it: those become private, and are stored anew at their release.

    Retention priority. `KVRequest.priority` 0 says nothing: a block has 35 then, or what an earlier holder said. 1 to 100 are as
    given. `set_retention` says more, priority 0 included, for this admission. The last holder to release a block is believed.

    The host tier, of `offload_blocks` blocks, takes evicted blocks of priority 30 and more, evicting its own leaves by the same
    rules. Its slots are numbered from num_slots on and occur in `Grant.copies` only: to the host before a block of the GPU is used
    anew, and back on a hit. `offloaded_slots` and `onboarded_slots` count them: times the bytes of a slot that is the traffic.

    As the engine does, an admission takes the blocks of all known tokens at once, unless `reserve_full_isl` is off: then they come
    as tokens are computed. Blocks of state are taken at admission.
    """

    name = "tensorrt-llm"
    placement = "block"
    num_groups = 1
    rounding_slots = 0
    grows_while_free = True

    def __init__(self, settings: KVPoolSettings) -> None:
        size = settings.block_size
        if size < 2 or size & (size - 1):
            near = sorted({max(1 << size.bit_length() - 1, 2), 1 << size.bit_length()})
            raise ConfigError(
                f"block size {size}: tensorrt-llm needs a power of two, 2 or more; {' or '.join(map(str, near))} would work"
            )
        self.num_slots = self.usable_slots = settings.num_slots
        self.max_model_len, self.max_num_seqs = settings.max_model_len, settings.max_num_seqs
        self.unit_slots, self._num_blocks = size, settings.num_blocks
        self._num_state_blocks = -(-settings.state_slots // size)
        self.state_slots = self._num_state_blocks * size
        self._watermark_blocks = int(settings.watermark * settings.num_blocks)
        self._reserve_full_isl = settings.reserve_full_isl
        self._caching = settings.enable_prefix_caching
        self._holdings: dict[KVRequest, _Holding] = {}
        self._pool = ReusePool(num_blocks=settings.num_blocks, host_blocks=settings.offload_blocks, block_size=size)

    @property
    def offloaded_slots(self) -> int:
        """Slots copied to the host so far."""
        return self._pool.offloaded_slots

    @property
    def onboarded_slots(self) -> int:
        """Slots copied back so far."""
        return self._pool.onboarded_slots

    @property
    def now(self) -> float:
        """The time that `advance` told last."""
        return self._pool.gpu.queue.now

    def advance(self, now: float) -> None:
        """Let it be `now`: retention priorities that have expired become 35.

        Raises:
            ConfigError: If time goes back.
        """
        if not now >= self.now:
            raise ConfigError(f"time {now} lies before {self.now}: it must not go back")
        self._pool.gpu.queue.advance(now)
        self._pool.host.queue.advance(now)

    def set_retention(self, request: KVRequest, ranges: Sequence[RetentionRange]) -> None:
        """Say what the blocks of `request` are worth after its release; blocks outside of `ranges` follow its priority.

        Raises:
            ConfigError: If it holds nothing, or two ranges overlap.
        """
        holding = self._holding(request)
        ordered = sorted(ranges, key=lambda each: each.first)
        for one, other in zip(ordered, ordered[1:], strict=False):
            if one.last is None or one.last > other.first:
                raise request.error(f"retention ranges overlap: {one} and {other}; each token needs at most one")
        holding.ranges = tuple(ordered)

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if even the empty pool is too small."""
        tokens = prompt_tokens + output_tokens - 1
        fits = self._num_blocks_for(tokens) + self._num_state_blocks <= self._num_blocks
        return 0 if fits and tokens <= self.max_model_len else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the tokens of the longest stored prefix, matched to the token. O(num_tokens)."""
        self._check_known(request)
        return self._num_matched(self._match(request))

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take blocks as tokens come, the whole prompt's at admission. O(num_tokens + blocks * log blocks)."""
        self._check_known(request)
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=self.num_slots_held(request))
        holding = self._holdings.get(request)
        if holding is None:
            request.check_place(len(self._holdings), self.max_num_seqs)
            return self._admit(request, num_new_tokens, self._watermark_blocks if has_scheduled_reqs else 0)
        num_slots = request.num_computed_tokens + num_new_tokens
        request.check_length(num_slots, self.max_model_len)
        num_taken = self._num_blocks_for(num_slots) - len(holding.blocks)
        if num_taken > self._pool.gpu.num_free:
            return None
        copies: BlockCopies = []
        holding.blocks += [self._pool.take(copies) for _ in range(num_taken)]
        return self._grant(0, copies)

    def note_computed(self, request: KVRequest) -> None:
        """Store the blocks that have become full. O(tokens in them).

        Raises:
            ConfigError: If the request holds nothing, or has more computed tokens than slots.
        """
        holding = self._holding(request)
        self._check_content(request)
        if not 0 <= request.num_computed_tokens <= len(holding.blocks) * self.unit_slots:
            raise request.error(
                f"{request.num_computed_tokens} computed tokens: needs 0 up to the {self.num_slots_held(request)} slots it holds"
            )
        holding.num_written = request.num_computed_tokens
        num_full = min(holding.num_written, request.num_tokens - 1) // self.unit_slots
        if num_full > holding.num_walked and self._shares(request):
            self._store(request, holding, num_full * self.unit_slots)

    def free(self, request: KVRequest) -> None:
        """Store what it computed, but for its last token, and let go of its blocks, tail first. O(tokens to store + blocks)."""
        holding = self._holding(request)
        self._check_content(request)
        if self._shares(request):
            self._store(request, holding, min(holding.num_written, request.num_tokens - 1))
        del self._holdings[request]
        for i in reversed(range(len(holding.blocks))):
            self._pool.release(holding.blocks[i], self._retention(request, holding, i * self.unit_slots))
        for block in reversed(holding.state):
            self._pool.release(block, None)

    def preempt(self, request: KVRequest) -> None:
        """Give its blocks back; what is not evicted until it comes again, it finds."""
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold blocks."""
        return tuple(self._holdings)

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots of its blocks."""
        return len(self._holdings[request].blocks) * self.unit_slots if request in self._holdings else 0

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots of its blocks."""
        return block_slots(self._holdings[request].blocks if request in self._holdings else [], self.unit_slots)

    def cached_slots(self) -> Int64Array:
        """Return the slots of the stored blocks on the GPU that nobody holds, whole blocks. O(cached)."""
        return block_slots([node.block for node in self._pool.gpu.queue], self.unit_slots)

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return len(self._pool.gpu.queue) * self.unit_slots

    @property
    def free_slots(self) -> int:
        """Slots of the blocks on the GPU that nobody holds."""
        return self._pool.gpu.num_free * self.unit_slots

    def _admit(self, request: KVRequest, num_new_tokens: int, kept_free: int) -> Grant | None:
        pool, match = self._pool, self._match(request)
        path, partial, num_cached = match.path, match.partial, self._num_matched(match)
        request.check_length(num_cached + num_new_tokens, self.max_model_len)
        num_blocks = self._num_blocks_for(max(num_cached + num_new_tokens, request.num_tokens if self._reserve_full_isl else 0))
        num_taken = num_blocks + self._num_state_blocks - sum(map(pool.is_on_gpu, path))
        num_free = pool.gpu.num_free - sum(node in pool.gpu.queue for node in path)
        if num_taken + kept_free > num_free:
            return None
        copies: BlockCopies = []
        for node in path:
            pool.hold(node)
        taken_over: list[int] = []
        if partial is not None and partial in pool.gpu.queue and (not partial.children or num_taken == num_free):
            taken_over.append(pool.take_over(partial))
            partial = None
        elif partial is not None:
            pool.hold(partial)  # it must outlast this admission: its content is copied
        for node in path:
            if not pool.is_on_gpu(node):
                pool.onboard(node, copies)
        blocks = [node.block for node in path] + taken_over
        if partial is not None:
            blocks.append(pool.take_copy(partial, match.num_partial, copies))
        blocks += [pool.take(copies) for _ in range(num_blocks - len(blocks))]
        state = [pool.take(copies) for _ in range(self._num_state_blocks)]
        if partial is not None:
            pool.unhold(partial)
        self._holdings[request] = _Holding(blocks, state, len(path), path[-1] if path else None, num_cached)
        return self._grant(num_cached, copies)

    def _match(self, request: KVRequest) -> ReuseMatch:
        if not self._shares(request):
            return ReuseMatch([])
        return self._pool.tree.match(request.namespace, request.token_ids[: request.num_tokens - 1])

    def _num_matched(self, match: ReuseMatch) -> int:
        return len(match.path) * self.unit_slots + match.num_partial

    def _grant(self, num_cached_tokens: int, copies: BlockCopies) -> Grant:
        if not copies:
            return Grant(num_cached_tokens)
        size = self.unit_slots
        pairs = [np.array([[source * size, target * size]]) + np.arange(tokens)[:, None] for source, target, tokens in copies]
        return Grant(num_cached_tokens, np.concatenate((NO_COPIES, *pairs)))

    def _store(self, request: KVRequest, holding: _Holding, num_tokens: int) -> None:
        """Store the blocks of the first `num_tokens` tokens of a request, but for those whose content is stored already."""
        if holding.tail is not None and holding.tail.parent is None:  # evicted since: what lay behind it is not in the tree either
            holding.tail, holding.num_walked = None, 0
        first = holding.num_walked * self.unit_slots
        if num_tokens <= first:
            return
        node = holding.tail or self._pool.tree.root(request.namespace)
        for key in self._pool.tree.keys(request.token_ids[first:num_tokens].tobytes()):
            child = node.children.get(key)
            if child is None:
                child = self._pool.store(node, key, holding.blocks[holding.num_walked])
            holding.tail = node = child
            holding.num_walked += 1

    def _retention(self, request: KVRequest, holding: _Holding, token: int) -> Retention | None:
        """Return what is said about the block that begins with `token`, None if nothing is."""
        for each in holding.ranges:
            if each.first <= token and (each.last is None or token < each.last):
                return Retention(each.priority, each.duration)
        return Retention(request.priority) if request.priority else None

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pool, tree and requests fit together. O(blocks + nodes)."""
        self._pool.check_integrity([block for each in self._holdings.values() for block in (*each.blocks, *each.state)])
        for request, holding in self._holdings.items():
            walked = [] if holding.tail is None or holding.tail.parent is None else holding.tail.path()
            fits = not walked or len(walked) == holding.num_walked
            if not fits or len(holding.state) != self._num_state_blocks or holding.num_walked > len(holding.blocks):
                raise IntegrityError(f"request {request.request_id!r} holds what does not fit together: {holding}, path {walked}")

    def _holding(self, request: KVRequest) -> _Holding:
        if request not in self._holdings:
            raise request.holds_nothing()
        return self._holdings[request]

    def _shares(self, request: KVRequest) -> bool:
        return self._caching and bool(len(request.token_ids))

    def _check_content(self, request: KVRequest) -> None:
        try:
            check_priority(request.priority)
        except ConfigError as error:
            raise request.error(f"{error}, and 0 stands for that") from None
        tokens = request.token_ids
        if self._shares(request) and (tokens.dtype != np.int32 or tokens.ndim != 1 or tokens.size < request.num_tokens):
            raise request.error(
                f"token_ids of type {tokens.dtype}, shape {tokens.shape}, for {request.num_tokens} known tokens: "
                f"needs int32 [{request.num_tokens}], or none at all to share nothing"
            )

    def _check_known(self, request: KVRequest) -> None:
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        self._check_content(request)

    def _num_blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self.unit_slots)
