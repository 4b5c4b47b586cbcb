"""A prefill pass of SGLang's over requests that are objects: `pagedkv.scheduling.sglang_pass`, for who has no scheduler."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from pagedkv.radix_cache import RadixCache
from pagedkv.radix_node import TreeNode
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.sglang_budgets import (
    CHUNK_LEFT,
    CONTINUED,
    INPUT_LEFT,
    NO_LIMIT,
    NUM_PREFILLS,
    PassArrays,
    PassNumbers,
    begin_pass,
    current_left,
    is_spent,
    total_left,
)
from pagedkv.scheduling.sglang_pass import add_prefill, resume_prefill
from pagedkv.scheduling.sglang_request import SGLangRecords, SGLangRequest, records_of


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
    node: TreeNode | None
    """Where that ends which the cache has of it; None for a prompt that is being continued."""
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

    def numbers(self) -> PassNumbers:
        """Return those that are the same for every pass, for compiled code."""
        return PassNumbers(
            int(self.max_prefill_tokens),
            NO_LIMIT if self.chunk_tokens is None else int(self.chunk_tokens),
            NO_LIMIT if self.max_requests is None else int(self.max_requests),
            bool(self.caches_prefixes),
            bool(self.shortest_first),
            int(self.state_slots),
        )


class PrefillPass:
    """Takes requests one by one and says when to stop."""

    def __init__(self, cache: RadixCache, running: Sequence[SGLangRequest], limits: PassLimits) -> None:
        self.limits = limits
        self._cache, self._numbers = cache, limits.numbers()
        self._people = list(running)
        """Whoever was seen, those who run first: a place is a request's index for compiled code."""
        self._running = np.arange(len(running))
        self._arrays = PassArrays.empty(len(running) + 256)
        requests, records = self._records()
        begin_pass(
            self._arrays,
            self._numbers,
            requests,
            records,
            self._running,
            len(running),
            int(limits.num_mixed),
            float(limits.new_token_ratio),
        )

    @property
    def admitted(self) -> list[Prefill]:
        """What the pass has taken, in order."""
        done = self._arrays.prefills[: self._arrays.counters[NUM_PREFILLS]]
        return [
            Prefill(
                request=self._people[request],
                node=None if node == CONTINUED else TreeNode(self._cache.tree, node),
                start=start,
                end=end,
                chunked=bool(chunked),
            )
            for request, start, end, node, chunked in done.tolist()
        ]

    @property
    def total_left(self) -> float:
        """Slots that a new request may count on until its end."""
        return float(total_left(self._arrays, self._cache.free_slots))

    @property
    def current_left(self) -> int:
        """Slots that are left in this step."""
        return int(current_left(self._arrays, self._cache.free_slots))

    @property
    def input_left(self) -> int:
        """Tokens of the step that are left, of whole prompts."""
        return int(self._arrays.counters[INPUT_LEFT])

    @property
    def chunk_left(self) -> int | None:
        """Tokens of the step that are left, if prompts are cut."""
        return None if self.limits.chunk_tokens is None else int(self._arrays.counters[CHUNK_LEFT])

    @property
    def is_spent(self) -> bool:
        """Whether the step has no tokens left to compute: then nobody else is looked at."""
        return bool(is_spent(self._arrays))

    def resume(self, request: SGLangRequest, num_done: int, waiting: Iterable[SGLangRequest]) -> None:
        """Go on with a prompt of which `num_done` tokens are computed and held; `waiting` is the sorted queue."""
        index = len(self._people)
        self._people += [request, *waiting]
        requests, records = self._records()
        queue = np.arange(index + 1, len(self._people))
        resume_prefill(
            self._arrays,
            self._numbers,
            self._cache.free_slots,
            self._cache.block_size,
            requests,
            records,
            index,
            num_done,
            queue,
            0,
            queue.size,
            NO_LIMIT,
        )

    def add(self, request: SGLangRequest) -> Verdict:
        """Look `request` up and admit it if it fits; say whether to go on. O(tokens compared)."""
        index = len(self._people)
        self._people.append(request)
        requests, records = self._records()
        records["namespace"][index] = self._cache.tree.namespace_number(request.namespace)
        verdict = add_prefill(
            self._arrays,
            self._numbers,
            self._cache.arrays,
            self._cache.rules,
            requests,
            records,
            self._running,
            self._running.size,
            index,
            np.ascontiguousarray(request.known_tokens),
        )
        return tuple(Verdict)[verdict]

    def _records(self) -> tuple[RequestArrays, SGLangRecords]:
        return records_of(self._people)
