"""The simulator's loop over steps, compiled: from one event of the outside world to the next, without Python between steps.

Schedule, price, record, complete: the same functions that the step-by-step engine calls one at a time (`pagedkv.sims.engine`).
"""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.completion import complete_and_free
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.vllm_step import BLOCKER, ENTRIES, PREEMPTED, RAN_BEFORE, SchedulerLimits, schedule_step
from pagedkv.scheduling.waiting import NUM_RUNNING, NUM_WAITING, SchedulerArrays, drop_head, push_waiting
from pagedkv.sims.drafting import Acceptance, accept_drafts
from pagedkv.sims.recording import RecorderArrays, record_idle, record_step, record_tokens, set_external, set_gauges
from pagedkv.sims.step_formula import StepCoefficients, whole_step_cost
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import rows_of, slots_of

IDLE, IN_FLIGHT, ENDED, PAUSED = 0, 1, 2, 3
"""Why the loop came back: nobody is there; a step runs beyond the horizon; requests have ended for whom somebody waits, or one was
given up; it was time to say how far things are."""

NEXT_ARRIVAL, NUM_KNOWN, NUM_FINISHED, NUM_FAILED, STEP_RUNS, NUM_PROGRESS = range(6)
"""In `progress`: who arrives next; requests known, future ones included; how many ended in the last step, or were given up; whether
a step runs, which ends at clock[NOW] of the next call; its length."""
NOW, STEP_S = 0, 1
"""In `clock`: the time; how long the step in flight takes."""


class LoopArrays(NamedTuple):
    """What the loop works on."""

    state: SchedulerArrays
    requests: RequestArrays
    memory: Any
    """Its arrays, of one of the kinds of `pagedkv.step_memory`."""
    segments: Segments
    batch: StepBatch
    preempted: Int64Array
    decision: Int64Array
    sampled: Int64Array
    finished: Int64Array
    failed: Int64Array
    """Length 1: a request that was given up."""
    acceptance: Acceptance
    """Which drafts are accepted."""
    recorder: RecorderArrays
    progress: Int64Array
    clock: Float64Array


@lean_jit
def _complete(
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    recorder: RecorderArrays,
    batch: StepBatch,
    num_entries: int,
    sampled: Int64Array,
    finished: Int64Array,
    now_s: float,
) -> int:
    """Apply the step that ends at `now_s`; return how many requests it finished."""
    num_sampled, num_tokens, num_finished = complete_and_free(state, requests, memory, rules, batch, num_entries, sampled, finished)
    record_tokens(recorder, sampled, num_sampled, num_tokens, num_finished, now_s)
    return num_finished


@lean_jit
def run_steps(
    loop: LoopArrays,
    limits: SchedulerLimits,
    rules: Any,
    coefficients: StepCoefficients,
    horizon_s: float,
    needs_extent: bool,  # noqa: FBT001
    return_at_end: bool,  # noqa: FBT001
    steps_at_once: int,
) -> int:
    """Run steps from clock[NOW] on, and let requests that are known already arrive in time, as long as nothing else can happen.

    Args:
        loop: Everything.
        limits: The scheduler's.
        rules: The memory's.
        coefficients: What a step costs.
        horizon_s: When the next event from outside comes: a step that does not end before it stays in flight.
        needs_extent: Whether whoever waits for memory finds all free extents too small.
        return_at_end: Come back when requests end, since somebody waits for that.
        steps_at_once: Come back after so many steps anyway.

    Returns:
        IDLE, IN_FLIGHT (for clock[STEP_S] seconds from clock[NOW] on), ENDED or PAUSED. O(running) per step.
    """
    # Taken apart once: what is passed on by name costs nothing, what is taken out of a tuple for every call does.
    state, requests, memory, segments, batch = loop.state, loop.requests, loop.memory, loop.segments, loop.batch
    decision, recorder, progress, clock, counts = loop.decision, loop.recorder, loop.progress, loop.clock, loop.state.counts
    arrival_s = recorder.times["arrival_s"]
    units_held, unit_slots, state_units = rows_of(memory, rules)
    for _ in range(steps_at_once):
        now_s = clock[NOW]
        if progress[STEP_RUNS]:
            progress[STEP_RUNS] = 0
            if limits.num_speculative_tokens > 0:
                accept_drafts(loop.acceptance, batch, decision[ENTRIES])
            num_finished = _complete(
                state, requests, memory, rules, recorder, batch, decision[ENTRIES], loop.sampled, loop.finished, now_s
            )
            if num_finished > 0 and return_at_end:
                progress[NUM_FINISHED], progress[NUM_FAILED] = num_finished, 0
                return ENDED
        while progress[NEXT_ARRIVAL] < progress[NUM_KNOWN] and arrival_s[progress[NEXT_ARRIVAL]] <= now_s:
            push_waiting(state, requests, progress[NEXT_ARRIVAL], limits.by_priority)
            progress[NEXT_ARRIVAL] += 1
        if counts[NUM_RUNNING] + counts[NUM_WAITING] == 0:
            following_s = np.inf
            if progress[NEXT_ARRIVAL] < progress[NUM_KNOWN]:
                following_s = arrival_s[progress[NEXT_ARRIVAL]]
            if following_s >= horizon_s:
                return IDLE
            free, cached, shared, rounding = slots_of(memory, rules)
            record_idle(recorder, now_s, following_s, free, cached)
            clock[NOW] = following_s
            continue
        schedule_step(state, requests, memory, segments, limits, rules, batch, loop.preempted, decision)
        entries = decision[ENTRIES]
        if entries == 0:  # nothing runs and the head does not fit: waiting longer cannot help it
            loop.failed[0] = drop_head(state, requests, limits.by_priority)
            progress[NUM_FINISHED], progress[NUM_FAILED] = 0, 1
            return ENDED
        cost = whole_step_cost(coefficients, batch, entries)
        free, cached, shared, rounding = slots_of(memory, rules)
        set_gauges(recorder.gauges, state, requests, batch, entries, units_held, unit_slots, state_units, free, cached, shared)
        set_external(recorder.gauges, rounding, needs_extent, decision[BLOCKER])
        record_step(recorder, batch, decision[RAN_BEFORE], entries, decision[PREEMPTED], decision[BLOCKER], now_s, cost)
        step_s = cost[0] + cost[1] + cost[2]
        progress[STEP_RUNS] = 1
        if now_s + step_s >= horizon_s:
            clock[STEP_S] = step_s
            return IN_FLIGHT
        clock[NOW] = now_s + step_s
    return PAUSED
