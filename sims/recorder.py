"""Watches a run: the memory's state integrated over time, where time goes, when tokens come. It decides nothing."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int32Array, Int64Array, joined
from pagedkv.jit import jit
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.scheduler import Blocker, Scheduler, Step
from pagedkv.scheduling.waiting import NUM_RUNNING, NUM_WAITING, SchedulerArrays
from pagedkv.sims.records import Outcome, RequestLog, TokenTimes
from pagedkv.sims.step_time import StepCost
from pagedkv.sims.timeline import TimelineArrays, count_preemptions, observe
from pagedkv.step_batch import StepBatch

KV_KINDS = ("tokens", "reserved", "internal", "external", "cached", "state", "free")
"""What a slot of the pool can be: docs/metrics.md. `cached` stays 0 until prefixes are modelled."""
TOKENS, RESERVED, INTERNAL, EXTERNAL, _CACHED, STATE, FREE, RUNNING, WAITING = range(9)
NUM_GAUGES = len(KV_KINDS) + 2
BLOCKERS = tuple(Blocker)

# Inter-token latencies are counted in bins that are 0.1 % wide, from 1 microsecond up: constant memory, percentiles within 0.05 %.
ITL_SMALLEST_S = 1e-6
ITL_BIN_RATIO = 1.001
ITL_BINS = 28_000


class Integrals(NamedTuple):
    """What is summed up over the measured window."""

    gauges: Float64Array
    """By gauge: slots (or requests) × seconds."""
    gauges_when_waiting: Float64Array
    """The same over the time when requests waited."""
    observed_s: Float64Array
    """Length 2: seconds in all, and seconds when requests waited."""
    blocked_s: Float64Array
    """By `Blocker`: seconds for which the head of the queue was held up by it."""
    cost_s: Float64Array
    """By part of `StepCost`: seconds."""
    itl_bins: Int64Array
    """Gaps between output tokens of measured requests, by length."""
    itl_sum_s: Float64Array
    """Length 1."""

    @classmethod
    def empty(cls) -> "Integrals":
        """Return sums of nothing."""
        return cls(
            gauges=np.zeros(NUM_GAUGES),
            gauges_when_waiting=np.zeros(NUM_GAUGES),
            observed_s=np.zeros(2),
            blocked_s=np.zeros(len(BLOCKERS)),
            cost_s=np.zeros(3),
            itl_bins=np.zeros(ITL_BINS, np.int64),
            itl_sum_s=np.zeros(1),
        )


@jit
def _set_gauges(
    gauges: Int64Array,
    state: SchedulerArrays,
    requests: RequestArrays,
    batch: StepBatch,
    num_entries: int,
    units_held: Int32Array,
    unit_slots: int,
) -> None:
    """Count what running requests do with the slots they hold. O(running).

    Batch entries are the head of the running list, in its order. Tokens of this step count from its start: their slots are bound.
    """
    for g in range(NUM_GAUGES):
        gauges[g] = 0
    for i in range(state.counts[NUM_RUNNING]):
        request = state.running[i]
        tokens = batch["num_slots_needed"][i] if i < num_entries else requests.num_computed_tokens[request]
        held = units_held[requests.row[request]] * unit_slots
        final = requests.prompt_tokens[request] + requests.output_tokens[request] - 1  # the last output token needs no slot
        gauges[TOKENS] += tokens
        gauges[RESERVED] += min(held, final) - tokens
        gauges[INTERNAL] += max(held - final, 0)
    gauges[RUNNING] = state.counts[NUM_RUNNING]
    gauges[WAITING] = state.counts[NUM_WAITING]


@jit
def _integrate(
    integrals: Integrals,
    timeline: TimelineArrays,
    gauges: Int64Array,
    start_s: float,
    end_s: float,
    warmup_s: float,
    blocker: int,
    cost: StepCost,
) -> None:
    observe(timeline, start_s, end_s, gauges)
    seconds = end_s - max(start_s, warmup_s)
    if seconds <= 0:
        return
    integrals.observed_s[0] += seconds
    integrals.blocked_s[blocker] += seconds
    waits = gauges[WAITING] > 0
    for g in range(NUM_GAUGES):
        integrals.gauges[g] += seconds * gauges[g]
        if waits:
            integrals.gauges_when_waiting[g] += seconds * gauges[g]
    if waits:
        integrals.observed_s[1] += seconds
    total_s = cost[0] + cost[1] + cost[2]
    if total_s > 0.0:
        for part in range(3):
            integrals.cost_s[part] += seconds * cost[part] / total_s


@jit
def _stamp_start(times: TokenTimes, batch: StepBatch, first: int, last: int, now_s: float) -> None:
    for i in range(first, last):
        if np.isnan(times.scheduled_s[batch["request"][i]]):
            times.scheduled_s[batch["request"][i]] = now_s


@jit
def _count_gap(integrals: Integrals, gap_s: float) -> None:
    place = int(np.log(max(gap_s, ITL_SMALLEST_S) / ITL_SMALLEST_S) / np.log(ITL_BIN_RATIO))
    integrals.itl_bins[min(place, ITL_BINS - 1)] += 1
    integrals.itl_sum_s[0] += gap_s


@jit
def _stamp_tokens(times: TokenTimes, sampled: Int64Array, now_s: float, warmup_s: float, integrals: Integrals) -> None:
    """Stamp an output token for each of `sampled`, and count the gap before it if the request is measured. O(sampled)."""
    for request in sampled:
        if np.isnan(times.first_token_s[request]):
            times.first_token_s[request] = now_s
        elif times.arrival_s[request] >= warmup_s:
            _count_gap(integrals, now_s - times.last_token_s[request])
        times.last_token_s[request] = now_s


class Recorder:
    """Follows one scheduler from time 0 to `end_s`. Statistics are over the window [`warmup_s`, `end_s`]."""

    def __init__(self, scheduler: Scheduler, *, warmup_s: float, end_s: float) -> None:
        self.warmup_s = warmup_s
        self.end_s = end_s
        self.timeline = TimelineArrays.empty(NUM_GAUGES)
        self.integrals = Integrals.empty()
        self.iterations = 0
        self.request_steps = 0
        """Requests in a step, summed over all steps of the run."""
        self.running_max = 0
        self.num_preemptions = 0
        self.num_output_tokens = 0
        self.num_completed = 0
        """Requests that finished within the window, whenever they arrived."""
        self._scheduler = scheduler
        self._times = TokenTimes.empty(1024)
        self._gauges = np.zeros(NUM_GAUGES, np.int64)
        self._rejected: list[tuple[float, int, int]] = []
        self._failed: list[int] = []

    def arrival(self, request: int, now_s: float) -> None:
        """Note that `request` joined the queue."""
        if request == self._times.arrival_s.size:
            self._times = joined(self._times, TokenTimes.empty(request))
        self._times.arrival_s[request] = now_s

    def rejection(self, prompt_tokens: int, output_tokens: int, now_s: float) -> None:
        """Note that a request was refused at arrival."""
        self._rejected.append((now_s, prompt_tokens, output_tokens))

    def failure(self, request: int) -> None:
        """Note that the engine gave `request` up."""
        self._failed.append(request)

    def step(self, step: Step, start_s: float, cost: StepCost) -> None:
        """Note a step that was launched at `start_s`."""
        scheduler, allocator, gauges = self._scheduler, self._scheduler.allocator, self._gauges
        _set_gauges(
            gauges,
            scheduler.arrays,
            scheduler.requests.arrays,
            step.batch,
            step.num_entries,
            allocator.units_held,
            allocator.unit_slots,
        )
        # Whoever waits for memory finds every free extent of a contiguous heap too small: that is external fragmentation.
        head_waits_for_extent = step.blocker is Blocker.KV_MEMORY and allocator.placement != "block"
        free, rounding = allocator.free_slots, allocator.rounding_slots
        gauges[EXTERNAL] = rounding + (free if head_waits_for_extent else 0)
        gauges[STATE] = gauges[RUNNING] * allocator.state_units * allocator.unit_slots
        gauges[FREE] = 0 if head_waits_for_extent else free
        if step.num_entries > step.num_running_before:
            _stamp_start(self._times, step.batch, step.num_running_before, step.num_entries, start_s)
        end_s = min(start_s + cost.total_s, self.end_s)
        _integrate(self.integrals, self.timeline, gauges, start_s, end_s, self.warmup_s, BLOCKERS.index(step.blocker), cost)
        if step.num_preempted:
            count_preemptions(self.timeline, start_s, step.num_preempted)
        self.iterations += 1
        self.request_steps += step.num_entries
        if end_s > self.warmup_s:
            self.running_max = max(self.running_max, int(gauges[RUNNING]))
            self.num_preemptions += step.num_preempted

    def idle(self, start_s: float, end_s: float) -> None:
        """Note that nobody was there from `start_s` to `end_s`."""
        self._gauges[:] = 0
        self._gauges[FREE] = self._scheduler.allocator.free_slots
        end_s = min(end_s, self.end_s)
        if end_s > start_s:
            _integrate(self.integrals, self.timeline, self._gauges, start_s, end_s, self.warmup_s, 0, StepCost(0.0, 0.0, 0.0))

    def tokens(self, now_s: float) -> None:
        """Note the tokens of the step that has just been completed."""
        _stamp_tokens(self._times, self._scheduler.sampled, now_s, self.warmup_s, self.integrals)
        if now_s >= self.warmup_s:
            self.num_output_tokens += self._scheduler.sampled.size
            self.num_completed += self._scheduler.finished.size

    def close(self, end_s: float) -> None:
        """End the run: for measured requests that still generate, the time since their last token is a lower bound of a gap."""
        size, requests = self._scheduler.requests.size, self._scheduler.requests.arrays
        generating = np.arange(size)[
            (requests.num_known_tokens > requests.prompt_tokens)[:size]
            & (requests.num_known_tokens < requests.prompt_tokens + requests.output_tokens)[:size]
            & (self._times.arrival_s[:size] >= self.warmup_s)
        ]
        for request in generating:
            _count_gap(self.integrals, end_s - self._times.last_token_s[request])

    def log(self) -> RequestLog:
        """Return what happened to every request."""
        size, requests = self._scheduler.requests.size, self._scheduler.requests.arrays
        outcome = np.full(size, Outcome.UNFINISHED, np.int8)
        num_output = (requests.num_known_tokens - requests.prompt_tokens)[:size]
        outcome[num_output == requests.output_tokens[:size]] = Outcome.FINISHED
        outcome[self._failed] = Outcome.FAILED
        rejected = np.array(self._rejected).reshape(-1, 3)
        refused, never = len(rejected), np.full(len(rejected), np.nan)
        lengths = rejected[:, 1:].astype(np.int64)
        nothing = np.zeros(refused, np.int64)
        log = RequestLog(
            arrival_s=np.concatenate((self._times.arrival_s[:size], rejected[:, 0])),
            scheduled_s=np.concatenate((self._times.scheduled_s[:size], never)),
            first_token_s=np.concatenate((self._times.first_token_s[:size], never)),
            last_token_s=np.concatenate((self._times.last_token_s[:size], never)),
            prompt_tokens=np.concatenate((requests.prompt_tokens[:size], lengths[:, 0])),
            output_tokens=np.concatenate((requests.output_tokens[:size], lengths[:, 1])),
            num_output_tokens=np.concatenate((num_output, nothing)),
            num_preemptions=np.concatenate((requests.num_preemptions[:size], nothing)),
            outcome=np.concatenate((outcome, np.full(refused, Outcome.REJECTED, np.int8))),
        )
        return log.where(np.argsort(log.arrival_s, kind="stable"))  # type: ignore[arg-type]
