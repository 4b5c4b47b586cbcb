"""The steps of a decode run, compiled: every request gets one token more in each, so that nobody need be asked between them.

For engines whose scheduler decides in Python (`pagedkv.sims.engine`): over paged memory the decisions are compiled too, in
`pagedkv.sims.run_steps`.
"""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.decode_run import DecodeRun
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.step import Step, StepScheduler
from pagedkv.scheduling.waiting import SchedulerArrays
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import BLOCKERS, RecorderArrays, record_step, record_tokens, set_external, set_gauges
from pagedkv.sims.step_formula import StepCoefficients, cost_of_passes
from pagedkv.step_batch import StepBatch, empty_batch

FREE_SLOTS, CACHED_SLOTS, SHARED_SLOTS, ROUNDING_SLOTS, SPARE_SLOTS = range(5)
"""In `memory`: what the allocator says of its slots when the run begins, and what rows can still take in it."""


class RunSteps(NamedTuple):
    """What happened in a decode run."""

    num_completed: int
    """Steps that are over."""
    start_s: float
    """When the one that follows them began."""
    step_s: float
    """How long that takes: it is recorded, and not completed."""


@lean_jit
def _slots_due(passes: StepBatch, held: Int32Array, unit_slots: int, grain: int) -> int:
    """Return the slots that the next step must take, for the rows that are full: padding, which only `passes` has, is held too."""
    due = 0
    if grain > 0:
        for i in range(passes.size):
            if passes["num_slots_needed"][i] >= np.int64(held[passes["row"][i]]) * unit_slots:
                due += grain * unit_slots
    return due


@lean_jit
def _complete(requests: RequestArrays, batch: StepBatch, passes: StepBatch, sampled: Int64Array) -> int:
    """Let each who computed a token have the next one, and move `batch` and `passes` on; return how many are in `sampled`."""
    num_sampled = 0
    for i in range(batch.size):
        if batch["num_scheduled_tokens"][i] > 0:
            request = batch["request"][i]
            requests["num_computed_tokens"][request] = requests["num_known_tokens"][request]
            requests["num_known_tokens"][request] += 1
            batch["num_slots_needed"][i] += 1
            batch["num_known_tokens"][i] += 1
            sampled[num_sampled] = request
            num_sampled += 1
    for i in range(passes.size):
        passes["num_slots_needed"][i] += 1
        passes["num_known_tokens"][i] += 1
    return num_sampled


@lean_jit
def run_decode_steps(
    state: SchedulerArrays,
    requests: RequestArrays,
    recorder: RecorderArrays,
    batch: StepBatch,
    passes: StepBatch,
    ends: Int64Array,
    held: Int32Array,
    memory: Int64Array,
    sampled: Int64Array,
    coefficients: StepCoefficients,
    num_steps: int,
    grain: int,
    unit_slots: int,
    state_units: int,
    needs_extent: bool,  # noqa: FBT001
    blocker: int,
    now_s: float,
    horizon_s: float,
) -> tuple[int, float, float]:
    """Run steps that are decided alike, until memory is a question, or something else can happen, or a request may end.

    Args:
        state: Who runs: those of `batch` first.
        requests: Their records.
        recorder: What is recorded.
        batch: The step decided last, a copy: it becomes the last one that is run.
        passes: What is computed together in it, pass after pass, a copy too.
        ends: Where each pass ends in `passes`.
        held: Units by row, a copy.
        memory: See FREE_SLOTS.
        sampled: Room for as many requests.
        coefficients: What a step costs.
        num_steps: How many steps at most.
        grain: Units that a full row takes, 0 if none gets full.
        unit_slots: Slots of a unit.
        state_units: Units of each running request for its state.
        needs_extent: Whether whoever waits for memory finds all free extents too small.
        blocker: What holds the queue up, by its number in BLOCKERS.
        now_s: When the first step begins.
        horizon_s: When the next event from outside comes: a step that does not end before it stays in flight.

    Returns:
        The fields of `RunSteps`. O(running) per step.
    """
    completed = 0
    while True:
        cost = cost_of_passes(coefficients, passes, ends, ends.size)
        free, cached, shared = memory[FREE_SLOTS], memory[CACHED_SLOTS], memory[SHARED_SLOTS]
        set_gauges(recorder.gauges, state, requests, batch, batch.size, held, unit_slots, state_units, free, cached, shared)
        set_external(recorder.gauges, memory[ROUNDING_SLOTS], needs_extent, blocker)
        record_step(recorder, batch, batch.size, batch.size, 0, blocker, now_s, cost)
        step_s = cost[0] + cost[1] + cost[2]
        due = _slots_due(passes, held, unit_slots, grain)
        if completed + 1 == num_steps or now_s + step_s >= horizon_s or due > memory[SPARE_SLOTS]:
            return completed, now_s, step_s
        now_s += step_s
        if due > 0:
            for i in range(passes.size):
                row = passes["row"][i]
                if passes["num_slots_needed"][i] >= np.int64(held[row]) * unit_slots:
                    held[row] += grain
            memory[FREE_SLOTS] -= due
            memory[SPARE_SLOTS] -= due
            memory[CACHED_SLOTS] = min(memory[CACHED_SLOTS], memory[FREE_SLOTS])
        num_sampled = _complete(requests, batch, passes, sampled)
        record_tokens(recorder, sampled, num_sampled, num_sampled, 0, now_s)
        completed += 1


_run = fixed_types(run_decode_steps)


def run_decode(
    scheduler: StepScheduler,
    recorder: Recorder,
    step: Step,
    run: DecodeRun,
    coefficients: StepCoefficients,
    *,
    now_s: float,
    horizon_s: float,
) -> RunSteps:
    """Run `step`, decided and not recorded, and those that follow it alike; the last of them is in flight afterwards.

    `scheduler` has decided it then, and `recorder` knows of all. `horizon_s` is when something else happens.
    """
    allocator, parts = scheduler.allocator, list(scheduler.forward_passes())
    ends = np.cumsum([part.size for part in parts])
    passes = empty_batch(int(ends[-1]))
    np.concatenate(parts, out=passes)
    memory = np.array(
        (allocator.free_slots, scheduler.cached_slots, scheduler.shared_slots, allocator.rounding_slots, run.spare_slots)
    )
    done = RunSteps(
        *_run(
            scheduler.arrays,
            scheduler.requests.arrays,
            recorder.arrays,
            step.batch[: step.num_entries].copy(),
            passes,
            ends,
            allocator.units_held.copy(),
            memory,
            np.empty(step.num_entries, np.int64),
            coefficients,
            run.num_steps,
            run.grain,
            allocator.unit_slots,
            allocator.state_units,
            recorder.needs_extent,
            BLOCKERS.index(step.blocker),
            now_s,
            horizon_s,
        )
    )
    if done.num_completed:
        scheduler.repeat(done.num_completed)
    return done
