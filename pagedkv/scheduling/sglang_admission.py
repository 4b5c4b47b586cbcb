"""Who prefills in SGLang's next step, compiled: the queue in order, one pass over it, and slots for who is taken.

Source: behaviour of SGLang 0.5.23.
"""

from typing import Any

from pagedkv.jit import by_kind, lean_jit
from pagedkv.radix_cache import make_room, num_free_slots
from pagedkv.radix_walks import match_prefix
from pagedkv.scheduling.radix_grants import RowArrays, RowRules, admit_row, grow_row
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.sglang_arrays import (
    BATCH_SIZE,
    CHANCE,
    FULL,
    HALF_DONE,
    NO_CHANCE,
    NOBODY,
    NUM_COMPUTING,
    NUM_DECODING,
    NUM_PASSES,
    NUM_PREFILLED,
    NUM_RESUMED,
    READY,
    WANTED,
    SGLangEngine,
)
from pagedkv.scheduling.sglang_batch import drop_finished, know_tokens, slots_for_batch
from pagedkv.scheduling.sglang_budgets import CONTINUE, CONTINUED, NO_TOKEN, NUM_PREFILLS, begin_pass, is_spent
from pagedkv.scheduling.sglang_order import RANDOM, FcfsQueue, QueueArrays, clear_twins, look_up, order_queue
from pagedkv.scheduling.sglang_pass import add_prefill, resume_prefill
from pagedkv.scheduling.sglang_queue import REFRESH_INTERVAL, REFRESHED_PROMPTS
from pagedkv.scheduling.waiting import (
    KV_MEMORY,
    MAX_NUM_SEQS,
    NOBODY_WAITS,
    NUM_RUNNING,
    NUM_WAITING,
    WAITING_HEAD,
    SchedulerArrays,
    drop_head,
)


@by_kind
def sort_waiting(queue: Any, engine: Any, state: Any, requests: Any, memory: Any, rules: Any, num_running: int) -> Any:
    """Put the queue in the order of the policy; the first `num_running` of state.running run."""


@sort_waiting.register(FcfsQueue)
@lean_jit
def _leave_as_is(
    queue: FcfsQueue,
    engine: SGLangEngine,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: RowArrays,
    rules: RowRules,
    num_running: int,
) -> None:
    """As they came."""


@sort_waiting.register(QueueArrays)
@lean_jit
def _sort_queue(
    queue: QueueArrays,
    engine: SGLangEngine,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: RowArrays,
    rules: RowRules,
    num_running: int,
) -> None:
    """By a policy that does not hold in every queue."""
    numbers, counts = engine.numbers, state.counts
    waiting, head, number = state.waiting, counts[WAITING_HEAD], counts[NUM_WAITING]
    if number > numbers.longest_queue:  # fcfs
        return
    tree = memory.cache.tree
    if numbers.matches:
        num_twins = clear_twins(queue, number)
        for place in range(number):
            request = waiting[(head + place) % waiting.size]
            know_tokens(engine.segments, requests, request, requests["num_known_tokens"][request], engine.tokens)
            look_up(queue, num_twins, tree, rules.tree, requests, engine.records, request, engine.tokens)
    prefilled, records, running = engine.counters[NUM_PREFILLED], engine.records, state.running
    order_queue(queue, numbers.policy, tree, requests, records, waiting, head, number, running, num_running, prefilled)
    for place in range(number):
        queue.sort.scratch[place] = waiting[(head + queue.sort.order[place]) % waiting.size]
    for place in range(number):
        waiting[(head + place) % waiting.size] = queue.sort.scratch[place]


@lean_jit
def _refresh_prompts(
    engine: SGLangEngine, state: SchedulerArrays, requests: RequestArrays, memory: RowArrays, rules: RowRules
) -> None:
    """Let what the first of those who wait will find count as used now, so that it is there when it is their turn."""
    waiting, head, size = state.waiting, state.counts[WAITING_HEAD], rules.tree.block_size
    for place in range(min(state.counts[NUM_WAITING], REFRESHED_PROMPTS)):
        request = waiting[(head + place) % waiting.size]
        number = requests["prompt_tokens"][request] // size * size
        know_tokens(engine.segments, requests, request, number, engine.tokens)
        match_prefix(memory.cache.tree, rules.tree, engine.tokens, number, engine.records["namespace"][request])


@lean_jit
def _walk_queue(
    engine: SGLangEngine, state: SchedulerArrays, requests: RequestArrays, memory: RowArrays, rules: RowRules, room: int
) -> None:
    """Walk the queue; nobody is admitted if the prompt in pieces must go on and cannot."""
    counters, one, limits, records, cache = engine.counters, engine.one, engine.limits, engine.records, memory.cache
    if rules.refreshes and counters[NUM_PASSES] % REFRESH_INTERVAL == 0:
        _refresh_prompts(engine, state, requests, memory, rules)
    counters[NUM_PASSES] += 1
    num_mixed, num_running = 0, 0
    if engine.numbers.enable_mixed_chunk:
        num_mixed = counters[BATCH_SIZE]
    running = state.running  # written anew when the step is decided
    for i in range(counters[BATCH_SIZE]):
        if requests["row"][engine.batch[i]] != NO_ROW:
            running[num_running] = engine.batch[i]
            num_running += 1
    sort_waiting(engine.queue, engine, state, requests, memory, rules, num_running)
    begin_pass(one, limits, requests, records, running, num_running, num_mixed, engine.ratio[0])
    waiting, head, number = state.waiting, state.counts[WAITING_HEAD], state.counts[NUM_WAITING]
    half_done = counters[HALF_DONE]
    if half_done != NOBODY:
        done, held = requests["num_computed_tokens"][half_done], memory.units_held[requests["row"][half_done]]
        # Nothing but the budgets limits it in SGLang, which fails if they are wrong; here it takes what there is.
        free, size = num_free_slots(cache, rules.tree), rules.tree.block_size
        most = held * size + free - done
        resume_prefill(one, limits, free, size, requests, records, half_done, done, waiting, head, number, most)
        if one.counters[NUM_PREFILLS] == 0:
            return
    for place in range(number):
        if is_spent(one):
            break
        if one.counters[NUM_PREFILLS] >= room:
            counters[FULL] = MAX_NUM_SEQS
            break
        request = waiting[(head + place) % waiting.size]
        if rules.caches:  # else there is nothing to find
            know_tokens(engine.segments, requests, request, requests["num_known_tokens"][request], engine.tokens)
        verdict = add_prefill(one, limits, cache, rules.tree, requests, records, running, num_running, request, engine.tokens)
        if verdict != CONTINUE:
            if verdict == NO_TOKEN:
                counters[FULL] = KV_MEMORY
            break


@lean_jit
def _take_up(engine: SGLangEngine, state: SchedulerArrays, requests: RequestArrays, memory: RowArrays, rules: RowRules) -> None:
    """Give the requests of a pass rows and slots."""
    counters, prefills, number = engine.counters, engine.one.prefills, engine.one.counters[NUM_PREFILLS]
    counters[NUM_COMPUTING], counters[HALF_DONE], num_new, size = number, NOBODY, 0, rules.tree.block_size
    for i in range(number):
        request, start = prefills["request"][i], prefills["start"][i]
        num_new += prefills["end"][i] - start
        if prefills["chunked"][i] and counters[HALF_DONE] == NOBODY:
            counters[HALF_DONE] = request
        if prefills["node"][i] == CONTINUED:
            counters[NUM_RESUMED] = 1
            continue
        drop_head(state, requests, by_priority=False)  # who is admitted is a head of the queue
        row = state.free_rows[state.counts[NUM_RUNNING]]
        state.counts[NUM_RUNNING] += 1
        requests["row"][request], requests["num_computed_tokens"][request] = row, start
        if requests["num_queried_tokens"][request] == 0:
            requests["num_cached_tokens"][request] = start
        requests["num_queried_tokens"][request] += requests["num_known_tokens"][request]
        requests["num_hit_tokens"][request] += start
        admit_row(memory, rules, row, prefills["node"][i])
    wanted, total = num_new, 0
    if size > 1:
        wanted += number * size
    for i in range(number):
        held = memory.units_held[requests["row"][prefills["request"][i]]]
        total += max(-(-prefills["end"][i] // size) - held, 0) * size
    make_room(memory.cache, rules.tree, max(wanted, total))
    for i in range(number):
        grow_row(memory, rules, requests["row"][prefills["request"][i]], prefills["end"][i])
    counters[NUM_PREFILLED] += num_new


@lean_jit
def prefill(engine: SGLangEngine, state: SchedulerArrays, requests: RequestArrays, memory: RowArrays, rules: RowRules) -> bool:
    """Admit who fits and take their slots; return whether anybody prefills."""
    counters, size = engine.counters, rules.tree.block_size
    room = engine.numbers.max_running_requests - counters[BATCH_SIZE]
    if counters[HALF_DONE] == NOBODY:
        if counters[FULL] != NOBODY_WAITS or state.counts[NUM_WAITING] == 0:
            return False
        if room <= 0:
            counters[FULL] = MAX_NUM_SEQS
            return False
    if engine.numbers.policy == RANDOM:
        if counters[CHANCE] != READY:
            counters[CHANCE] = WANTED
            return True
        counters[CHANCE] = NO_CHANCE
    _walk_queue(engine, state, requests, memory, rules, room)
    if engine.one.counters[NUM_PREFILLS] == 0:
        return False
    _take_up(engine, state, requests, memory, rules)
    if engine.numbers.enable_mixed_chunk:
        number = drop_finished(engine.batch, counters, requests)
        # Where decoding beside the prompts takes more than there is, SGLang fails; here the running ones wait for a step.
        slots = slots_for_batch(engine.batch, number, requests, size, 1)
        if slots <= num_free_slots(memory.cache, rules.tree):
            make_room(memory.cache, rules.tree, max(number * size, slots))
            for i in range(number):
                request = engine.batch[i]
                grow_row(memory, rules, requests["row"][request], requests["num_computed_tokens"][request] + 1)
            counters[NUM_DECODING] = number
    return True
