"""The step of naive serving, compiled: one padded batch after another, by the rules that `naive_scheduler` tells."""

from typing import Any, NamedTuple

from pagedkv.arrays import Int64Array
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
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.vllm_step import add_entry
from pagedkv.scheduling.waiting import (
    KV_MEMORY,
    MAX_NUM_SEQS,
    NOBODY_WAITS,
    NUM_RUNNING,
    NUM_WAITING,
    WAITING_HEAD,
    SchedulerArrays,
    drop_first,
    drop_head,
    leave_running,
    queue_last,
    start_running,
)
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import admit, covers, free_row, grant

NUM_COLUMNS, NEW_COLUMNS = range(2)
"""In `NaiveBatches.columns`: tokens of each row of the running batch, padding included; those of them that this step computes."""


class NaiveBatches(NamedTuple):
    """The limits of a batch, and how long it is."""

    max_model_len: int
    max_num_batched_tokens: int
    columns: Int64Array


@lean_jit
def _next_batch(naive: NaiveBatches, state: SchedulerArrays, requests: RequestArrays) -> tuple[int, int]:
    """Return how many at the head of the queue make the next batch, and the longest prompt among them."""
    size = longest = most_prompt = most_output = 0
    for k in range(min(state.counts[NUM_WAITING], state.running.size)):
        request = state.waiting[(state.counts[WAITING_HEAD] + k) % state.waiting.size]
        most_prompt = max(most_prompt, requests["prompt_tokens"][request])
        most_output = max(most_output, requests["output_tokens"][request])
        if most_prompt + most_output > naive.max_model_len or most_prompt * (k + 1) > naive.max_num_batched_tokens:
            break
        size, longest = k + 1, most_prompt
    return size, longest


@lean_jit
def _fail_all(
    state: SchedulerArrays, requests: RequestArrays, memory: Any, rules: Any, num_waiting: int, failed: Int64Array
) -> int:
    """End all who run, and as many at the head of the queue, with an error; return how many. What they computed is forgotten."""
    num_failed = 0
    while state.counts[NUM_RUNNING] > 0:
        failed[num_failed] = state.running[0]
        free_row(memory, rules, leave_running(state, requests, 0))
        num_failed += 1
    for _ in range(num_waiting):
        failed[num_failed] = drop_head(state, requests, False)  # noqa: FBT003 - fcfs
        num_failed += 1
    return num_failed


@lean_jit
def _start_batch(
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    batch: StepBatch,
    size: int,
    columns: int,
) -> int:
    """Let the first `size` of the queue run, each with slots for all `columns`; return how many got them."""
    for i in range(size):
        request, row = state.waiting[state.counts[WAITING_HEAD]], state.free_rows[i]
        if not admit(memory, rules, requests, segments, request, row, 0, columns, False):  # noqa: FBT003 - no watermark
            return i
        drop_head(state, requests, False)  # noqa: FBT003 - fcfs
        requests["num_queried_tokens"][request] += requests["num_known_tokens"][request]
        start_running(state, requests, request, row)
        add_entry(batch, i, requests, request, row, requests["num_known_tokens"][request])
    return size


@lean_jit
def _continue_batch(
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    batch: StepBatch,
    columns: int,
) -> bool:
    """Let every row have slots for all `columns`; return whether there are. Whoever has all its tokens goes on as padding."""
    for i in range(state.counts[NUM_RUNNING]):
        request = state.running[i]
        row, computed = requests["row"][request], requests["num_computed_tokens"][request]
        enough = covers(memory, rules, row, columns, computed)
        if not (enough or grant(memory, rules, requests, segments, request, row, columns - computed)):
            return False
        add_entry(batch, i, requests, request, row, requests["num_known_tokens"][request] - computed)
    return True


@decide_step.register(NaiveBatches)
@lean_jit
def _decide_step(
    naive: NaiveBatches,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    batch: StepBatch,
    preempted: Int64Array,
    failed: Int64Array,
    decision: Int64Array,
) -> None:
    """Go on with the batch, or start the next one; if its slots run short, all of it fails. O(batch), and the memory's."""
    counts, columns = state.counts, naive.columns
    size = starts = counts[NUM_RUNNING]
    columns[NEW_COLUMNS], decision[RAN_BEFORE] = 1, size
    if size > 0:
        fits = _continue_batch(state, requests, memory, rules, segments, batch, columns[NUM_COLUMNS] + 1)
        starts = 0
    else:
        size, columns[NEW_COLUMNS] = _next_batch(naive, state, requests)
        starts = size - _start_batch(state, requests, memory, rules, segments, batch, size, columns[NEW_COLUMNS])
        fits = starts == 0
    columns[NUM_COLUMNS] += columns[NEW_COLUMNS]
    decision[ENTRIES], decision[PREEMPTED], decision[FAILED], decision[BLOCKER] = size, 0, 0, MAX_NUM_SEQS
    if not fits:
        decision[FAILED] = _fail_all(state, requests, memory, rules, starts, failed)
        decision[RAN_BEFORE] = decision[ENTRIES] = columns[NUM_COLUMNS] = columns[NEW_COLUMNS] = 0
        decision[BLOCKER] = KV_MEMORY
    if counts[NUM_WAITING] == 0:
        decision[BLOCKER] = NOBODY_WAITS


@apply_step.register(NaiveBatches)
@lean_jit
def _apply_step(
    naive: NaiveBatches,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    batch: StepBatch,
    num_entries: int,
    sampled: Int64Array,
    finished: Int64Array,
) -> tuple[int, int, int]:
    """Count tokens as computed; if all rows have all of theirs, `generate` returns: the batch is finished. O(batch)."""
    returns = True
    for i in range(num_entries):
        request = batch["request"][i]
        requests["num_computed_tokens"][request] += batch["num_scheduled_tokens"][i]
        final = requests["prompt_tokens"][request] + requests["output_tokens"][request]
        returns &= requests["num_computed_tokens"][request] == final - 1
    num_sampled = 0
    for i in range(num_entries):
        request = batch["request"][i]
        final = requests["prompt_tokens"][request] + requests["output_tokens"][request]
        if returns or requests["num_known_tokens"][request] < final - 1:
            requests["num_known_tokens"][request] += 1
            sampled[num_sampled] = request
            num_sampled += 1
    if not returns:
        return num_sampled, num_sampled, 0
    for i in range(num_entries):
        request = batch["request"][i]
        finished[i] = request
        free_row(memory, rules, requests["row"][request])
        state.free_rows[num_entries - 1 - i] = requests["row"][request]
        requests["row"][request] = NO_ROW
    state.counts[NUM_RUNNING] = naive.columns[NUM_COLUMNS] = 0
    return num_sampled, num_sampled, num_entries


@forward_passes.register(NaiveBatches)
@lean_jit
def _forward_passes(
    naive: NaiveBatches,
    state: SchedulerArrays,
    requests: RequestArrays,
    batch: StepBatch,
    num_entries: int,
    passes: StepBatch,
    ends: Int64Array,
) -> int:
    """Write the step as it is computed: padding and all."""
    for i in range(num_entries):
        passes[i] = batch[i]
        passes["num_scheduled_tokens"][i] = naive.columns[NEW_COLUMNS]
        passes["num_slots_needed"][i] = naive.columns[NUM_COLUMNS]
    ends[0] = num_entries
    return 1


queue_request.register(NaiveBatches)(queue_last)
drop_request.register(NaiveBatches)(drop_first)
