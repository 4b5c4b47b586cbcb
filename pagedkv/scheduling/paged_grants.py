"""What a request gets of paged memory, compiled: slots for its next tokens, the prefix it begins with, keys for what it fills."""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.block_moves import take_blocks, touch_blocks
from pagedkv.free_queue import NULL_BLOCK, NUM_FREE, NUM_KEYED, NUM_SHARES
from pagedkv.jit import lean_jit
from pagedkv.paged_arrays import PagedArrays, PagedRules
from pagedkv.prefix_cache import find_key, insert_key
from pagedkv.scheduling.content import Segments, segment_of, stream_of
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.shared_tails import NUM_COPIES, NUM_FORKS, is_shared_tail, part_tail
from pagedkv.step_memory import (
    admit,
    begin_step,
    covers,
    find_cached,
    grant,
    keep_content,
    moved_blocks,
    no_content,
    note_computed,
    nothing_moved,
    rows_of,
    slots_of,
)


@begin_step.register(PagedArrays)
@lean_jit
def _begin_step(pool: PagedArrays, rules: PagedRules) -> None:
    """Forget the copies of the last step."""
    pool.forks[NUM_COPIES] = 0


@covers.register(PagedArrays)
@lean_jit
def _covers(pool: PagedArrays, rules: PagedRules, row: int, num_slots: int, num_computed: int) -> bool:
    """No block is due, none gets full that is to carry its key, and the tail is its own."""
    enough = num_slots <= int(pool.num_blocks[row]) * rules.block_size
    if rules.caches:
        enough &= num_slots < (int(pool.num_registered[row]) + 1) * rules.block_size
    return enough and not _shares_tail(pool, rules, row, num_computed)


@lean_jit
def _shares_tail(pool: PagedArrays, rules: PagedRules, row: int, num_tokens: int) -> bool:
    """Return whether `row` needs a copy of the block that it writes next, behind `num_tokens`."""
    if pool.forks[NUM_FORKS] == 0:
        return False
    return is_shared_tail(pool, pool.tables[row], num_tokens // rules.block_size, pool.num_registered[row], pool.num_blocks[row])


moved_blocks.register(PagedArrays)(nothing_moved)


@slots_of.register(PagedArrays)
@lean_jit
def _slots_of(pool: PagedArrays, rules: PagedRules) -> tuple[int, int, int, int]:
    size, queue = rules.block_size, pool.queue
    return queue[NUM_FREE] * size, queue[NUM_KEYED] * size, queue[NUM_SHARES] * size, 0


@rows_of.register(PagedArrays)
@lean_jit
def _rows_of(pool: PagedArrays, rules: PagedRules) -> tuple[Int32Array, int, int]:
    return pool.num_blocks, rules.block_size, pool.states.shape[1]


@lean_jit
def blocks_due(pool: PagedArrays, rules: PagedRules, requests: RequestArrays, request: int, row: int, num_tokens: int) -> int:
    """Return how many blocks `grant` takes for the next tokens of a running `request`, a tail of its own among them."""
    computed = requests["num_computed_tokens"][request]
    parts = _shares_tail(pool, rules, row, computed)
    return int(max(-(-(computed + num_tokens) // rules.block_size) - int(pool.num_blocks[row]), 0) + parts)


@grant.register(PagedArrays)
@lean_jit
def _grant(
    pool: PagedArrays, rules: PagedRules, requests: RequestArrays, segments: Segments, request: int, row: int, num_tokens: int
) -> bool:
    """Give a running `request` the slots of its next tokens, and a tail of its own to write to. O(blocks taken and filled)."""
    slots, held = requests["num_computed_tokens"][request] + num_tokens, int(pool.num_blocks[row])
    registered = int(pool.num_registered[row])
    filled = rules.caches and min(slots, requests["num_known_tokens"][request]) >= (registered + 1) * rules.block_size
    full = min(slots, requests["num_known_tokens"][request]) // rules.block_size if filled else registered
    if blocks_due(pool, rules, requests, request, row, num_tokens) > pool.queue[NUM_FREE]:
        return False
    if _shares_tail(pool, rules, row, requests["num_computed_tokens"][request]):
        part_tail(pool, pool.tables[row], requests["num_computed_tokens"][request] // rules.block_size)
    needed = max(-(-slots // rules.block_size), held)
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


@find_cached.register(PagedArrays)
@lean_jit
def _find_cached(pool: PagedArrays, rules: PagedRules, requests: RequestArrays, segments: Segments, request: int) -> int:
    """Write the cached blocks that `request` begins with into pool.hits; return their tokens. The last token is never a hit."""
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
            return i * rules.block_size
        pool.hits[i] = block
    return int(most) * rules.block_size


@lean_jit
def hold_hits(
    pool: PagedArrays,
    rules: PagedRules,
    requests: RequestArrays,
    request: int,
    row: int,
    num_hits: int,
    slots: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Let a waiting `request` hold its hits if there is room for all its `slots`; return whether there is. O(hits)."""
    kept_free = pool.states.shape[1] + (rules.watermark_blocks if something_runs else 0)
    needed = -(-slots // rules.block_size)
    gated = -(-requests["num_known_tokens"][request] // rules.block_size) if rules.reserve_full_isl else 0
    hits, table, revived = pool.hits[:num_hits], pool.tables[row], 0
    for block in hits:
        revived += pool.blocks["ref_cnt"][block] == 0  # those leave the free queue, so they need room too
    if max(gated, needed) - num_hits + revived + kept_free > pool.queue[NUM_FREE]:
        return False
    touch_blocks(pool.blocks, pool.queue, hits)
    for i in range(num_hits):
        table[i] = hits[i]
    return True


@lean_jit
def take_admitted(
    pool: PagedArrays,
    rules: PagedRules,
    requests: RequestArrays,
    segments: Segments,
    request: int,
    row: int,
    num_hits: int,
    slots: int,
) -> None:
    """Give a `request` that holds its hits what it needs besides for `slots`: there is room. O(blocks taken and filled)."""
    needed, num_states = -(-slots // rules.block_size), pool.states.shape[1]
    full = num_hits
    if rules.caches:
        full = max(min(slots, requests["num_known_tokens"][request]) // rules.block_size, num_hits)
    take_blocks(pool.blocks, pool.queue, pool.key_index, pool.buckets, needed - num_hits, pool.tables[row], num_hits)
    take_blocks(pool.blocks, pool.queue, pool.key_index, pool.buckets, num_states, pool.states[row], 0)
    if full > 0:
        _register(pool, rules, requests, segments, request, row, num_hits, full)
    pool.num_blocks[row] = needed


@admit.register(PagedArrays)
@lean_jit
def _admit(
    pool: PagedArrays,
    rules: PagedRules,
    requests: RequestArrays,
    segments: Segments,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Give a waiting `request` its hits and the slots of its first tokens. O(hits + blocks taken and filled)."""
    num_hits, slots = num_cached // rules.block_size, num_cached + num_tokens
    if not hold_hits(pool, rules, requests, request, row, num_hits, slots, something_runs):
        return False
    take_admitted(pool, rules, requests, segments, request, row, num_hits, slots)
    return True


note_computed.register(PagedArrays)(no_content)
keep_content.register(PagedArrays)(no_content)
"""Blocks carry their keys from the step on that fills them, and keep them when they are given back."""
