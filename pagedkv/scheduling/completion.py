"""The end of a step: tokens count as computed, outputs are sampled, requests are done."""

from typing import Any

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.waiting import NUM_ACCEPTED, NUM_DRAFTED, NUM_RUNNING, SchedulerArrays
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import free_row


@lean_jit
def complete_step(
    state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, num_entries: int, sampled: Int64Array, finished: Int64Array
) -> tuple[int, int, int]:
    """Count the step's tokens as computed and give an output token to each request whose known tokens all are.

    Tokens computed beyond the known ones were drafts: those that are accepted become known, one more follows them, and the slots of
    the others are written anew by the next step. Who is `HELD` gets none, and computes its last known token again.

    Args:
        state: Who runs; finished requests leave it, the others keep their order.
        requests: Their `REQUEST` records.
        batch: The step.
        num_entries: Entries of `batch` that ran.
        sampled: Receives the requests that got an output token, in scheduling order.
        finished: Receives those of them that are done, in scheduling order; their rows still hold memory.

    Returns:
        (number sampled, output tokens that they got, number finished). O(entries + running).
    """
    num_sampled = num_tokens = num_finished = 0
    for i in range(num_entries):
        request = batch["request"][i]
        computed = requests["num_computed_tokens"][request] + batch["num_scheduled_tokens"][i]
        drafts = computed - requests["num_known_tokens"][request]
        if drafts < 0:
            requests["num_computed_tokens"][request] = computed
        else:
            final = requests["prompt_tokens"][request] + requests["output_tokens"][request]
            accepted = min(batch["num_accepted_tokens"][i], drafts, final - requests["num_known_tokens"][request] - 1)
            requests["num_known_tokens"][request] += accepted + 1
            requests["num_computed_tokens"][request] = requests["num_known_tokens"][request] - 1
            state.counts[NUM_DRAFTED] += drafts
            if accepted < 0:  # held: -1
                continue
            state.counts[NUM_ACCEPTED] += accepted
            num_tokens += accepted + 1
            sampled[num_sampled] = request
            num_sampled += 1
            if requests["num_known_tokens"][request] == final:
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
    return num_sampled, num_tokens, num_finished


@lean_jit
def complete_and_free(
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    batch: StepBatch,
    num_entries: int,
    sampled: Int64Array,
    finished: Int64Array,
) -> tuple[int, int, int]:
    """Do as `complete_step`, and give back what finished requests hold in `memory`. O(entries + running + units given back)."""
    num_sampled, num_tokens, num_finished = complete_step(state, requests, batch, num_entries, sampled, finished)
    for k in range(num_finished):
        free_row(memory, rules, requests["row"][finished[k]])
        requests["row"][finished[k]] = NO_ROW
    return num_sampled, num_tokens, num_finished
