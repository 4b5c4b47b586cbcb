"""A step over any allocator: compiled functions for the parts between which the allocator is asked."""

from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.vllm_step import SchedulerLimits, add_entry
from pagedkv.scheduling.waiting import NUM_RUNNING, NUM_WAITING, WAITING_HEAD, SchedulerArrays, drop_head, start_running
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
def admit(state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, first: int, last: int) -> None:
    """Move the requests of entries `first` to `last` from the head of the queue to the running ones. O(last - first)."""
    for i in range(first, last):
        drop_head(state, requests, False)  # noqa: FBT003 - fcfs
        start_running(state, requests, batch["request"][i], batch["row"][i])
