"""A step over any allocator: compiled functions for the parts between which the allocator is asked; and the end of every step."""

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.vllm_step import SchedulerLimits, add_entry
from pagedkv.scheduling.waiting import NUM_RUNNING, NUM_WAITING, WAITING_HEAD, SchedulerArrays
from pagedkv.step_batch import StepBatch


@lean_jit
def plan_step(state: SchedulerArrays, requests: RequestArrays, limits: SchedulerLimits, batch: StepBatch) -> tuple[int, int]:
    """Write into `batch` what the token budget allows: running requests in order, then the head of the queue.

    O(entries). Nothing but `batch` changes.

    Returns:
        (entries of running requests, entries in all).
    """
    num_running, num_waiting = state.counts[NUM_RUNNING], state.counts[NUM_WAITING]
    budget = limits.max_num_batched_tokens
    threshold = limits.long_prefill_token_threshold if num_running + num_waiting > 1 else 0
    entries = 0
    for i in range(num_running):
        if budget == 0:
            break
        request = state.running[i]
        tokens = requests["num_known_tokens"][request] - requests["num_computed_tokens"][request]
        if threshold > 0:
            tokens = min(tokens, threshold)
        tokens = min(tokens, budget)
        add_entry(batch, entries, requests, request, requests["row"][request], tokens)
        entries += 1
        budget -= tokens
    running_entries = entries
    for k in range(min(num_waiting, state.running.size - num_running)):
        if budget == 0:
            break
        request = state.waiting[(state.counts[WAITING_HEAD] + k) % state.waiting.size]
        tokens = requests["num_known_tokens"][request]
        if threshold > 0:
            tokens = min(tokens, threshold)
        if tokens > budget:
            if not limits.enable_chunked_prefill:
                break
            tokens = budget
        add_entry(batch, entries, requests, request, state.free_rows[num_running + k], tokens)
        entries += 1
        budget -= tokens
    return running_entries, entries


@lean_jit
def preempt_last(state: SchedulerArrays, requests: RequestArrays) -> int:
    """Move the last running request to the front of the queue, its computed tokens forgotten; return the row it leaves."""
    num_running = state.counts[NUM_RUNNING] - 1
    request = state.running[num_running]
    row = requests["row"][request]
    requests["row"][request] = NO_ROW
    requests["num_computed_tokens"][request] = 0
    requests["num_preemptions"][request] += 1
    state.free_rows[num_running] = row
    head = (state.counts[WAITING_HEAD] - 1) % state.waiting.size
    state.waiting[head] = request
    state.counts[NUM_RUNNING] = num_running
    state.counts[WAITING_HEAD] = head
    state.counts[NUM_WAITING] += 1
    return int(row)


@lean_jit
def admit(state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, first: int, last: int) -> None:
    """Move the requests of entries `first` to `last` from the head of the queue to the running ones. O(last - first)."""
    for i in range(first, last):
        request = batch["request"][i]
        requests["row"][request] = batch["row"][i]
        state.running[state.counts[NUM_RUNNING]] = request
        state.counts[NUM_RUNNING] += 1
    state.counts[WAITING_HEAD] = (state.counts[WAITING_HEAD] + last - first) % state.waiting.size
    state.counts[NUM_WAITING] -= last - first


@lean_jit
def complete_step(
    state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, num_entries: int, sampled: Int64Array, finished: Int64Array
) -> tuple[int, int]:
    """Count the step's tokens as computed and give one output token to each request whose known tokens all are.

    Args:
        state: Who runs; finished requests leave it, the others keep their order.
        requests: Their columns.
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
