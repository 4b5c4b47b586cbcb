"""The end of a step: tokens count as computed, outputs are sampled, requests are done."""

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.paged_steps import PagedArrays, PagedRules, free_row
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.waiting import NUM_RUNNING, SchedulerArrays
from pagedkv.step_batch import StepBatch


@lean_jit
def complete_step(
    state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, num_entries: int, sampled: Int64Array, finished: Int64Array
) -> tuple[int, int]:
    """Count the step's tokens as computed and give one output token to each request whose known tokens all are.

    Args:
        state: Who runs; finished requests leave it, the others keep their order.
        requests: Their `REQUEST` records.
        batch: The step.
        num_entries: Entries of `batch` that ran.
        sampled: Receives the requests that got an output token, in scheduling order.
        finished: Receives those of them that are done, in scheduling order; their rows still hold memory.

    Returns:
        (number sampled, number finished). O(entries + running).
    """
    num_sampled = num_finished = 0
    for i in range(num_entries):
        request = batch["request"][i]
        requests["num_computed_tokens"][request] += batch["num_scheduled_tokens"][i]
        if requests["num_computed_tokens"][request] == requests["num_known_tokens"][request]:
            requests["num_known_tokens"][request] += 1
            sampled[num_sampled] = request
            num_sampled += 1
            if requests["num_known_tokens"][request] == requests["prompt_tokens"][request] + requests["output_tokens"][request]:
                finished[num_finished] = request
                num_finished += 1
    if num_finished > 0:
        kept = 0
        num_running = state.counts[NUM_RUNNING]
        for i in range(num_running):
            request = state.running[i]
            if requests["num_known_tokens"][request] < requests["prompt_tokens"][request] + requests["output_tokens"][request]:
                state.running[kept] = request
                kept += 1
        state.counts[NUM_RUNNING] = kept
        for k in range(num_finished):
            state.free_rows[kept + k] = requests["row"][finished[k]]
    return num_sampled, num_finished


@lean_jit
def complete_paged_step(
    state: SchedulerArrays,
    requests: RequestArrays,
    pool: PagedArrays,
    rules: PagedRules,
    batch: StepBatch,
    num_entries: int,
    sampled: Int64Array,
    finished: Int64Array,
) -> tuple[int, int]:
    """Do as `complete_step`, and give back what finished requests hold in `pool`. O(entries + running + blocks given back)."""
    num_sampled, num_finished = complete_step(state, requests, batch, num_entries, sampled, finished)
    for k in range(num_finished):
        free_row(pool, rules, requests["row"][finished[k]])
        requests["row"][finished[k]] = NO_ROW
    return num_sampled, num_finished
