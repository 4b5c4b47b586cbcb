"""TensorRT-LLM's step: a capacity policy says who has memory, the micro-batch scheduler how much of them the step computes."""

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
    in_one_pass,
    queue_request,
)
from pagedkv.jit import lean_jit
from pagedkv.scheduling.capacity_policy import (
    MAX_UTILIZATION,
    STATIC_BATCH,
    Capacity,
    guaranteed_no_evict,
    is_delayed,
    max_utilization,
    static_batch,
    write_started,
)
from pagedkv.scheduling.completion import complete_step
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.micro_batch import MicroBatch, MicroBatchLimits, choose_entries
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.vllm_step import add_entry
from pagedkv.scheduling.waiting import (
    KV_MEMORY,
    NOBODY_WAITS,
    NUM_RUNNING,
    NUM_WAITING,
    SchedulerArrays,
    drop_first,
    start_running,
)
from pagedkv.scheduling.waiting_line import join_line, leave_line
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import admit, begin_step, covers, find_cached, free_row, grant, keep_content, note_computed


class TensorRTLLMEngine(NamedTuple):
    """The rules and limits of a step, and room to decide it."""

    policy: int
    """Who has memory: a number in `CAPACITY_POLICIES`."""
    capacity: Capacity
    limits: MicroBatchLimits
    batch: MicroBatch
    in_step: Int64Array
    """By row: the last step that it had an entry in."""


@lean_jit
def _write_work(batch: MicroBatch, requests: RequestArrays, number: int) -> None:
    """Write what each of those who may run has to compute: all that is left of a prompt, be it cached, or one token."""
    for i in range(number):
        request = batch.requests[i]
        left = requests["num_known_tokens"][request] - requests["num_computed_tokens"][request]
        batch.num_tokens[i] = left
        batch.is_context[i] = left > 1 or requests["row"][request] == NO_ROW


@lean_jit
def _num_new(block_size: int, num_known: int, num_cached: int, num_tokens: int) -> int:
    """Return what an admission with `num_tokens` computes: nothing that is cached, and up to a block's end if it is cut."""
    if num_cached + num_tokens >= num_known:
        return num_known - num_cached
    return (num_cached + num_tokens) // block_size * block_size - num_cached


@lean_jit
def _schedule_running(
    engine: TensorRTLLMEngine,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    num_chosen: int,
    batch: StepBatch,
) -> tuple[int, bool]:
    """Let those who run go on; return entries, and whether memory refused one."""
    entries, refused = 0, False
    for i in range(num_chosen):
        request, tokens = engine.batch.requests[engine.batch.chosen[i]], engine.batch.sizes[i]
        row = requests["row"][request]
        if row == NO_ROW:
            continue
        computed = requests["num_computed_tokens"][request]
        if covers(memory, rules, row, computed + tokens, computed) or grant(
            memory, rules, requests, segments, request, row, tokens
        ):
            add_entry(batch, entries, requests, request, row, tokens)
            entries += 1
        else:
            refused = True
    return entries, refused


@lean_jit
def _schedule_waiting(
    engine: TensorRTLLMEngine,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    num_chosen: int,
    batch: StepBatch,
    entries: int,
) -> tuple[int, bool]:
    """Admit those who wait, until memory refuses one; return entries, and whether it did."""
    capacity = engine.capacity
    for i in range(num_chosen):
        request = engine.batch.requests[engine.batch.chosen[i]]
        if requests["row"][request] != NO_ROW:
            continue
        known = requests["num_known_tokens"][request]
        cached = find_cached(memory, rules, requests, segments, request)
        tokens = _num_new(capacity.block_size, known, cached, engine.batch.sizes[i])
        if tokens == 0:
            continue
        row = state.free_rows[state.counts[NUM_RUNNING]]
        if not admit(memory, rules, requests, segments, request, row, cached, tokens, False):  # noqa: FBT003
            return entries, True
        leave_line(state, requests, request)
        requests["num_computed_tokens"][request] = cached
        if requests["num_queried_tokens"][request] == 0:
            requests["num_cached_tokens"][request] = cached
        requests["num_queried_tokens"][request] += known
        requests["num_hit_tokens"][request] += cached
        start_running(state, requests, request, row)
        add_entry(batch, entries, requests, request, row, tokens)
        entries += 1
    return entries, False


@lean_jit
def _put_in_order(
    engine: TensorRTLLMEngine, state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, entries: int
) -> None:
    """Let the entries come first among those who run, then those who are left out, by arrival."""
    running, left_out = state.running, engine.capacity.started
    number = state.counts[NUM_RUNNING]
    if entries < number:
        step, num_left_out = engine.capacity.filled.step[0], 0
        for i in range(entries):
            engine.in_step[batch["row"][i]] = step
        for i in range(number):
            request = running[i]
            if engine.in_step[requests["row"][request]] != step:
                place = num_left_out
                while place > 0 and request < left_out[place - 1]:
                    left_out[place] = left_out[place - 1]
                    place -= 1
                left_out[place] = request
                num_left_out += 1
        for i in range(num_left_out):
            running[entries + i] = left_out[i]
    for i in range(entries):
        running[i] = batch["request"][i]


@decide_step.register(TensorRTLLMEngine)
@lean_jit
def _decide_step(
    engine: TensorRTLLMEngine,
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
    """Decide by the capacity policy, then the micro-batch scheduler; nobody fails. O(running + those asked + blocks taken)."""
    capacity, fitting = engine.capacity, engine.batch.requests
    begin_step(memory, rules)
    capacity.filled.step[0] += 1
    num_started, num_paused = write_started(capacity, state, requests), 0
    for i in range(num_started):
        request = capacity.started[i]
        if requests["num_known_tokens"][request] - requests["num_computed_tokens"][request] > 1:
            is_delayed(capacity, requests, memory, rules, segments, request)  # it fills its next block
    if engine.policy == MAX_UTILIZATION:
        number, blocker, num_paused = max_utilization(
            capacity, state, requests, memory, rules, segments, num_started, fitting, preempted
        )
    elif engine.policy == STATIC_BATCH:
        number, blocker = static_batch(capacity, state, requests, memory, rules, segments, num_started, fitting)
    else:
        number, blocker = guaranteed_no_evict(capacity, state, requests, memory, rules, segments, num_started, fitting)
    _write_work(engine.batch, requests, number)
    num_chosen = choose_entries(engine.batch, number, engine.limits)
    ran_before, refused = _schedule_running(engine, requests, memory, rules, segments, num_chosen, batch)
    entries, refused_too = _schedule_waiting(engine, state, requests, memory, rules, segments, num_chosen, batch, ran_before)
    for i in range(num_paused):
        join_line(state, requests, preempted[i])
    _put_in_order(engine, state, requests, batch, entries)
    if refused or refused_too:
        blocker = KV_MEMORY
    decision[RAN_BEFORE], decision[ENTRIES], decision[PREEMPTED], decision[FAILED] = ran_before, entries, num_paused, 0
    decision[BLOCKER] = blocker if state.counts[NUM_WAITING] > 0 else NOBODY_WAITS


@apply_step.register(TensorRTLLMEngine)
@lean_jit
def _apply_step(
    engine: TensorRTLLMEngine,
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
    """Do as `complete_step`; full blocks are stored before any are given back. O(entries + running + blocks given back)."""
    num_sampled, num_tokens, num_finished = complete_step(state, requests, batch, num_entries, sampled, finished)
    if engine.capacity.shares:
        for i in range(num_entries):
            note_computed(memory, rules, requests, segments, batch["request"][i], batch["row"][i])
    for k in range(num_finished):
        request = finished[k]
        row = requests["row"][request]
        if engine.capacity.shares:
            keep_content(memory, rules, requests, segments, request, row)
        free_row(memory, rules, row)
        requests["row"][request] = NO_ROW
    return num_sampled, num_tokens, num_finished


@queue_request.register(TensorRTLLMEngine)
@lean_jit
def _queue_request(engine: TensorRTLLMEngine, state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    join_line(state, requests, request)


forward_passes.register(TensorRTLLMEngine)(in_one_pass)
drop_request.register(TensorRTLLMEngine)(drop_first)
