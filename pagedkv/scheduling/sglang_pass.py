"""Which waiting requests SGLang prefills together, compiled: one pass over the sorted queue, charging budgets.

Nothing is allocated in it. Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py).
"""

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.radix_arrays import RadixRules
from pagedkv.radix_cache import CacheArrays, num_free_slots
from pagedkv.radix_walks import lock_path, match_prefix, unlock_path
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.sglang_budgets import (
    CHUNK_LEFT,
    CONTINUE,
    CONTINUED,
    CURRENT_OFFSET,
    IN_PIECES,
    INPUT_LEFT,
    NO_LIMIT,
    NO_TOKEN,
    NUM_PREFILLS,
    OTHER,
    TOTAL_OFFSET,
    PassArrays,
    PassNumbers,
    current_left,
    is_spent,
    num_output,
    total_left,
    whole_blocks,
)
from pagedkv.scheduling.sglang_outlook import IGNORE_EOS_RESERVE, outlasts
from pagedkv.scheduling.sglang_request import MAX_NEW_TOKENS_COUNTED, SGLangRecords


@lean_jit
def _enter(
    one: PassArrays,
    limits: PassNumbers,
    block_size: int,
    records: SGLangRecords,
    request: int,
    node: int,
    start: int,
    end: int,
    chunked: bool,  # noqa: FBT001
) -> None:
    counters, prefills = one.counters, one.prefills
    place = counters[NUM_PREFILLS]
    prefills["request"][place], prefills["start"][place], prefills["end"][place] = request, start, end
    prefills["node"][place], prefills["chunked"][place] = node, chunked
    counters[NUM_PREFILLS] += 1
    computed = whole_blocks(end - start, block_size)
    slots = computed + block_size
    if node != CONTINUED:
        slots += limits.state_slots
    counters[CURRENT_OFFSET] += slots
    if not chunked:
        slots += min(records["max_new_tokens"][request], MAX_NEW_TOKENS_COUNTED)
    one.expected[TOTAL_OFFSET] += slots
    counters[INPUT_LEFT] -= computed
    counters[CHUNK_LEFT] -= computed


@lean_jit
def _left_by_shorter(
    one: PassArrays,
    block_size: int,
    requests: RequestArrays,
    records: SGLangRecords,
    rest: int,
    waiting: Int64Array,
    head: int,
    num_waiting: int,
) -> int:
    """Return what a prompt with `rest` tokens to go may compute, so that shorter ones find room in the step."""
    budget, shorter = int(one.counters[CHUNK_LEFT]), 0
    if budget < 2 * block_size:
        return budget
    for i in range(num_waiting):
        request = waiting[(head + i) % waiting.size]
        uncached = num_uncached(requests, records, request)
        needed = whole_blocks(uncached, block_size)
        if uncached >= rest or shorter + needed > budget - block_size:
            break
        shorter += needed
    if shorter == 0:
        return budget
    return (budget - shorter) // block_size * block_size


@lean_jit
def num_uncached(requests: RequestArrays, records: SGLangRecords, request: int) -> int:
    """Return what a prefill of a request that was looked up would compute, 1 at least: the last token always is."""
    return int(max(1, requests["num_known_tokens"][request] - records["num_matched_tokens"][request]))


@lean_jit
def resume_prefill(
    one: PassArrays,
    limits: PassNumbers,
    num_free: int,
    block_size: int,
    requests: RequestArrays,
    records: SGLangRecords,
    request: int,
    num_done: int,
    waiting: Int64Array,
    head: int,
    num_waiting: int,
    most: int,
) -> None:
    """Go on with a prompt of which `num_done` tokens are computed and held; `waiting` is the sorted queue, a ring.

    It is never refused for what it may need later. Nothing happens if the step has no token left for it, or `most` is 0.
    """
    rest = requests["num_known_tokens"][request] - num_done
    chunk = min(one.counters[CHUNK_LEFT], int(total_left(one, num_free)))
    if chunk <= 0:
        chunk = one.counters[CHUNK_LEFT]
    if limits.shortest_first:
        shared = _left_by_shorter(one, block_size, requests, records, rest, waiting, head, num_waiting)
        chunk = min(chunk, shared)
    chunk = min(chunk, most)
    if chunk <= 0:
        return
    one.counters[IN_PIECES] = chunk < rest
    _enter(one, limits, block_size, records, request, CONTINUED, num_done, num_done + min(rest, chunk), chunk < rest)


@lean_jit
def add_prefill(
    one: PassArrays,
    limits: PassNumbers,
    cache: CacheArrays,
    rules: RadixRules,
    requests: RequestArrays,
    records: SGLangRecords,
    running: Int64Array,
    num_running: int,
    request: int,
    tokens: Int32Array,
) -> int:
    """Look `request`, of these `tokens`, up and admit it if it fits; return whether to go on. O(tokens compared)."""
    if one.counters[NUM_PREFILLS] >= limits.max_requests:
        return OTHER
    known, size = requests["num_known_tokens"][request], rules.block_size
    node = match_prefix(cache.tree, rules, tokens, (known - 1) // size * size, records["namespace"][request])
    lock_path(cache.tree, rules, node)
    start = cache.tree.nodes["depth"][node]
    num_free = num_free_slots(cache, rules)
    verdict, end = _prefill_end(one, limits, num_free, size, requests, records, running, num_running, request, start)
    if verdict != CONTINUE:
        unlock_path(cache.tree, rules, node)
        return verdict
    _enter(one, limits, size, records, request, node, start, end, end < known)
    if total_left(one, num_free) <= 0 or current_left(one, num_free) <= 0:
        return NO_TOKEN
    return OTHER if is_spent(one) else CONTINUE


@lean_jit
def _prefill_end(
    one: PassArrays,
    limits: PassNumbers,
    num_free: int,
    block_size: int,
    requests: RequestArrays,
    records: SGLangRecords,
    running: Int64Array,
    num_running: int,
    request: int,
    start: int,
) -> tuple[int, int]:
    """Return CONTINUE and how far to compute `request`, whose first `start` tokens are cached and locked; or why not to."""
    counters, size, known = one.counters, block_size, requests["num_known_tokens"][request]
    num_new = known - start
    if records["ignore_eos"][request] and not limits.caches_prefixes:
        if not outlasts(one, limits, num_free, block_size, requests, records, running, num_running, request, num_new):
            return NO_TOKEN, 0
    elif slots_to_finish(requests, records, request, num_new, size) + limits.state_slots >= total_left(one, num_free):
        return NO_TOKEN, 0
    elif limits.chunk_tokens == NO_LIMIT and counters[NUM_PREFILLS] > 0 and whole_blocks(num_new, size) >= counters[INPUT_LEFT]:
        return OTHER, 0
    if whole_blocks(num_new, size) <= counters[CHUNK_LEFT]:
        return CONTINUE, int(known)
    end = (start + counters[CHUNK_LEFT]) // size * size
    if end <= start or (counters[IN_PIECES] and limits.shortest_first):
        return OTHER, 0
    return CONTINUE, int(end)


@lean_jit
def slots_to_finish(requests: RequestArrays, records: SGLangRecords, request: int, num_new_tokens: int, block_size: int) -> int:
    """Return what must be less than the slots that `request` may count on: its tokens, its possible output, a block to round up."""
    to_come = max(records["max_new_tokens"][request] - num_output(requests, request), 0)
    return int(num_new_tokens + min(to_come, MAX_NEW_TOKENS_COUNTED) + block_size)


@lean_jit
def fits_alone(
    limits: PassNumbers, requests: RequestArrays, records: SGLangRecords, request: int, usable_slots: int, block_size: int
) -> bool:
    """Return whether `request` would be admitted if nobody else were there. What it finds in the cache makes no difference."""
    known = requests["num_known_tokens"][request]
    if records["ignore_eos"][request] and not limits.caches_prefixes:
        slots = (-(-known // block_size) + 1) * block_size + limits.state_slots
        to_come = max(records["max_new_tokens"][request] - num_output(requests, request), 0)
        return bool(slots + to_come + IGNORE_EOS_RESERVE < usable_slots)
    return slots_to_finish(requests, records, request, known, block_size) + limits.state_slots < usable_slots
