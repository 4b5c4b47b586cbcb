"""One step of SGLang's scheduler, compiled: who prefills, who decodes, who is retracted, and what follows when it is done.

As in SGLang, a request that a decode step finished counts as running until the next decode step, though it holds nothing any more,
and a batch found full stays full until somebody leaves. Source: behaviour of SGLang 0.5.23.
"""

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
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.radix_grants import RowArrays, RowRules, finish_row, shrink_row, store_row
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.sglang_admission import prefill
from pagedkv.scheduling.sglang_arrays import BATCH_SIZE, CHANCE, FULL, NUM_COMPUTING, NUM_DECODING, NUM_RESUMED, READY, SGLangEngine
from pagedkv.scheduling.sglang_batch import drop_finished, join_queue, know_tokens, leave_row, list_holders, num_drafts
from pagedkv.scheduling.sglang_budgets import Prefills
from pagedkv.scheduling.sglang_decoding import decode
from pagedkv.scheduling.vllm_step import add_entry
from pagedkv.scheduling.waiting import (
    KV_MEMORY,
    NOBODY_WAITS,
    NUM_ACCEPTED,
    NUM_DRAFTED,
    NUM_RUNNING,
    NUM_WAITING,
    TOKEN_BUDGET,
    SchedulerArrays,
    drop_first,
)
from pagedkv.step_batch import StepBatch


@lean_jit
def _write_step(
    engine: SGLangEngine, state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, decision: Int64Array
) -> None:
    """Write the entries of the step: the prompt in pieces, who decodes, who is admitted."""
    counters, prefills, entries = engine.counters, engine.one.prefills, 0
    for i in range(counters[NUM_RESUMED]):
        request = prefills["request"][i]
        add_entry(batch, entries, requests, request, requests["row"][request], prefills["end"][i] - prefills["start"][i])
        entries += 1
    for i in range(counters[NUM_DECODING]):
        request, tokens = engine.batch[i], 1
        if engine.numbers.num_speculative_tokens > 0:
            tokens += num_drafts(engine.numbers, requests, request)
        add_entry(batch, entries, requests, request, requests["row"][request], tokens)
        entries += 1
    decision[RAN_BEFORE] = entries
    for i in range(counters[NUM_RESUMED], counters[NUM_COMPUTING]):
        request = prefills["request"][i]
        add_entry(batch, entries, requests, request, requests["row"][request], prefills["end"][i] - prefills["start"][i])
        entries += 1
    decision[ENTRIES] = entries
    for i in range(entries):
        state.running[i] = batch["request"][i]
    if entries < state.counts[NUM_RUNNING]:
        list_holders(engine.batch, counters, requests, state.running, entries)


@lean_jit
def _blocker(counters: Int64Array, counts: Int64Array, decision: Int64Array) -> int:
    """Return why the head of the queue did not start."""
    if counts[NUM_WAITING] == 0:
        return NOBODY_WAITS
    if decision[PREEMPTED] > 0 or decision[ENTRIES] == 0:
        return KV_MEMORY
    return TOKEN_BUDGET if counters[FULL] == NOBODY_WAITS else int(counters[FULL])


@decide_step.register(SGLangEngine)
@lean_jit
def _decide_step(
    engine: SGLangEngine,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: RowArrays,
    rules: RowRules,
    segments: Segments,
    batch: StepBatch,
    preempted: Int64Array,
    failed: Int64Array,
    decision: Int64Array,
) -> None:
    """Decide by SGLang's rules. Nobody is in the step if the head of the queue cannot run though nobody else does."""
    counters = engine.counters
    if counters[CHANCE] != READY:  # else it goes on where it had no order
        counters[NUM_RESUMED] = counters[NUM_COMPUTING] = counters[NUM_DECODING] = 0
        decision[PREEMPTED] = decision[FAILED] = 0
    while True:
        had_running = counters[BATCH_SIZE] > 0
        if prefill(engine, state, requests, memory, rules):
            break
        if decode(engine, state, requests, memory, rules, preempted, failed, decision):
            break
        engine.ratio[0] = engine.ratio_rules.initial  # SGLang's loop turns idly; in the next turn those who finished are gone
        if not had_running:
            counters[FULL] = NOBODY_WAITS
            break
    _write_step(engine, state, requests, batch, decision)
    decision[BLOCKER] = _blocker(counters, state.counts, decision)


@lean_jit
def _store(
    engine: SGLangEngine, requests: RequestArrays, memory: RowArrays, rules: RowRules, request: int, num_tokens: int
) -> None:
    """Put the first tokens of a prompt, which are computed, into the tree."""
    if rules.caches:
        know_tokens(engine.segments, requests, request, num_tokens, engine.tokens)
        row = requests["row"][request]
        namespace, priority = engine.records["namespace"][request], requests["priority"][request]
        store_row(memory, rules, row, engine.tokens, num_tokens, namespace, priority)


@lean_jit
def _finish(
    engine: SGLangEngine, state: SchedulerArrays, requests: RequestArrays, memory: RowArrays, rules: RowRules, request: int
) -> None:
    """Put all that `request` has computed into the tree; give the rest and the row back."""
    number, row = requests["num_computed_tokens"][request], requests["row"][request]
    if rules.caches:
        know_tokens(engine.segments, requests, request, number, engine.tokens)
    finish_row(memory, rules, row, engine.tokens, number, engine.records["namespace"][request], requests["priority"][request])
    leave_row(state, requests, request)


@lean_jit
def _merge(batch: Int64Array, counters: Int64Array, prefills: Prefills, room: Int64Array, requests: RequestArrays) -> None:
    """Let those whose prompts are computed, and who are not done, run with the others."""
    joined, number = 0, counters[BATCH_SIZE]
    decoding = counters[NUM_DECODING] > 0
    for i in range(counters[NUM_COMPUTING]):
        request = prefills["request"][i]
        if not prefills["chunked"][i] and requests["row"][request] != NO_ROW:
            room[joined] = request
            joined += 1
    # Somebody has left, a prompt in pieces included, or the batch is a new one, and nobody has found that full.
    if joined < counters[NUM_COMPUTING] or number == 0 or decoding:
        counters[FULL] = NOBODY_WAITS
    first = number
    if decoding:  # they were one batch, prompts first
        first, number = 0, drop_finished(batch, counters, requests)
        for i in range(number - 1, -1, -1):
            batch[joined + i] = batch[i]
    for i in range(joined):
        batch[first + i] = room[i]
    counters[BATCH_SIZE] = joined + number


@lean_jit
def _sample(requests: RequestArrays, request: int, sampled: Int64Array, place: int) -> bool:
    """Give `request` an output token; return whether that was its last."""
    requests["num_known_tokens"][request] += 1
    sampled[place] = request
    return bool(requests["num_known_tokens"][request] == requests["prompt_tokens"][request] + requests["output_tokens"][request])


@lean_jit
def _count_decoded(counts: Int64Array, requests: RequestArrays, batch: StepBatch, entry: int) -> int:
    """Count what a decode step has computed for `entry` as known, but for the usual token; return how many drafts are accepted."""
    request, drafts = batch["request"][entry], batch["num_scheduled_tokens"][entry] - 1
    wanted = requests["prompt_tokens"][request] + requests["output_tokens"][request] - requests["num_known_tokens"][request] - 1
    extra = min(batch["num_accepted_tokens"][entry], drafts, wanted)
    requests["num_computed_tokens"][request] += 1 + extra
    requests["num_known_tokens"][request] += extra
    counts[NUM_DRAFTED] += drafts
    counts[NUM_ACCEPTED] += extra
    return int(extra)


@apply_step.register(SGLangEngine)
@lean_jit
def _apply_step(
    engine: SGLangEngine,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: RowArrays,
    rules: RowRules,
    segments: Segments,
    batch: StepBatch,
    num_entries: int,
    sampled: Int64Array,
    finished: Int64Array,
) -> tuple[int, int, int]:
    """Count the step's tokens as computed. Who is done gives its memory back; so do drafts that are not accepted."""
    counters, prefills, num_sampled, num_finished, extra = engine.counters, engine.one.prefills, 0, 0, 0
    first, last = counters[NUM_RESUMED], counters[NUM_RESUMED] + counters[NUM_DECODING]
    for i in range(num_entries):
        request, place = batch["request"][i], i
        if first <= i < last:
            extra += _count_decoded(state.counts, requests, batch, i)
        else:
            if i >= last:
                place = i - counters[NUM_DECODING]
            requests["num_computed_tokens"][request] = prefills["end"][place]
            if prefills["chunked"][place]:
                continue
        if _sample(requests, request, sampled, num_sampled):
            finished[num_finished] = request
            num_finished += 1
        num_sampled += 1
    for i in range(counters[NUM_COMPUTING]):
        request = prefills["request"][i]
        final = requests["prompt_tokens"][request] + requests["output_tokens"][request]
        if requests["num_known_tokens"][request] < final:
            _store(engine, requests, memory, rules, request, prefills["end"][i])
    for i in range(num_finished):
        _finish(engine, state, requests, memory, rules, finished[i])
    if engine.numbers.num_speculative_tokens > 0:
        for i in range(first, last):
            request = batch["request"][i]
            if requests["row"][request] != NO_ROW:
                shrink_row(memory, rules, requests["row"][request], requests["num_computed_tokens"][request])
    if counters[NUM_COMPUTING] > 0:
        _merge(engine.batch, counters, prefills, engine.short.num_prompt, requests)
    counters[NUM_RESUMED] = counters[NUM_COMPUTING] = counters[NUM_DECODING] = 0
    list_holders(engine.batch, counters, requests, state.running, 0)
    if state.counts[NUM_WAITING] == 0 and state.counts[NUM_RUNNING] == 0:  # SGLang's loop turns idly from now on
        counters[BATCH_SIZE], counters[FULL] = 0, NOBODY_WAITS
        engine.ratio[0] = engine.ratio_rules.initial
    return num_sampled, num_sampled + extra, num_finished


@queue_request.register(SGLangEngine)
@lean_jit
def _queue_request(engine: SGLangEngine, state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    join_queue(engine.counters, engine.records, state, requests, request)


forward_passes.register(SGLangEngine)(in_one_pass)
drop_request.register(SGLangEngine)(drop_first)
