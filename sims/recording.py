"""What a run adds up, as arrays, and the compiled functions that add. `pagedkv.sims.recorder` owns them."""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.step import Blocker
from pagedkv.scheduling.waiting import KV_MEMORY, NUM_RUNNING, NUM_WAITING, SchedulerArrays
from pagedkv.sims.records import TokenTimes
from pagedkv.sims.timeline import TimelineArrays, count_preemptions, observe
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import NEVER, use_in_groups

KV_KINDS = ("tokens", "reserved", "internal", "external", "cached", "state", "free")
"""What a slot of the pool can be: docs/metrics.md."""
TOKENS, RESERVED, INTERNAL, EXTERNAL, CACHED, STATE, FREE, RUNNING, WAITING = range(9)
NUM_GAUGES = len(KV_KINDS) + 2
BLOCKERS = tuple(Blocker)
NUM_COSTS = 5
"""Fields of `StepCost`; the first three last for as long as the step."""

# Inter-token latencies are counted in bins that are 0.1 % wide, from 1 microsecond up: constant memory, percentiles within 0.05 %.
ITL_SMALLEST_S = 1e-6
ITL_BIN_RATIO = 1.001
ITL_BINS = 28_000

ITERATIONS, REQUEST_STEPS, RUNNING_MAX, NUM_PREEMPTIONS, NUM_OUTPUT_TOKENS, NUM_COMPLETED = range(6)
QUERIED_TOKENS, HIT_TOKENS, RESUMED_TOKENS, RESUMED_HIT_TOKENS, RUNNING_ELSEWHERE, DRAFT_TOKENS, ACCEPTED_TOKENS = range(6, 13)
LOADED_TOKENS, OFFLOADED_TOKENS, NUM_COUNTERS = range(13, 16)
"""RUNNING_ELSEWHERE is told, not counted: how many run on the other replicas, so that RUNNING_MAX is the fleet's."""


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
    """By field of `StepCost`: seconds."""
    itl_bins: Int64Array
    """Gaps between output tokens of measured requests, by length."""
    itl_sum_s: Float64Array
    """Length 1."""

    @classmethod
    def of(cls, sums: Float64Array, itl_bins: Int64Array) -> "Integrals":
        """Return views of what compiled code has summed up."""
        return cls(
            gauges=sums[GAUGE_SUMS:WAITING_SUMS],
            gauges_when_waiting=sums[WAITING_SUMS:OBSERVED_S],
            observed_s=sums[OBSERVED_S:BLOCKED_S],
            blocked_s=sums[BLOCKED_S:COST_S],
            cost_s=sums[COST_S:ITL_SUM_S],
            itl_bins=itl_bins,
            itl_sum_s=sums[ITL_SUM_S:],
        )


GAUGE_SUMS, WAITING_SUMS, OBSERVED_S = 0, NUM_GAUGES, 2 * NUM_GAUGES
BLOCKED_S = OBSERVED_S + 2
COST_S = BLOCKED_S + len(BLOCKERS)
ITL_SUM_S = COST_S + NUM_COSTS
NUM_SUMS = ITL_SUM_S + 1
"""Where the parts of `Integrals` begin in one array: an array less is a good deal less to pass from function to function."""


class RecorderArrays(NamedTuple):
    """All that is recorded."""

    sums: Float64Array
    """[NUM_SUMS]: see `Integrals`."""
    itl_bins: Int64Array
    """[ITL_BINS]: see `Integrals`."""
    timeline: TimelineArrays
    times: TokenTimes
    gauges: Int64Array
    """By gauge: its value in the step recorded last."""
    counters: Int64Array
    """By ITERATIONS and so on."""
    window_s: Float64Array
    """Length 2: when measuring begins and when it ends."""


@lean_jit
def set_gauges(
    gauges: Int64Array,
    state: SchedulerArrays,
    requests: RequestArrays,
    batch: StepBatch,
    num_entries: int,
    units_held: Int32Array,
    unit_slots: int,
    state_units: int,
    free_slots: int,
    cached_slots: int,
    shared_slots: int,
) -> None:
    """Count what running requests do with the slots they hold. O(running).

    Batch entries are the head of the running list, in its order. Tokens of this step count from its start: their slots are bound.
    Slots that several requests share, all of them full, count once.
    """
    tokens = reserved = internal = 0
    slots, rows = batch["num_slots_needed"], requests["row"]
    num_running = state.counts[NUM_RUNNING]
    for i in range(num_running):
        request = state.running[i]
        own = requests["num_computed_tokens"][request]
        if i < num_entries:
            own = min(slots[i], requests["num_known_tokens"][request])  # slots of drafts await tokens
        held = np.int64(units_held[rows[request]]) * unit_slots
        final = requests["prompt_tokens"][request] + requests["output_tokens"][request] - 1  # the last output token needs no slot
        tokens += own
        reserved += min(held, final) - own
        internal += max(held - final, 0)
    gauges[TOKENS], gauges[RESERVED], gauges[INTERNAL] = tokens - shared_slots, reserved, internal
    gauges[EXTERNAL], gauges[CACHED], gauges[STATE] = 0, cached_slots, num_running * state_units * unit_slots
    gauges[FREE] = free_slots - cached_slots
    gauges[RUNNING], gauges[WAITING] = num_running, state.counts[NUM_WAITING]


@lean_jit
def set_group_gauges(
    gauges: Int64Array,
    state: SchedulerArrays,
    requests: RequestArrays,
    batch: StepBatch,
    num_entries: int,
    memory: Any,
    rules: Any,
) -> None:
    """After `set_gauges`: count anew what slots hold, if a token has one in each group of layers. O(running * groups)."""
    tokens, reserved, internal = use_in_groups(memory, rules, state, requests, batch, num_entries)
    if tokens != NEVER:
        gauges[TOKENS], gauges[RESERVED], gauges[INTERNAL] = tokens, reserved, internal


@lean_jit
def set_external(gauges: Int64Array, rounding_slots: int, needs_extent: bool, blocker: int) -> None:  # noqa: FBT001
    """Count slots that nobody holds or can use: the heap's rounding, and all that is free while the head waits for an extent."""
    gauges[EXTERNAL] = rounding_slots
    if needs_extent and blocker == KV_MEMORY:
        gauges[EXTERNAL] += gauges[FREE] + gauges[CACHED]
        gauges[FREE] = 0


@lean_jit
def _integrate(
    r: RecorderArrays, start_s: float, end_s: float, blocker: int, cost: tuple[float, float, float, float, float]
) -> None:
    sums, gauges = r.sums, r.gauges
    observe(r.timeline, start_s, end_s, gauges)
    seconds = end_s - max(start_s, r.window_s[0])
    if seconds <= 0:
        return
    sums[OBSERVED_S] += seconds
    sums[BLOCKED_S + blocker] += seconds
    for g in range(NUM_GAUGES):
        sums[GAUGE_SUMS + g] += seconds * gauges[g]
    if gauges[WAITING] > 0:
        sums[OBSERVED_S + 1] += seconds
        for g in range(NUM_GAUGES):
            sums[WAITING_SUMS + g] += seconds * gauges[g]
    total_s = cost[0] + cost[1] + cost[2]
    if total_s > 0.0:
        for part in range(NUM_COSTS):
            sums[COST_S + part] += seconds * cost[part] / total_s


@lean_jit
def record_step(
    r: RecorderArrays,
    batch: StepBatch,
    ran_before: int,
    num_entries: int,
    num_preempted: int,
    blocker: int,
    start_s: float,
    cost: tuple[float, float, float, float, float],
) -> None:
    """Record a step that is launched at `start_s`; `gauges` say how memory stands. O(admissions + gauges)."""
    end_s = min(start_s + (cost[0] + cost[1] + cost[2]), r.window_s[1])
    for i in range(ran_before, num_entries):
        request, counter = batch["request"][i], RESUMED_TOKENS
        if np.isnan(r.times["scheduled_s"][request]):
            r.times["scheduled_s"][request], counter = start_s, QUERIED_TOKENS
        if end_s > r.window_s[0]:
            r.counters[counter] += batch["num_known_tokens"][i]
            r.counters[counter + 1] += batch["num_slots_needed"][i] - batch["num_scheduled_tokens"][i]
    _integrate(r, start_s, end_s, blocker, cost)
    if num_preempted > 0:
        count_preemptions(r.timeline, start_s, num_preempted)
    r.counters[ITERATIONS] += 1
    r.counters[REQUEST_STEPS] += num_entries
    if end_s > r.window_s[0]:
        r.counters[RUNNING_MAX] = max(r.counters[RUNNING_MAX], r.gauges[RUNNING] + r.counters[RUNNING_ELSEWHERE])
        r.counters[NUM_PREEMPTIONS] += num_preempted


@lean_jit
def record_copies(
    r: RecorderArrays, num_loaded: int, num_offloaded: int, start_s: float, cost: tuple[float, float, float, float, float]
) -> None:
    """Record the tokens that a step launched at `start_s` copies from a second tier, and to it."""
    if start_s + (cost[0] + cost[1] + cost[2]) > r.window_s[0]:
        r.counters[LOADED_TOKENS] += num_loaded
        r.counters[OFFLOADED_TOKENS] += num_offloaded


@lean_jit
def record_longer(r: RecorderArrays, start_s: float, end_s: float) -> None:
    """Record that the state recorded last holds from `start_s` to `end_s` too: nothing is computed, nothing is blocked by it."""
    end_s = min(end_s, r.window_s[1])
    if end_s > start_s:
        _integrate(r, start_s, end_s, 0, (0.0, 0.0, 0.0, 0.0, 0.0))


@lean_jit
def record_idle(r: RecorderArrays, start_s: float, end_s: float, free_slots: int, cached_slots: int) -> None:
    """Record that nobody was there from `start_s` to `end_s`."""
    for g in range(NUM_GAUGES):
        r.gauges[g] = 0
    r.gauges[FREE], r.gauges[CACHED] = free_slots - cached_slots, cached_slots
    end_s = min(end_s, r.window_s[1])
    if end_s > start_s:
        _integrate(r, start_s, end_s, 0, (0.0, 0.0, 0.0, 0.0, 0.0))


@lean_jit
def gap_bin(gap_s: float) -> int:
    """Return the bin of a gap between two tokens."""
    place = int(np.log(max(gap_s, ITL_SMALLEST_S) / ITL_SMALLEST_S) / np.log(ITL_BIN_RATIO))
    return min(place, ITL_BINS - 1)


@lean_jit
def record_tokens(
    r: RecorderArrays, sampled: Int64Array, num_sampled: int, num_tokens: int, num_finished: int, now_s: float
) -> None:
    """Stamp the output of each of `sampled`, and count the gap before it if the request is measured. O(sampled).

    Several tokens of a request that come at once, drafts accepted, are one gap, as a client sees it.
    """
    times, warmup_s = r.times, r.window_s[0]
    gap_s, place = np.nan, 0
    for i in range(num_sampled):
        request = sampled[i]
        if np.isnan(times["first_token_s"][request]):
            times["first_token_s"][request] = now_s
        elif times["arrival_s"][request] >= warmup_s:
            if now_s - times["last_token_s"][request] != gap_s:  # most requests of a batch have waited alike
                gap_s = now_s - times["last_token_s"][request]
                place = gap_bin(gap_s)
            r.itl_bins[place] += 1
            r.sums[ITL_SUM_S] += gap_s
        times["last_token_s"][request] = now_s
    if now_s >= warmup_s:
        r.counters[NUM_OUTPUT_TOKENS] += num_tokens
        r.counters[NUM_COMPLETED] += num_finished
