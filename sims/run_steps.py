"""The simulator's loop over steps, compiled: from one event of the outside world to the next, without Python between steps.

Schedule, price, record, complete: the same functions that the step-by-step engine calls one at a time (`pagedkv.sims.engine`).
"""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.engine_step import (
    BLOCKER,
    ENTRIES,
    FAILED,
    PREEMPTED,
    RAN_BEFORE,
    apply_step,
    decide_step,
    drop_request,
    forward_passes,
    queue_request,
)
from pagedkv.jit import lean_jit
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.waiting import NUM_RUNNING, NUM_WAITING, SchedulerArrays
from pagedkv.sims.drafting import Acceptance, accept_drafts
from pagedkv.sims.recording import (
    RecorderArrays,
    record_copies,
    record_idle,
    record_step,
    record_tokens,
    set_external,
    set_gauges,
    set_group_gauges,
)
from pagedkv.sims.step_formula import StepCoefficients, beside_copies, cost_of_passes, whole_step_cost
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import moved_blocks, rows_of, slots_of

IDLE, IN_FLIGHT, ENDED, PAUSED = 0, 1, 2, 3
"""Why the loop came back: nobody is there; a step runs beyond the horizon, or from when requests were given up; requests have ended
for whom somebody waits, or were given up and no step runs; it was time to say how far things are."""

NEXT_ARRIVAL, NUM_KNOWN, NUM_FINISHED, NUM_FAILED, STEP_RUNS, NUM_PROGRESS = range(6)
"""In `progress`: who arrives next; requests known, future ones included; how many ended in the last step, or were given up by the
last decision; whether a step runs, which ends at clock[NOW] of the next call; its length."""
NOW, STEP_S = 0, 1
"""In `clock`: the time; how long the step in flight takes."""


class LoopArrays(NamedTuple):
    """What the loop works on."""

    engine: Any
    """Its limits, of one of the kinds of `pagedkv.engine_step`."""
    state: SchedulerArrays
    requests: RequestArrays
    memory: Any
    """Its arrays, of one of the kinds of `pagedkv.step_memory`."""
    segments: Segments
    batch: StepBatch
    preempted: Int64Array
    failed: Int64Array
    decision: Int64Array
    sampled: Int64Array
    finished: Int64Array
    passes: StepBatch
    ends: Int64Array
    acceptance: Acceptance
    """Which drafts are accepted."""
    recorder: RecorderArrays
    progress: Int64Array
    clock: Float64Array


@lean_jit
def _cost_of_step(loop: LoopArrays, coefficients: StepCoefficients, num_entries: int) -> tuple[float, float, float, float, float]:
    """Return what the step costs that was decided, as the engine computes it: in one pass or in several."""
    num_passes = forward_passes(loop.engine, loop.state, loop.requests, loop.batch, num_entries, loop.passes, loop.ends)
    if num_passes > 0:
        return cost_of_passes(coefficients, loop.passes, loop.ends, num_passes)
    return whole_step_cost(coefficients, loop.batch, num_entries)


@lean_jit
def run_steps(
    loop: LoopArrays,
    rules: Any,
    coefficients: StepCoefficients,
    horizon_s: float,
    needs_extent: bool,  # noqa: FBT001
    drafts: bool,  # noqa: FBT001
    return_at_end: bool,  # noqa: FBT001
    steps_at_once: int,
) -> int:
    """Run steps from clock[NOW] on, and let requests that are known already arrive in time, as long as nothing else can happen.

    Args:
        loop: Everything.
        rules: The memory's.
        coefficients: What a step costs.
        horizon_s: When the next event from outside comes: a step that does not end before it stays in flight.
        needs_extent: Whether whoever waits for memory finds all free extents too small.
        drafts: Whether steps verify some.
        return_at_end: Come back when requests end, since somebody waits for that.
        steps_at_once: Come back after so many steps anyway.

    Returns:
        IDLE, IN_FLIGHT (for clock[STEP_S] seconds from clock[NOW] on), ENDED or PAUSED. O(running) per step.
    """
    engine, state, requests, memory, batch = loop.engine, loop.state, loop.requests, loop.memory, loop.batch
    decision, recorder, progress, clock, counts = loop.decision, loop.recorder, loop.progress, loop.clock, loop.state.counts
    sampled, finished, failed = loop.sampled, loop.finished, loop.failed
    arrival_s = recorder.times["arrival_s"]
    units_held, unit_slots, state_units = rows_of(memory, rules)
    for _ in range(steps_at_once):
        now_s = clock[NOW]
        if progress[STEP_RUNS]:
            progress[STEP_RUNS] = 0
            if drafts:
                accept_drafts(loop.acceptance, batch, decision[ENTRIES])
            num_sampled, num_tokens, num_finished = apply_step(
                engine, state, requests, memory, rules, loop.segments, batch, decision[ENTRIES], sampled, finished
            )
            record_tokens(recorder, sampled, num_sampled, num_tokens, num_finished, now_s)
            if num_finished > 0 and return_at_end:
                progress[NUM_FINISHED], progress[NUM_FAILED] = num_finished, 0
                return ENDED
        while progress[NEXT_ARRIVAL] < progress[NUM_KNOWN] and arrival_s[progress[NEXT_ARRIVAL]] <= now_s:
            queue_request(engine, state, requests, progress[NEXT_ARRIVAL])
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
        decide_step(engine, state, requests, memory, rules, loop.segments, batch, loop.preempted, failed, decision)
        entries = decision[ENTRIES]
        progress[NUM_FINISHED], progress[NUM_FAILED] = 0, decision[FAILED]
        if entries == 0:
            if decision[FAILED] == 0:  # nothing runs and the head does not fit: waiting longer cannot help it
                failed[0] = drop_request(engine, state, requests)
                progress[NUM_FAILED] = 1
            return ENDED
        loaded, offloaded = moved_blocks(memory, rules)
        cost = beside_copies(coefficients.copies, _cost_of_step(loop, coefficients, entries), loaded, offloaded)
        free, cached, shared, rounding = slots_of(memory, rules)
        set_gauges(recorder.gauges, state, requests, batch, entries, units_held, unit_slots, state_units, free, cached, shared)
        set_group_gauges(recorder.gauges, state, requests, batch, entries, memory, rules)
        set_external(recorder.gauges, rounding, needs_extent, decision[BLOCKER])
        record_step(recorder, batch, decision[RAN_BEFORE], entries, decision[PREEMPTED], decision[BLOCKER], now_s, cost)
        record_copies(recorder, loaded * unit_slots, offloaded * unit_slots, now_s, cost)
        step_s = cost[0] + cost[1] + cost[2]
        progress[STEP_RUNS] = 1
        if now_s + step_s >= horizon_s or progress[NUM_FAILED] > 0:
            clock[STEP_S] = step_s
            return IN_FLIGHT
        clock[NOW] = now_s + step_s
    return PAUSED
