"""vLLM's step over KV memory of any compiled kind: who computes how many tokens, who is preempted, who is admitted, who is done.

Source: the rules that reproduce the recorded decisions of vLLM 0.33.0 (tests/conformance/test_vllm_decisions.py).
"""

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
from pagedkv.scheduling.completion import complete_and_free
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.waiting import (
    NUM_RUNNING,
    NUM_WAITING,
    WAITING_HEAD,
    SchedulerArrays,
    blocker_of,
    drop_head,
    goes_before,
    push_waiting,
    start_running,
    stop_running,
)
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import admit, begin_step, covers, find_cached, free_row, grant


class SchedulerLimits(NamedTuple):
    """The rules and limits of a step, as plain numbers for compiled code."""

    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    adaptive_threshold: bool
    enable_chunked_prefill: bool
    by_priority: bool
    num_speculative_tokens: int
    """Drafts of a request that decodes."""
    max_model_len: int

    @classmethod
    def of(cls, settings: SchedulerSettings) -> "SchedulerLimits":
        """Return those of `settings`."""
        return cls(
            int(settings.max_num_batched_tokens),
            int(settings.long_prefill_token_threshold),
            bool(settings.adaptive_long_prefill_threshold),
            bool(settings.enable_chunked_prefill),
            settings.policy == "priority",
            int(settings.num_speculative_tokens),
            int(settings.max_model_len),
        )


@lean_jit
def _victim(state: SchedulerArrays, requests: RequestArrays, limits: SchedulerLimits) -> int:
    """Return the place of the running request that goes first: the last one, or the least urgent, the youngest of these."""
    worst = state.counts[NUM_RUNNING] - 1
    if limits.by_priority:
        for i in range(worst):
            a, b = state.running[i], state.running[worst]
            if goes_before(requests, b, a):
                worst = i
    return int(worst)


@lean_jit
def add_entry(batch: StepBatch, i: int, requests: RequestArrays, request: int, row: int, num_tokens: int) -> None:
    """Let entry `i` of `batch` be the next `num_tokens` of `request`."""
    batch["request"][i] = request
    batch["row"][i] = row
    batch["num_scheduled_tokens"][i] = num_tokens
    batch["num_slots_needed"][i] = requests["num_computed_tokens"][request] + num_tokens
    batch["num_known_tokens"][i] = requests["num_known_tokens"][request]
    batch["admission_slots"][i] = requests["admission_slots"][request]
    batch["num_accepted_tokens"][i] = 0


@lean_jit
def _schedule_running(
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    segments: Segments,
    limits: SchedulerLimits,
    rules: Any,
    threshold: int,
    batch: StepBatch,
    preempted: Int64Array,
) -> tuple[int, int, int]:
    """Let running requests go on, in their order; return entries, preemptions and the token budget that is left."""
    budget, entries, num_preempted = limits.max_num_batched_tokens, 0, 0  # entry i of the batch is running request i
    while entries < state.counts[NUM_RUNNING] and budget > 0:
        request = state.running[entries]
        known = requests["num_known_tokens"][request]
        tokens = known - requests["num_computed_tokens"][request]
        if tokens == 1 and known > requests["prompt_tokens"][request]:  # who decodes has drafts to verify
            tokens += min(limits.num_speculative_tokens, limits.max_model_len - known)
        if threshold > 0:
            tokens = min(tokens, threshold)
        tokens = min(tokens, budget)
        row, gone = requests["row"][request], False
        slots = requests["num_computed_tokens"][request] + tokens
        enough = covers(memory, rules, row, slots, slots - tokens)
        while not (enough or gone or grant(memory, rules, requests, segments, request, row, tokens)):
            place = _victim(state, requests, limits)
            preempted[num_preempted] = state.running[place]
            num_preempted += 1
            gone = place == entries
            if place < entries:  # scheduled in this step already: it leaves it, and its tokens can be used
                budget += batch["num_scheduled_tokens"][place]
                for i in range(place, entries - 1):
                    batch[i] = batch[i + 1]
                entries -= 1
            free_row(memory, rules, stop_running(state, requests, place, limits.by_priority))
        if not gone:
            add_entry(batch, entries, requests, request, row, tokens)
            entries += 1
            budget -= tokens
        elif not limits.by_priority:
            break
    return entries, num_preempted, budget


@lean_jit
def _schedule_waiting(
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    segments: Segments,
    limits: SchedulerLimits,
    rules: Any,
    threshold: int,
    batch: StepBatch,
    entries: int,
    budget: int,
) -> tuple[int, bool]:
    """Admit from the head of the queue; return entries, and whether memory refused the next one."""
    counts = state.counts
    while budget > 0 and counts[NUM_WAITING] > 0 and counts[NUM_RUNNING] < state.running.size:
        request = state.waiting[counts[WAITING_HEAD]]
        cached = find_cached(memory, rules, requests, segments, request)
        tokens = requests["num_known_tokens"][request] - cached
        if threshold > 0:
            tokens = min(tokens, threshold)
        if tokens > budget:
            if not limits.enable_chunked_prefill:
                break
            tokens = budget
        row = state.free_rows[counts[NUM_RUNNING]]
        if not admit(memory, rules, requests, segments, request, row, cached, tokens, counts[NUM_RUNNING] > 0):
            return entries, True
        drop_head(state, requests, limits.by_priority)
        requests["num_computed_tokens"][request] = cached
        if requests["num_queried_tokens"][request] == 0:
            requests["num_cached_tokens"][request] = cached
        requests["num_queried_tokens"][request] += requests["num_known_tokens"][request]
        requests["num_hit_tokens"][request] += cached
        start_running(state, requests, request, row)
        add_entry(batch, entries, requests, request, row, tokens)
        entries += 1
        budget -= tokens
    return entries, False


@decide_step.register(SchedulerLimits)
@lean_jit
def _decide_step(
    limits: SchedulerLimits,
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
    """Decide by vLLM's rules; nobody fails. O(entries + blocks taken), but O(running) more for each preemption."""
    counts = state.counts
    threshold = limits.long_prefill_token_threshold
    present = counts[NUM_RUNNING] + counts[NUM_WAITING]
    begin_step(memory, rules)
    if present == 1:
        threshold = 0
    elif threshold > 0 and limits.adaptive_threshold:
        threshold = max(threshold, limits.max_num_batched_tokens // present)
    ran_before, num_preempted, budget = _schedule_running(
        state, requests, memory, segments, limits, rules, threshold, batch, preempted
    )
    entries, refused = ran_before, num_preempted > 0
    if not refused:
        entries, refused = _schedule_waiting(state, requests, memory, segments, limits, rules, threshold, batch, ran_before, budget)
    decision[RAN_BEFORE], decision[ENTRIES], decision[PREEMPTED] = ran_before, entries, num_preempted
    decision[BLOCKER], decision[FAILED] = blocker_of(state, refused), 0


@apply_step.register(SchedulerLimits)
@lean_jit
def _apply_step(
    limits: SchedulerLimits,
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
    return complete_and_free(state, requests, memory, rules, batch, num_entries, sampled, finished)


@queue_request.register(SchedulerLimits)
@lean_jit
def _queue_request(limits: SchedulerLimits, state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    push_waiting(state, requests, request, limits.by_priority)


@drop_request.register(SchedulerLimits)
@lean_jit
def _drop_request(limits: SchedulerLimits, state: SchedulerArrays, requests: RequestArrays) -> int:
    return drop_head(state, requests, limits.by_priority)


forward_passes.register(SchedulerLimits)(in_one_pass)
