"""TensorRT-LLM's KV block manager: a tree of reusable blocks, matched to the token, evicted by retention priority.

Rules, not code, of its KVCacheManager; what it admits when (its capacity scheduler) is decided elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.retention import FOR_GOOD, RetentionRange, check_priority
from pagedkv.reuse_memory import ReuseMemory
from pagedkv.reuse_moves import OFFLOADED, ONBOARDED, UNSAID


@dataclass(slots=True, eq=False)
class _Holding:
    """What a live request holds: a row."""

    row: int
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

    def __init__(self, settings: KVPoolSettings) -> None:
        """Make an empty pool.

        Raises:
            ConfigError: If blocks are no power of two, with what would work.
        """
        self.memory = ReuseMemory(settings)
        """What rows hold, and what of it is stored."""
        self.num_slots = self.usable_slots = settings.num_slots
        self.max_model_len, self.max_num_seqs = settings.max_model_len, settings.max_num_seqs
        self.unit_slots, self.state_slots = self.memory.unit_slots, self.memory.state_slots
        self._holdings: dict[KVRequest, _Holding] = {}
        self._free_rows = list(range(settings.max_num_seqs))[::-1]

    @property
    def offloaded_slots(self) -> int:
        """Slots copied to the host so far."""
        return int(self.memory.pool.arrays.counts[OFFLOADED])

    @property
    def onboarded_slots(self) -> int:
        """Slots copied back so far."""
        return int(self.memory.pool.arrays.counts[ONBOARDED])

    @property
    def now(self) -> float:
        """The time that `advance` told last."""
        return self.memory.pool.gpu.now

    def advance(self, now: float) -> None:
        """Let it be `now`: retention priorities that have expired become 35.

        Raises:
            ConfigError: If time goes back.
        """
        if not now >= self.now:
            raise ConfigError(f"time {now} lies before {self.now}: it must not go back")
        for queue in (self.memory.pool.gpu, self.memory.pool.host):
            queue.advance(now)

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
        fits = -(-tokens // self.unit_slots) * self.unit_slots + self.state_slots <= self.num_slots
        return 0 if fits and tokens <= self.max_model_len else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the tokens of the longest stored prefix, matched to the token. O(num_tokens)."""
        self._check_known(request)
        num_cached = self.memory.find(request)
        self.memory.forget_found()
        return num_cached

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take blocks as tokens come, the whole prompt's at admission. O(num_tokens + blocks * log blocks)."""
        self._check_known(request)
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=self.num_slots_held(request))
        holding = self._holdings.get(request)
        if holding is None:
            request.check_place(len(self._holdings), self.max_num_seqs)
            return self._admit(request, num_new_tokens, self.memory.rules.watermark_blocks if has_scheduled_reqs else 0)
        num_slots = request.num_computed_tokens + num_new_tokens
        request.check_length(num_slots, self.max_model_len)
        if num_slots <= self.num_slots_held(request):  # compiled code has nothing to do
            return Grant()
        if not self.memory.grow(holding.row, num_slots):
            return None
        self.memory.forget_found()
        return Grant(copies=self.memory.copies())

    def note_computed(self, request: KVRequest) -> None:
        """Store the blocks that have become full. O(tokens in them).

        Raises:
            ConfigError: If the request holds nothing, or has more computed tokens than slots.
        """
        holding = self._holding(request)
        self._check_content(request)
        num_held = self.num_slots_held(request)
        if not 0 <= request.num_computed_tokens <= num_held:
            raise request.error(f"{request.num_computed_tokens} computed tokens: needs 0 up to the {num_held} slots it holds")
        holding.num_written = request.num_computed_tokens
        self.memory.note_computed(request, holding.row, holding.num_written)

    def free(self, request: KVRequest) -> None:
        """Store what it computed, but for its last token, and let go of its blocks, tail first. O(tokens to store + blocks)."""
        holding, memory = self._holding(request), self.memory
        self._check_content(request)
        memory.store(request, holding.row, holding.num_written)
        del self._holdings[request]
        number = int(memory.arrays.num_blocks[holding.row]) if holding.ranges or request.priority else 0
        memory.release(holding.row, [self._retention(request, holding, i * self.unit_slots) for i in range(number)])
        self._free_rows.append(holding.row)

    def preempt(self, request: KVRequest) -> None:
        """Give its blocks back; what is not evicted until it comes again, it finds."""
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold blocks."""
        return tuple(self._holdings)

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots of its blocks."""
        return self.memory.num_slots_of_row(self._holdings[request].row) if request in self._holdings else 0

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots of its blocks."""
        del group
        return self.memory.slots_of_row(self._holdings[request].row) if request in self._holdings else NO_SLOTS

    def cached_slots(self) -> Int64Array:
        """Return the slots of the stored blocks on the GPU that nobody holds, whole blocks. O(blocks log blocks)."""
        return self.memory.cached_slots()

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return self.memory.num_cached_slots

    @property
    def free_slots(self) -> int:
        """Slots of the blocks on the GPU that nobody holds."""
        return self.memory.free_slots

    def _admit(self, request: KVRequest, num_new_tokens: int, kept_free: int) -> Grant | None:
        num_cached, row = self.memory.find(request), self._free_rows[-1]
        try:
            request.check_length(num_cached + num_new_tokens, self.max_model_len)
            if not self.memory.admit(row, num_new_tokens, request.num_tokens, kept_free):
                return None
        finally:
            self.memory.forget_found()
        self._holdings[request] = _Holding(self._free_rows.pop(), num_cached)
        return Grant(num_cached, self.memory.copies())

    def _retention(self, request: KVRequest, holding: _Holding, token: int) -> tuple[int, float]:
        """Return what is said about the block that begins with `token`, UNSAID if nothing is."""
        for each in holding.ranges:
            if each.first <= token and (each.last is None or token < each.last):
                return each.priority, FOR_GOOD if each.duration is None else each.duration
        return request.priority or UNSAID, FOR_GOOD

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pool, tree and requests fit together. O(blocks + nodes)."""
        rows = [each.row for each in self._holdings.values()]
        self.memory.check_rows(rows)
        if sorted([*rows, *self._free_rows]) != list(range(self.max_num_seqs)):
            raise IntegrityError(f"rows {rows} and free ones {self._free_rows} are not the {self.max_num_seqs} that there are")

    def _holding(self, request: KVRequest) -> _Holding:
        if request not in self._holdings:
            raise request.holds_nothing()
        return self._holdings[request]

    def _check_content(self, request: KVRequest) -> None:
        try:
            check_priority(request.priority)
        except ConfigError as error:
            raise request.error(f"{error}, and 0 stands for that") from None
        tokens = request.token_ids
        if self.memory.shares(request) and (tokens.dtype != np.int32 or tokens.ndim != 1 or tokens.size < request.num_tokens):
            raise request.error(
                f"token_ids of type {tokens.dtype}, shape {tokens.shape}, for {request.num_tokens} known tokens: "
                f"needs int32 [{request.num_tokens}], or none at all to share nothing"
            )

    def _check_known(self, request: KVRequest) -> None:
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        self._check_content(request)
