"""Who decodes in SGLang's next step, compiled, and who is retracted where they do not all fit.

Source: behaviour of SGLang 0.5.23.
"""

from pagedkv.arrays import Int64Array
from pagedkv.engine_step import FAILED, PREEMPTED
from pagedkv.jit import lean_jit
from pagedkv.radix_cache import make_room
from pagedkv.scheduling.radix_grants import RowArrays, RowRules, grow_row, retract_row
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.sglang_arrays import BATCH_SIZE, FULL, HALF_DONE, NOBODY, NUM_DECODING, SGLangEngine
from pagedkv.scheduling.sglang_batch import drop_finished, join_queue, leave_row, num_drafts, slots_for_batch
from pagedkv.scheduling.sglang_retraction import NUM_KEPT, begin_shortage, decayed, next_to_go, ratio_of_kept
from pagedkv.scheduling.waiting import NOBODY_WAITS, SchedulerArrays


@lean_jit
def _retract(
    engine: SGLangEngine,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: RowArrays,
    rules: RowRules,
    preempted: Int64Array,
    failed: Int64Array,
    decision: Int64Array,
) -> None:
    """Take requests out of the batch until the others fit; these are in SGLang's order from then on."""
    counters, short, batch, number = engine.counters, engine.short, engine.batch, engine.counters[BATCH_SIZE]
    for i in range(number):
        request = batch[i]
        short.num_prompt[i], short.max_new[i] = requests["prompt_tokens"][request], engine.records["max_new_tokens"][request]
        short.num_output[i] = requests["num_known_tokens"][request] - requests["prompt_tokens"][request]
    begin_shortage(short, number)
    while True:
        place = next_to_go(short, memory.cache, rules.tree, 1 + engine.numbers.num_speculative_tokens)
        if place == NOBODY:
            break
        request = batch[place]
        retract_row(memory, rules, requests["row"][request])
        leave_row(state, requests, request)
        # SGLang aborts the last one if it is short. Where a prompt in pieces holds the rest, it can come again instead.
        if short.counters[NUM_KEPT] == 0 and counters[HALF_DONE] == NOBODY:
            failed[decision[FAILED]] = request
            decision[FAILED] += 1
        else:
            preempted[decision[PREEMPTED]] = request
            decision[PREEMPTED] += 1
    engine.ratio[0] = ratio_of_kept(short)
    for i in range(decision[PREEMPTED]):
        request = preempted[i]
        requests["num_computed_tokens"][request] = 0
        requests["num_preemptions"][request] += 1
        join_queue(engine.counters, engine.records, state, requests, request)
    kept = short.counters[NUM_KEPT]
    for i in range(kept):
        short.num_prompt[i] = batch[short.sort.order[i]]
    for i in range(kept):
        batch[i] = short.num_prompt[i]
    counters[BATCH_SIZE] = kept


@lean_jit
def decode(
    engine: SGLangEngine,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: RowArrays,
    rules: RowRules,
    preempted: Int64Array,
    failed: Int64Array,
    decision: Int64Array,
) -> bool:
    """Let every running request make a token, without those for whom there is no room; return whether anybody does."""
    counters, cache, size = engine.counters, memory.cache, rules.tree.block_size
    num_before, per_step = counters[BATCH_SIZE], 1 + engine.numbers.num_speculative_tokens
    number, total = drop_finished(engine.batch, counters, requests), 0
    if number > 0:
        if make_room(cache, rules.tree, slots_for_batch(engine.batch, number, requests, size, per_step)):
            engine.ratio[0] = decayed(engine.ratio_rules, engine.ratio[0])
        else:
            _retract(engine, state, requests, memory, rules, preempted, failed, decision)
            number = counters[BATCH_SIZE]
        for i in range(number):
            request = engine.batch[i]
            needed = requests["num_computed_tokens"][request] + 1 + num_drafts(engine.numbers, requests, request)
            total += max(-(-needed // size) - memory.units_held[requests["row"][request]], 0) * size
        make_room(cache, rules.tree, max(number * size * per_step, total))
        for i in range(number):
            request = engine.batch[i]
            needed = requests["num_computed_tokens"][request] + 1 + num_drafts(engine.numbers, requests, request)
            grow_row(memory, rules, requests["row"][request], needed)
    if number < num_before:
        counters[FULL] = NOBODY_WAITS
    counters[NUM_DECODING] = number
    return number > 0
