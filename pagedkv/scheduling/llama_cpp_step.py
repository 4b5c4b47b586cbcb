"""One step of llama.cpp's server: what of its batch gets cells, who gets a slot, who ends with an error, what is done."""

from typing import Any

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
from pagedkv.scheduling.completion import complete_step
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.server_batch import NUM_ASSIGNED, NUM_PENDING, ServerBatch, cells_for, fill_batch, generates, look_again
from pagedkv.scheduling.slot_steps import end_row, find_slot, num_spare_cells
from pagedkv.scheduling.ubatches import equal_split, simple_split
from pagedkv.scheduling.vllm_step import add_entry
from pagedkv.scheduling.waiting import (
    NUM_RUNNING,
    SchedulerArrays,
    blocker_of,
    drop_first,
    drop_head,
    queue_last,
    start_running,
)
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import admit, grant


@lean_jit
def _start(state: SchedulerArrays, requests: RequestArrays, request: int, row: int, num_cached: int) -> None:
    """Let `request`, the head of the queue, run in `row`, which nobody has, with its first `num_cached` tokens computed."""
    drop_head(state, requests, False)  # noqa: FBT003 - first come, first served
    free_rows, first = state.free_rows, state.counts[NUM_RUNNING]
    place = first
    while free_rows[place] != row:
        place += 1
    free_rows[place], free_rows[first] = free_rows[first], row
    requests["num_computed_tokens"][request] = num_cached
    requests["num_cached_tokens"][request] = requests["num_hit_tokens"][request] = num_cached
    requests["num_queried_tokens"][request] = requests["num_known_tokens"][request]
    start_running(state, requests, request, row)


@lean_jit
def _schedule_part(
    server: ServerBatch,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    size: int,
    batch: StepBatch,
) -> tuple[int, int]:
    """Let the first `size` tokens of the batch get cells, in order, as far as there are some.

    Returns:
        (entries that ran before, entries in all).
    """
    ran_before = entries = 0
    for i in range(server.counts[NUM_PENDING]):
        if size == 0:
            break
        request = server.requests[i]
        tokens = min(server.num_tokens[i], size)
        size -= tokens
        row = requests["row"][request]
        if row != NO_ROW:
            if not grant(memory, rules, requests, segments, request, row, tokens):
                break
            ran_before += 1
            server.num_tokens[i] -= tokens
        else:
            row, found = find_slot(memory.slots, rules, requests, segments, request)
            rest = requests["num_known_tokens"][request] - found
            if not admit(memory, rules, requests, segments, request, row, found, min(tokens, rest), state.counts[NUM_RUNNING] > 0):
                break
            _start(state, requests, request, row, found)
            server.counts[NUM_ASSIGNED] -= 1
            server.num_tokens[i] = server.num_tokens[i] - tokens if tokens < rest else 0  # the slot may have more than it seemed
            tokens = min(tokens, rest)
        add_entry(batch, entries, requests, request, row, tokens)
        entries += 1
    left = 0
    for i in range(server.counts[NUM_PENDING]):
        if server.num_tokens[i] > 0:
            server.requests[left], server.num_tokens[left] = server.requests[i], server.num_tokens[i]
            left += 1
    server.counts[NUM_PENDING] = left
    return ran_before, entries


@lean_jit
def _put_in_order(server: ServerBatch, state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, entries: int) -> None:
    """Let those in the step be the head of the running list, in its order; who is left out follows, by number."""
    number, kept, marks, order = state.counts[NUM_RUNNING], 0, server.left, server.order
    if entries < number:
        for row in range(marks.size):
            marks[row] = 0
        for i in range(entries):
            marks[batch["row"][i]] = 1
        for i in range(number):
            request = state.running[i]
            if marks[requests["row"][request]] == 0:
                place = kept
                while place > 0 and order[place - 1] > request:
                    order[place] = order[place - 1]
                    place -= 1
                order[place] = request
                kept += 1
    for i in range(entries):
        state.running[i] = batch["request"][i]
    for i in range(kept):
        state.running[entries + i] = order[i]


@lean_jit
def _fail_all(
    server: ServerBatch, state: SchedulerArrays, requests: RequestArrays, memory: Any, rules: Any, failed: Int64Array
) -> int:
    """End all that have a server slot, or the promise of one, with an error: their slots are empty then. Return how many."""
    number = 0
    for row in range(memory.slots.runs.size):
        if memory.slots.runs[row]:
            failed[number] = memory.slots.requests[row]
            requests["row"][failed[number]] = NO_ROW
            requests["num_computed_tokens"][failed[number]] = 0
            end_row(memory, rules, row, 0)
            number += 1
        state.free_rows[row] = row
    state.counts[NUM_RUNNING] = 0
    for _ in range(server.counts[NUM_ASSIGNED]):
        failed[number] = drop_head(state, requests, False)  # noqa: FBT003
        number += 1
    server.counts[NUM_PENDING] = server.counts[NUM_ASSIGNED] = 0
    return number


@decide_step.register(ServerBatch)
@lean_jit
def _decide_step(
    server: ServerBatch,
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
    """Decide by the rules of llama-server: see `LlamaCppScheduler`. O(server slots + cells), at admission also their segments."""
    if server.counts[NUM_PENDING] == 0:
        fill_batch(server, state, requests, memory, rules, segments)
    else:
        look_again(server, requests, memory, rules, segments)
    size, spare = server.n_batch, num_spare_cells(memory, rules)
    while cells_for(server, size) > spare:
        size //= 2
    num_failed, refused = 0, False
    ran_before, entries = _schedule_part(server, state, requests, memory, rules, segments, size, batch)
    if entries > 0:
        _put_in_order(server, state, requests, batch, entries)
        refused = server.counts[NUM_PENDING] > 0
    elif server.counts[NUM_PENDING] > 0:
        num_failed, refused = _fail_all(server, state, requests, memory, rules, failed), True
    decision[RAN_BEFORE], decision[ENTRIES], decision[PREEMPTED] = ran_before, entries, 0
    decision[BLOCKER], decision[FAILED] = blocker_of(state, refused), num_failed


@apply_step.register(ServerBatch)
@lean_jit
def _apply_step(
    server: ServerBatch,
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
    """Slots of those who are done become idle, in scheduling order, and remember what was computed."""
    num_sampled, num_tokens, num_finished = complete_step(state, requests, batch, num_entries, sampled, finished)
    for k in range(num_finished):
        end_row(memory, rules, requests["row"][finished[k]], requests["num_computed_tokens"][finished[k]])
        requests["row"][finished[k]] = NO_ROW
    return num_sampled, num_tokens, num_finished


def most_passes(server: ServerBatch) -> int:
    """Return how many micro-batches a batch has at most.

    Each but the last ends a sequence, or computes more than half of the tokens that it may.
    """
    return server.requests.size + 2 * -(-server.n_batch // server.n_ubatch) + 1


@forward_passes.register(ServerBatch)
@lean_jit
def _forward_passes(
    server: ServerBatch,
    state: SchedulerArrays,
    requests: RequestArrays,
    batch: StepBatch,
    num_entries: int,
    passes: StepBatch,
    ends: Int64Array,
) -> int:
    """Cut the step into micro-batches. In the server's batch slots that generate come first, each part by their numbers."""
    order = server.order[:num_entries]
    for i in range(num_entries):
        prompt, row, place = not generates(requests, batch["request"][i]), batch["row"][i], i
        while place > 0:
            other = order[place - 1]
            before = not generates(requests, batch["request"][other])
            if before < prompt or (before == prompt and batch["row"][other] < row):
                break
            order[place] = other
            place -= 1
        order[place] = i
    if server.equal_sequences:
        return equal_split(batch, order, server.n_ubatch, server.left, passes, ends)
    return simple_split(batch, order, server.n_ubatch, passes, ends)


queue_request.register(ServerBatch)(queue_last)
drop_request.register(ServerBatch)(drop_first)
