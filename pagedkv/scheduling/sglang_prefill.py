"""Which waiting requests SGLang prefills together: one pass over the sorted queue, charging budgets. Nothing is allocated in it.

Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py).
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from pagedkv.radix_cache import RadixCache
from pagedkv.radix_node import PrefixMatch
from pagedkv.scheduling.sglang_request import MAX_NEW_TOKENS_COUNTED, SGLangRequest

IGNORE_EOS_RESERVE = 1
"""Tokens per request that must stay free at any time when outputs are known. Source: SGLang 0.5.23."""


class Verdict(Enum):
    """Whether the pass goes on to the next request."""

    CONTINUE = "continue"
    NO_TOKEN = "no_token"
    """KV memory is spoken for."""
    OTHER = "other"
    """The budget of the step is spent, or a limit reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """What one request computes in the step. Its prefix is locked, once, unless it is the continued one."""

    request: SGLangRequest
    hit: PrefixMatch | None
    """What the cache has of it; None for a prompt that is being continued."""
    start: int
    """First token to compute."""
    end: int
    """One past the last."""
    chunked: bool
    """More of it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLimits:
    """What bounds a pass."""

    max_prefill_tokens: int
    """Prompt tokens of a step; the last one admitted may exceed it."""
    chunk_tokens: int | None = None
    """Prompt tokens of a step, a prompt being cut to it; None: prompts are computed whole."""
    max_requests: int | None = None
    """Requests of a step."""
    num_mixed: int = 0
    """Decode tokens that share the step."""
    new_token_ratio: float
    """Share of its possible output that a running request is expected to make still."""
    caches_prefixes: bool = True
    shortest_first: bool = False
    """Policy shortest-prefill-first: a prompt in pieces leaves room for shorter ones, and no second one is cut."""
    state_slots: int = 0
    """Slots that a request takes for its state besides."""


def reserved_tokens(request: SGLangRequest, new_token_ratio: float) -> float:
    """Return what a running request is expected to need still."""
    ratio = 1 if request.ignore_eos else new_token_ratio
    return min(request.max_new_tokens - request.num_output_tokens, MAX_NEW_TOKENS_COUNTED) * ratio


class PrefillPass:
    """Takes requests one by one and says when to stop.

    Its budgets are `total_left`, what is free or evictable now less what running and admitted requests may come to need;
    `current_left`, the same less what this step takes; `input_left` and `chunk_left`, tokens of the step.
    """

    def __init__(self, cache: RadixCache, running: Sequence[SGLangRequest], limits: PassLimits) -> None:
        self.admitted: list[Prefill] = []
        self.limits = limits
        self.input_left = limits.max_prefill_tokens - limits.num_mixed
        self.chunk_left = None if limits.chunk_tokens is None else limits.chunk_tokens - limits.num_mixed
        self._cache = cache
        self._running = running
        self._total_offset: float = limits.num_mixed
        self._total_offset += sum([reserved_tokens(request, limits.new_token_ratio) for request in running])
        self._current_offset = limits.num_mixed
        self._outlook: list[tuple[float, int]] | None = None
        self._half_done = False

    @property
    def total_left(self) -> float:
        """Slots that a new request may count on until its end."""
        return self._cache.free_slots - self._total_offset

    @property
    def current_left(self) -> int:
        """Slots that are left in this step."""
        return self._cache.free_slots - self._current_offset

    @property
    def verdict(self) -> Verdict:
        """Whether the budgets leave room for another request."""
        if self.total_left <= 0 or self.current_left <= 0:
            return Verdict.NO_TOKEN
        return Verdict.OTHER if self.is_spent else Verdict.CONTINUE

    @property
    def is_spent(self) -> bool:
        """Whether the step has no tokens left to compute: then nobody else is looked at."""
        return self.input_left <= 0 or (self.chunk_left is not None and self.chunk_left <= 0)

    def resume(self, request: SGLangRequest, num_done: int, waiting: Iterable[SGLangRequest], *, most: int | None = None) -> None:
        """Go on with a prompt of which `num_done` tokens are computed and held; `waiting` is the sorted queue.

        It is never refused for what it may need later. Nothing happens if the step has no token left for it, or `most` is 0.
        """
        assert self.chunk_left is not None
        rest = request.num_tokens - num_done
        chunk = min(self.chunk_left, int(self.total_left))
        if chunk <= 0:
            chunk = self.chunk_left
        if self.limits.shortest_first:
            chunk = min(chunk, self._left_by_shorter(rest, waiting))
        if most is not None:
            chunk = min(chunk, most)
        if chunk <= 0:
            return
        self._half_done = chunk < rest
        self._admit(request, None, num_done, num_done + min(rest, chunk), chunked=self._half_done)

    def add(self, request: SGLangRequest) -> Verdict:
        """Look `request` up and admit it if it fits; say whether to go on. O(tokens compared)."""
        if self.limits.max_requests is not None and len(self.admitted) >= self.limits.max_requests:
            return Verdict.OTHER
        hit = self._cache.tree.match_prefix(request.known_tokens[:-1], extra_key=request.namespace)
        self._cache.tree.inc_lock_ref(hit.node)
        start = hit.slots.size
        end = self._end(request, start)
        if isinstance(end, Verdict):
            self._cache.tree.dec_lock_ref(hit.node)
            return end
        self._admit(request, hit, start, end, chunked=end < request.num_tokens)
        return self.verdict

    def _end(self, request: SGLangRequest, start: int) -> int | Verdict:
        """Return how far to compute `request`, whose first `start` tokens are cached and locked, or why not to."""
        num_new, block_size = request.num_tokens - start, self._cache.block_size
        if request.ignore_eos and not self.limits.caches_prefixes:
            if not self._outlasts(request, num_new):
                return Verdict.NO_TOKEN
        elif slots_to_finish(request, num_new, block_size) + self.limits.state_slots >= self.total_left:
            return Verdict.NO_TOKEN
        elif self.chunk_left is None and self.admitted and self._whole_blocks(num_new) >= self.input_left:
            return Verdict.OTHER
        if self.chunk_left is None or self._whole_blocks(num_new) <= self.chunk_left:
            return request.num_tokens
        end = (start + self.chunk_left) // block_size * block_size
        return Verdict.OTHER if end <= start or (self._half_done and self.limits.shortest_first) else end

    def _admit(self, request: SGLangRequest, hit: PrefixMatch | None, start: int, end: int, *, chunked: bool) -> None:
        self.admitted.append(Prefill(request=request, hit=hit, start=start, end=end, chunked=chunked))
        computed = self._whole_blocks(end - start)
        slots = computed + self._cache.block_size + (self.limits.state_slots if hit is not None else 0)
        self._current_offset += slots
        self._total_offset += slots + (0 if chunked else min(request.max_new_tokens, MAX_NEW_TOKENS_COUNTED))
        self.input_left -= computed
        if self.chunk_left is not None:
            self.chunk_left -= computed

    def _left_by_shorter(self, rest: int, waiting: Iterable[SGLangRequest]) -> int:
        """Return what a prompt with `rest` tokens to go may compute, so that shorter ones find room in the step."""
        assert self.chunk_left is not None
        budget, block_size, shorter = self.chunk_left, self._cache.block_size, 0
        if budget < 2 * block_size:
            return budget
        for request in waiting:
            needed = self._whole_blocks(request.num_uncached_tokens)
            if request.num_uncached_tokens >= rest or shorter + needed > budget - block_size:
                break
            shorter += needed
        return (budget - shorter) // block_size * block_size if shorter else budget

    def _outlasts(self, request: SGLangRequest, num_new: int) -> bool:
        """Return whether memory suffices at every end of a request, if all outputs have the length expected. O(requests)."""
        slots = self._whole_blocks(num_new) + self._cache.block_size + self.limits.state_slots
        if slots > min(self.current_left, self.total_left):
            return False
        if self._outlook is None:
            others = [*self._running, *(prefill.request for prefill in self.admitted)]
            self._outlook = sorted(filter(None, map(self._outlook_of, [request, *others])), key=lambda ends: ends[0])
        elif (outlook := self._outlook_of(request)) is not None:
            place = min(bisect_left(self._outlook, outlook[0], key=lambda ends: ends[0]), max(len(self._outlook) - 1, 0))
            self._outlook.insert(place, outlook)
        free = self.current_left - slots
        for i, (tokens_left, tokens_held) in enumerate(self._outlook):
            alive = len(self._outlook) - i
            if free - tokens_left * alive <= IGNORE_EOS_RESERVE * alive:
                return False
            free += tokens_held
        return True

    def _outlook_of(self, request: SGLangRequest) -> tuple[float, int] | None:
        """Return how many tokens `request` will make still and how many it holds now; None if it makes none."""
        ratio = 1.0 if request.ignore_eos else self.limits.new_token_ratio
        left = request.max_new_tokens * ratio - request.num_output_tokens
        return (left, request.num_tokens) if left > 0 else None

    def _whole_blocks(self, num_tokens: int) -> int:
        block_size = self._cache.block_size
        return -(-num_tokens // block_size) * block_size


def slots_to_finish(request: SGLangRequest, num_new_tokens: int, block_size: int) -> int:
    """Return what must be less than the slots that `request` may count on: its tokens, its possible output, a block to round up."""
    output = min(max(request.max_new_tokens - request.num_output_tokens, 0), MAX_NEW_TOKENS_COUNTED)
    return num_new_tokens + output + block_size


def fits_alone(request: SGLangRequest, limits: PassLimits, *, usable_slots: int, block_size: int) -> bool:
    """Return whether `request` would be admitted if nobody else were there. What it finds in the cache makes no difference."""
    if request.ignore_eos and not limits.caches_prefixes:
        slots = (-(-request.num_tokens // block_size) + 1) * block_size + limits.state_slots
        return slots + max(request.max_new_tokens - request.num_output_tokens, 0) + IGNORE_EOS_RESERVE < usable_slots
    return slots_to_finish(request, request.num_tokens, block_size) + limits.state_slots < usable_slots
