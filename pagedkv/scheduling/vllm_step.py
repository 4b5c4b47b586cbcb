"""vLLM's step over paged KV memory, compiled: who computes how many tokens, who is preempted, who is admitted, who is done.

Source: the rules that reproduce the recorded decisions of vLLM 0.33.0 (tests/conformance/test_vllm_decisions.py).
"""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.block_moves import take_blocks, touch_blocks
from pagedkv.free_queue import NULL_BLOCK, NUM_FREE
from pagedkv.jit import lean_jit
from pagedkv.paged_steps import NUM_COPIES, NUM_FORKS, PagedArrays, PagedRules, free_row
from pagedkv.prefix_cache import find_key, insert_key
from pagedkv.scheduling.content import Segments, segment_of, stream_of
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.waiting import (
    NUM_RUNNING,
    NUM_WAITING,
    WAITING_HEAD,
    SchedulerArrays,
    blocker_of,
    drop_head,
    goes_before,
    start_running,
    stop_running,
)
from pagedkv.shared_tails import part_tail, shares_tail
from pagedkv.step_batch import StepBatch

RAN_BEFORE, ENTRIES, PREEMPTED, BLOCKER = 0, 1, 2, 3
"""In a decision: entries that ran before; entries in all; preemptions; what held the head of the queue up."""


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


@lean_jit
def _grant(
    pool: PagedArrays, rules: PagedRules, requests: RequestArrays, segments: Segments, request: int, row: int, num_tokens: int
) -> bool:
    """Give a running `request` the slots of its next tokens, and a tail of its own to write to. O(blocks taken and filled)."""
    slots, held = requests["num_computed_tokens"][request] + num_tokens, int(pool.num_blocks[row])
    registered = int(pool.num_registered[row])
    filled = rules.caches and min(slots, requests["num_known_tokens"][request]) >= (registered + 1) * rules.block_size
    needed = max(-(-slots // rules.block_size), held)
    full = min(slots, requests["num_known_tokens"][request]) // rules.block_size if filled else registered
    parts = pool.forks[NUM_FORKS] > 0 and shares_tail(pool, rules, row, requests["num_computed_tokens"][request])
    if needed - held + parts > pool.queue[NUM_FREE]:
        return False
    if parts:
        part_tail(pool, rules, row, requests["num_computed_tokens"][request])
    take_blocks(pool.blocks, pool.queue, pool.key_index, pool.buckets, needed - held, pool.tables[row], held)
    if full > registered:
        _register(pool, rules, requests, segments, request, row, registered, full)
    pool.num_blocks[row] = needed
    return True


@lean_jit
def _register(
    pool: PagedArrays, rules: PagedRules, requests: RequestArrays, segments: Segments, request: int, row: int, first: int, last: int
) -> None:
    """Let blocks `first` to `last` (exclusive) of a request's table, full by now, be found. O(blocks + log segments)."""
    begin = requests["first_segment"][request]
    end = begin + requests["num_segments"][request]
    place = segment_of(segments, begin, end, (first + 1) * rules.block_size)
    word_a, word_b = stream_of(segments, place, end, request)
    for i in range(first, last):
        while place < end and segments["end_token"][place] < (i + 1) * rules.block_size:
            place += 1
            word_a, word_b = stream_of(segments, place, end, request)
        if pool.blocks["next_same"][pool.tables[row, i]] == NULL_BLOCK:  # one that was full when it was shared may carry its key
            insert_key(pool.blocks, pool.key_index, pool.buckets, pool.tables[row, i], word_a + np.uint64(i), word_b)
    pool.num_registered[row] = last


@lean_jit
def find_hits(pool: PagedArrays, rules: PagedRules, requests: RequestArrays, segments: Segments, request: int) -> int:
    """Write the cached blocks that `request` begins with into pool.hits; return their number. The last token is never a hit."""
    if not rules.caches:
        return 0
    place = requests["first_segment"][request]
    end = place + requests["num_segments"][request]
    word_a, word_b = stream_of(segments, place, end, request)
    most = (requests["num_known_tokens"][request] - 1) // rules.block_size
    for i in range(most):
        while place < end and segments["end_token"][place] < (i + 1) * rules.block_size:
            place += 1
            word_a, word_b = stream_of(segments, place, end, request)
        block = find_key(pool.key_index, pool.buckets, word_a + np.uint64(i), word_b)
        if block == NULL_BLOCK:
            return i
        pool.hits[i] = block
    return int(most)


@lean_jit
def _admit(
    pool: PagedArrays,
    rules: PagedRules,
    requests: RequestArrays,
    segments: Segments,
    request: int,
    row: int,
    num_hits: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Give a waiting `request` its hits and the slots of its first tokens. O(hits + blocks taken and filled)."""
    slots, known = num_hits * rules.block_size + num_tokens, requests["num_known_tokens"][request]
    num_states = pool.states.shape[1]
    kept_free = num_states + (rules.watermark_blocks if something_runs else 0)
    needed = -(-slots // rules.block_size)
    gated = -(-known // rules.block_size) if rules.reserve_full_isl else 0
    full = max(min(slots, known) // rules.block_size, num_hits) if rules.caches else num_hits
    hits, table, revived = pool.hits[:num_hits], pool.tables[row], 0
    for block in hits:
        revived += pool.blocks["ref_cnt"][block] == 0  # those leave the free queue, so they need room too
    if max(gated, needed) - num_hits + revived + kept_free > pool.queue[NUM_FREE]:
        return False
    touch_blocks(pool.blocks, pool.queue, hits)
    for i in range(num_hits):
        table[i] = hits[i]
    take_blocks(pool.blocks, pool.queue, pool.key_index, pool.buckets, needed - num_hits, table, num_hits)
    take_blocks(pool.blocks, pool.queue, pool.key_index, pool.buckets, num_states, pool.states[row], 0)
    if full > 0:
        _register(pool, rules, requests, segments, request, row, num_hits, full)
    pool.num_blocks[row] = needed
    return True


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
    pool: PagedArrays,
    segments: Segments,
    limits: SchedulerLimits,
    rules: PagedRules,
    threshold: int,
    batch: StepBatch,
    preempted: Int64Array,
) -> tuple[int, int, int]:
    """Let running requests go on, in their order; return entries, preemptions and the token budget that is left."""
    budget, entries, num_preempted = limits.max_num_batched_tokens, 0, 0  # entry i of the batch is running request i
    forked = pool.forks[NUM_FORKS] > 0
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
        enough = slots <= int(pool.num_blocks[row]) * rules.block_size
        if rules.caches:
            enough &= slots < (int(pool.num_registered[row]) + 1) * rules.block_size
        if forked:
            enough &= not shares_tail(pool, rules, row, slots - tokens)
        # Most steps stay within the last block: `_grant` would do nothing, and its call would cost more than all else.
        while not (enough or gone or _grant(pool, rules, requests, segments, request, row, tokens)):
            place = _victim(state, requests, limits)
            preempted[num_preempted] = state.running[place]
            num_preempted += 1
            gone = place == entries
            if place < entries:  # scheduled in this step already: it leaves it, and its tokens can be used
                budget += batch["num_scheduled_tokens"][place]
                for i in range(place, entries - 1):
                    batch[i] = batch[i + 1]
                entries -= 1
            free_row(pool, rules, stop_running(state, requests, place, limits.by_priority))
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
    pool: PagedArrays,
    segments: Segments,
    limits: SchedulerLimits,
    rules: PagedRules,
    threshold: int,
    batch: StepBatch,
    entries: int,
    budget: int,
) -> tuple[int, bool]:
    """Admit from the head of the queue; return entries, and whether memory refused the next one."""
    counts = state.counts
    while budget > 0 and counts[NUM_WAITING] > 0 and counts[NUM_RUNNING] < state.running.size:
        request = state.waiting[counts[WAITING_HEAD]]
        num_hits = find_hits(pool, rules, requests, segments, request)
        cached = num_hits * rules.block_size
        tokens = requests["num_known_tokens"][request] - cached
        if threshold > 0:
            tokens = min(tokens, threshold)
        if tokens > budget:
            if not limits.enable_chunked_prefill:
                break
            tokens = budget
        row = state.free_rows[counts[NUM_RUNNING]]
        if not _admit(pool, rules, requests, segments, request, row, num_hits, tokens, counts[NUM_RUNNING] > 0):
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


@lean_jit
def schedule_step(
    state: SchedulerArrays,
    requests: RequestArrays,
    pool: PagedArrays,
    segments: Segments,
    limits: SchedulerLimits,
    rules: PagedRules,
    batch: StepBatch,
    preempted: Int64Array,
    decision: Int64Array,
) -> None:
    """Decide the next step and take its slots. O(entries + blocks taken), but O(running) more for each preemption.

    Args:
        state: Who runs and who waits.
        requests: Their `REQUEST` records.
        pool: The memory.
        segments: What requests share: see `pagedkv.scheduling.content`.
        limits: Limits of the scheduler.
        rules: Rules of the memory.
        batch: Receives the entries: running requests in their order, then admissions in theirs.
        preempted: Receives the requests preempted, in order.
        decision: Receives RAN_BEFORE, ENTRIES, PREEMPTED and BLOCKER.
    """
    counts = state.counts
    threshold = limits.long_prefill_token_threshold
    present = counts[NUM_RUNNING] + counts[NUM_WAITING]
    pool.forks[NUM_COPIES] = 0
    if present == 1:
        threshold = 0
    elif threshold > 0 and limits.adaptive_threshold:
        threshold = max(threshold, limits.max_num_batched_tokens // present)
    ran_before, num_preempted, budget = _schedule_running(
        state, requests, pool, segments, limits, rules, threshold, batch, preempted
    )
    entries, refused = ran_before, num_preempted > 0
    if not refused:
        entries, refused = _schedule_waiting(state, requests, pool, segments, limits, rules, threshold, batch, ran_before, budget)
    decision[RAN_BEFORE], decision[ENTRIES], decision[PREEMPTED] = ran_before, entries, num_preempted
    decision[BLOCKER] = blocker_of(state, refused)
