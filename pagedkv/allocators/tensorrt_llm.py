"""TensorRT-LLM's KV block manager: a tree of reusable blocks, matched to the token, evicted by retention priority.

Rules, not code, of its KVCacheManager; what it admits when (its capacity scheduler) is decided elsewhere.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.allocation import NO_COPIES, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.block_table import block_slots
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.jit import fixed_types
from pagedkv.kv_request import KVRequest
from pagedkv.retention import FOR_GOOD, RetentionRange, check_priority
from pagedkv.reuse_moves import NUM_COPIES, OFFLOADED, ONBOARDED, UNSAID
from pagedkv.reuse_nodes import NO_NODE
from pagedkv.reuse_pool import ReusePool
from pagedkv.reuse_rows import (
    NOTHING_FOUND,
    NUM_HITS,
    ReuseArrays,
    ReuseRules,
    admit_row,
    find_prefix,
    grow_row,
    note_row,
    release_row,
    store_row,
)
from pagedkv.token_source import GivenTokens


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
        size = settings.block_size
        if size < 2 or size & (size - 1):
            near = sorted({max(1 << size.bit_length() - 1, 2), 1 << size.bit_length()})
            raise ConfigError(
                f"block size {size}: tensorrt-llm needs a power of two, 2 or more; {' or '.join(map(str, near))} would work"
            )
        self.num_slots = self.usable_slots = settings.num_slots
        self.max_model_len, self.max_num_seqs = settings.max_model_len, settings.max_num_seqs
        self.unit_slots = size
        num_state_blocks = -(-settings.state_slots // size)
        self.state_slots = num_state_blocks * size
        self.rules = ReuseRules(
            size,
            int(settings.watermark * settings.num_blocks),
            bool(settings.reserve_full_isl),
            bool(settings.enable_prefix_caching),
        )
        max_blocks = min(-(-settings.max_model_len // size), settings.num_blocks)
        self._holdings: dict[KVRequest, _Holding] = {}
        self._free_rows = list(range(settings.max_num_seqs))[::-1]
        self._pool = ReusePool(
            num_blocks=settings.num_blocks,
            host_blocks=settings.offload_blocks,
            block_size=size,
            max_path=-(-settings.max_model_len // size),
            max_copies=2 * (max_blocks + num_state_blocks) + 1,
        )
        self.arrays = ReuseArrays.empty(
            self._pool.arrays, max_num_seqs=settings.max_num_seqs, max_blocks=max_blocks, num_state_blocks=num_state_blocks
        )
        # Their arguments have the same types in every call.
        self._find, self._admit_row, self._grow = fixed_types(find_prefix), fixed_types(admit_row), fixed_types(grow_row)
        self._note, self._store, self._release = fixed_types(note_row), fixed_types(store_row), fixed_types(release_row)

    @property
    def offloaded_slots(self) -> int:
        """Slots copied to the host so far."""
        return int(self._pool.arrays.counts[OFFLOADED])

    @property
    def onboarded_slots(self) -> int:
        """Slots copied back so far."""
        return int(self._pool.arrays.counts[ONBOARDED])

    @property
    def now(self) -> float:
        """The time that `advance` told last."""
        return self._pool.gpu.now

    def advance(self, now: float) -> None:
        """Let it be `now`: retention priorities that have expired become 35.

        Raises:
            ConfigError: If time goes back.
        """
        if not now >= self.now:
            raise ConfigError(f"time {now} lies before {self.now}: it must not go back")
        for queue in (self._pool.gpu, self._pool.host):
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
        fits = self._num_blocks_for(tokens) * self.unit_slots + self.state_slots <= self.num_slots
        return 0 if fits and tokens <= self.max_model_len else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the tokens of the longest stored prefix, matched to the token. O(num_tokens)."""
        self._check_known(request)
        num_cached = self._match(request)
        self._clear()
        return num_cached

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take blocks as tokens come, the whole prompt's at admission. O(num_tokens + blocks * log blocks)."""
        self._check_known(request)
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=self.num_slots_held(request))
        holding = self._holdings.get(request)
        if holding is None:
            request.check_place(len(self._holdings), self.max_num_seqs)
            return self._admit(request, num_new_tokens, self.rules.watermark_blocks if has_scheduled_reqs else 0)
        num_slots = request.num_computed_tokens + num_new_tokens
        request.check_length(num_slots, self.max_model_len)
        if num_slots <= self.num_slots_held(request):  # compiled code has nothing to do
            return Grant()
        if not self._grow(self.arrays, self.rules, holding.row, num_slots):
            return None
        self._clear()
        return self._grant(0)

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
        num_full = min(holding.num_written, request.num_tokens - 1) // self.unit_slots
        if num_full > self.arrays.rows["num_stored"][holding.row] and self._shares(request):
            root, source = self._pool.tree.root(request.namespace), GivenTokens(np.ascontiguousarray(request.token_ids))
            self._note(self.arrays, self.rules, root, source, holding.row, holding.num_written, request.num_tokens)
            self._clear()

    def free(self, request: KVRequest) -> None:
        """Store what it computed, but for its last token, and let go of its blocks, tail first. O(tokens to store + blocks)."""
        holding, memory = self._holding(request), self.arrays
        self._check_content(request)
        if self._shares(request):
            root, source = self._pool.tree.root(request.namespace), GivenTokens(np.ascontiguousarray(request.token_ids))
            self._store(memory, self.rules, root, source, holding.row, min(holding.num_written, request.num_tokens - 1))
        del self._holdings[request]
        number = int(memory.num_blocks[holding.row]) if holding.ranges or request.priority else 0
        for i in range(number):
            memory.said[i] = self._retention(request, holding, i * self.unit_slots)
        self._release(memory, holding.row)
        memory.said[:number] = UNSAID, 0.0
        self._free_rows.append(holding.row)
        self._clear()

    def preempt(self, request: KVRequest) -> None:
        """Give its blocks back; what is not evicted until it comes again, it finds."""
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold blocks."""
        return tuple(self._holdings)

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots of its blocks."""
        return int(self.arrays.num_blocks[self._holdings[request].row]) * self.unit_slots if request in self._holdings else 0

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots of its blocks."""
        del group
        return self.slots_of_row(self._holdings[request].row) if request in self._holdings else NO_SLOTS

    def slots_of_row(self, row: int) -> Int64Array:
        """Return the slots of the blocks in the table of `row`."""
        return block_slots(self.arrays.tables[row, : self.arrays.num_blocks[row]], self.unit_slots)

    def cached_slots(self) -> Int64Array:
        """Return the slots of the stored blocks on the GPU that nobody holds, whole blocks. O(blocks log blocks)."""
        return block_slots(self._pool.cached_blocks(), self.unit_slots)

    def taken_slots(self) -> Int64Array:
        """Return the slots of blocks that somebody holds, be it for state."""
        return block_slots(np.flatnonzero(self._pool.arrays.ref_cnt), self.unit_slots)

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return len(self._pool.gpu) * self.unit_slots

    @property
    def free_slots(self) -> int:
        """Slots of the blocks on the GPU that nobody holds."""
        return self._pool.num_free * self.unit_slots

    def _admit(self, request: KVRequest, num_new_tokens: int, kept_free: int) -> Grant | None:
        num_cached, row = self._match(request), self._free_rows[-1]
        try:
            request.check_length(num_cached + num_new_tokens, self.max_model_len)
            if not self._admit_row(self.arrays, self.rules, row, num_new_tokens, request.num_tokens, kept_free):
                return None
        finally:
            self._clear()
        self._holdings[request] = _Holding(self._free_rows.pop(), num_cached)
        return self._grant(num_cached)

    def _match(self, request: KVRequest) -> int:
        if not self._shares(request):
            return 0
        root, source = self._pool.tree.find_root(request.namespace), GivenTokens(np.ascontiguousarray(request.token_ids))
        return int(self._find(self.arrays, self.rules, root, source, request.num_tokens))

    def _clear(self) -> None:
        """Leave no trace of what was looked for: a call that fails changes nothing."""
        tree = self._pool.tree.arrays
        tree.path[: self.arrays.found[NUM_HITS]] = tree.key[:] = 0
        self.arrays.found[:] = NOTHING_FOUND

    def _grant(self, num_cached_tokens: int) -> Grant:
        pool, size = self._pool.arrays, self.unit_slots
        copies = pool.copies[: pool.counts[NUM_COPIES]].tolist()
        if not copies:
            return Grant(num_cached_tokens)
        pairs = [np.array([[source * size, target * size]]) + np.arange(tokens)[:, None] for source, target, tokens in copies]
        return Grant(num_cached_tokens, np.concatenate((NO_COPIES, *pairs)))

    def _retention(self, request: KVRequest, holding: _Holding, token: int) -> tuple[int, float]:
        """Return what is said about the block that begins with `token`, UNSAID if nothing is."""
        for each in holding.ranges:
            if each.first <= token and (each.last is None or token < each.last):
                return each.priority, FOR_GOOD if each.duration is None else each.duration
        return request.priority or UNSAID, FOR_GOOD

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pool, tree and requests fit together. O(blocks + nodes)."""
        rows = [each.row for each in self._holdings.values()]
        self.check_rows(rows)
        if sorted([*rows, *self._free_rows]) != list(range(self.max_num_seqs)):
            raise IntegrityError(f"rows {rows} and free ones {self._free_rows} are not the {self.max_num_seqs} that there are")

    def check_rows(self, rows: Sequence[int]) -> None:
        """Raise IntegrityError unless pool and tree fit together, and with what `rows`, and no others, hold. O(blocks + nodes)."""
        memory, nodes = self.arrays, self._pool.tree.arrays.nodes
        tables = [memory.tables[row, : memory.num_blocks[row]].tolist() for row in rows]
        self._pool.check_integrity([*itertools.chain(*tables), *memory.states[rows].ravel().tolist()])
        for row in rows:
            number, tail = memory.rows[["num_stored", "tail"]][row].item()
            there = tail != NO_NODE and nodes["stamp"][tail] == memory.rows["tail_stamp"][row]
            depth = len(self._pool.tree.tokens_up_to(tail)) if there else number * self.unit_slots
            if depth != number * self.unit_slots or number > memory.num_blocks[row]:
                raise IntegrityError(
                    f"row {row} has {number} stored blocks of {memory.num_blocks[row]}, its tail is at token {depth}"
                )
        others = np.delete(memory.num_blocks, rows)
        if others.any():
            raise IntegrityError(f"rows that nobody has hold blocks: {memory.num_blocks.tolist()}, held are {rows}")

    def _holding(self, request: KVRequest) -> _Holding:
        if request not in self._holdings:
            raise request.holds_nothing()
        return self._holdings[request]

    def _shares(self, request: KVRequest) -> bool:
        return self.rules.caches and bool(len(request.token_ids))

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
