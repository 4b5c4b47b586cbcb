"""SGLang's scheduler as arrays and numbers for compiled code: what kind of engine it is."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int32Array, Int64Array
from pagedkv.scheduling.content import NO_SEGMENTS, Segments
from pagedkv.scheduling.sglang_budgets import PassArrays, PassNumbers
from pagedkv.scheduling.sglang_order import RANDOM, FcfsQueue, QueueArrays
from pagedkv.scheduling.sglang_queue import QUEUE_POLICIES
from pagedkv.scheduling.sglang_request import SGLANG_REQUEST, SGLangRecords
from pagedkv.scheduling.sglang_retraction import NewTokenRatio, Shortage
from pagedkv.scheduling.sglang_settings import SGLangSettings

(
    BATCH_SIZE,
    HALF_DONE,
    FULL,
    NUM_PASSES,
    NUM_PREFILLED,
    NUM_JOINED,
    NUM_RESUMED,
    NUM_COMPUTING,
    NUM_DECODING,
    CHANCE,
    NUM_COUNTERS,
) = range(11)
"""In `SGLangEngine.counters`: entries of `batch`; the request whose prompt is computed in pieces, or NOBODY; why nobody is admitted
before somebody leaves, of the blockers, NOBODY_WAITS if that is not so; prefill passes, prompt tokens that the engine has computed
and requests that have joined the queue so far; in the step decided last, whether the prompt in pieces goes on, how many prefill,
that one included, and how many decode; how it stands with the order that policy random needs for a pass."""
NOBODY = -1
NO_CHANCE, WANTED, READY = range(3)
"""In counters[CHANCE]: no order is there; the step cannot be decided without one; it is in `queue.shuffle`."""


class SGLangNumbers(NamedTuple):
    """Limits and rules, as plain numbers."""

    max_running_requests: int
    max_model_len: int
    policy: int
    """A place in QUEUE_POLICIES."""
    matches: bool
    longest_queue: int
    enable_mixed_chunk: bool
    num_speculative_tokens: int


class SGLangEngine(NamedTuple):
    """Limits, and the state besides who runs and who waits."""

    numbers: SGLangNumbers
    ratio_rules: NewTokenRatio
    limits: PassNumbers
    records: SGLangRecords
    """By request."""
    segments: Segments
    """What requests share."""
    batch: Int64Array
    """Who decodes, in SGLang's order; who was finished by the last decode step is in it until the next one."""
    counters: Int64Array
    ratio: Float64Array
    """Length 1: which share of their possible output running requests are expected to make."""
    one: PassArrays
    """The prefill pass of the step decided last."""
    short: Shortage
    queue: FcfsQueue | QueueArrays
    """What it takes to sort the queue."""
    tokens: Int32Array
    """Room for the tokens of one request."""

    @classmethod
    def of(cls, settings: SGLangSettings, *, state_slots: int, caches_prefixes: bool) -> "SGLangEngine":
        """Return the one of `settings`, with nobody in it."""
        name = settings.schedule_policy
        if QUEUE_POLICIES[name].matches and not caches_prefixes:
            name = "fcfs"
        policy = QUEUE_POLICIES[name]
        rows = int(settings.max_running_requests)
        counters, ratio = np.zeros(NUM_COUNTERS, np.int64), NewTokenRatio.of(settings.schedule_conservativeness)
        counters[HALF_DONE] = NOBODY
        return cls(
            SGLangNumbers(
                rows,
                int(settings.max_model_len),
                tuple(QUEUE_POLICIES).index(name),
                policy.matches,
                policy.longest_queue,
                bool(settings.enable_mixed_chunk),
                int(settings.num_speculative_tokens),
            ),
            ratio,
            settings.pass_limits(caches_prefixes=caches_prefixes, state_slots=state_slots),
            np.zeros(1, SGLANG_REQUEST),
            NO_SEGMENTS,
            np.zeros(2 * rows + 2, np.int64),
            counters,
            np.array([ratio.initial]),
            PassArrays.empty(rows),
            Shortage.empty(rows),
            FcfsQueue() if name == "fcfs" else QueueArrays.empty(1, num_keys=1),
            np.zeros(int(settings.max_model_len) + 1, np.int32),
        )

    @property
    def is_random(self) -> bool:
        """Whether it needs chance from outside."""
        return self.numbers.policy == RANDOM

    def with_room(self, num_requests: int, num_waiting: int, segments: Segments) -> "SGLangEngine":
        """Return the same with room for so many requests and so many who wait; `segments` is what they share now."""
        engine = self if segments is self.segments else self._replace(segments=segments)
        if num_requests > self.records.size:
            records = np.zeros(max(num_requests, 2 * self.records.size), SGLANG_REQUEST)
            records[: self.records.size] = self.records
            engine = engine._replace(records=records)
        num_keys = engine.records.size + 1  # at most one of its own each, and none
        queue = self.queue
        if isinstance(queue, QueueArrays) and (num_waiting > queue.shuffle.size or num_keys > queue.keyed.size):
            engine = engine._replace(queue=QueueArrays.empty(num_waiting, num_keys=num_keys))
        return engine
