"""What a request gets of paged memory with a second tier, compiled: as of paged memory, and what comes back from the tier.

Where the cached prefix of a request ends in the pool, the lookup goes on in the tier. Blocks found there are loaded into new
blocks, which count as cached. What is in blocks that are handed out to be overwritten goes to the tier first, unless another block
of the pool has it too.
"""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.free_queue import FIRST, HEAD, NULL_BLOCK, NUM_FREE
from pagedkv.jit import lean_jit
from pagedkv.offload_arrays import OffloadArrays, OffloadRules
from pagedkv.paged_arrays import PagedArrays
from pagedkv.prefix_cache import find_key
from pagedkv.scheduling.content import Segments, stream_of
from pagedkv.scheduling.paged_grants import blocks_due, hold_hits, take_admitted
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.step_memory import (
    admit,
    begin_step,
    covers,
    find_cached,
    free_row,
    grant,
    keep_content,
    moved_blocks,
    no_content,
    note_computed,
    rows_of,
    slots_of,
)
from pagedkv.tier_arrays import (
    NUM_HITS,
    NUM_LOADED,
    NUM_REMOVED,
    STEP_LOADED,
    STEP_STORED,
    TierArrays,
    tier_find,
    tier_store,
    tier_use,
)


@begin_step.register(OffloadArrays)
@lean_jit
def _begin_step(memory: OffloadArrays, rules: OffloadRules) -> None:
    begin_step(memory.pool, rules.paged)
    memory.tier.counts[STEP_LOADED] = memory.tier.counts[STEP_STORED] = 0


@moved_blocks.register(OffloadArrays)
@lean_jit
def _moved_blocks(memory: OffloadArrays, rules: OffloadRules) -> tuple[int, int]:
    return memory.tier.counts[STEP_LOADED], memory.tier.counts[STEP_STORED]


@covers.register(OffloadArrays)
@lean_jit
def _covers(memory: OffloadArrays, rules: OffloadRules, row: int, num_slots: int, num_computed: int) -> bool:
    return bool(covers(memory.pool, rules.paged, row, num_slots, num_computed))


@slots_of.register(OffloadArrays)
@lean_jit
def _slots_of(memory: OffloadArrays, rules: OffloadRules) -> tuple[int, int, int, int]:
    free, cached, shared, rounding = slots_of(memory.pool, rules.paged)
    return free, cached, shared, rounding


@rows_of.register(OffloadArrays)
@lean_jit
def _rows_of(memory: OffloadArrays, rules: OffloadRules) -> tuple[Int32Array, int, int]:
    units_held, unit_slots, state_units = rows_of(memory.pool, rules.paged)
    return units_held, unit_slots, state_units


@free_row.register(OffloadArrays)
@lean_jit
def _free_row(memory: OffloadArrays, rules: OffloadRules, row: int) -> None:
    free_row(memory.pool, rules.paged, row)


@grant.register(OffloadArrays)
@lean_jit
def _grant(
    memory: OffloadArrays, rules: OffloadRules, requests: RequestArrays, segments: Segments, request: int, row: int, num_tokens: int
) -> bool:
    """Give a running `request` the slots of its next tokens. O(blocks taken and filled)."""
    pool, tier = memory.pool, memory.tier
    due = blocks_due(pool, rules.paged, requests, request, row, num_tokens)
    if due > pool.queue[NUM_FREE]:
        return False
    _note_removed(pool, tier, due)
    granted = grant(pool, rules.paged, requests, segments, request, row, num_tokens)
    _keep_removed(pool, tier, tier.hits[:0])
    return bool(granted)


@find_cached.register(OffloadArrays)
@lean_jit
def _find_cached(memory: OffloadArrays, rules: OffloadRules, requests: RequestArrays, segments: Segments, request: int) -> int:
    """Write hits into pool.hits, and those that follow in the tier into tier.hits; return their tokens. O(hits)."""
    size, tier = rules.paged.block_size, memory.tier
    tokens = find_cached(memory.pool, rules.paged, requests, segments, request)
    first, most = tokens // size, (requests["num_known_tokens"][request] - 1) // size
    place = requests["first_segment"][request]
    end = place + requests["num_segments"][request]
    word_a, word_b = stream_of(segments, place, end, request)
    found = 0
    for i in range(first, most if rules.paged.caches else first):
        while place < end and segments["end_token"][place] < (i + 1) * size:
            place += 1
            word_a, word_b = stream_of(segments, place, end, request)
        block = tier_find(tier, word_a + np.uint64(i), word_b)
        if block == 0:
            break
        tier.hits[found] = block
        found += 1
    tier.counts[NUM_HITS] = found
    return int(tokens + found * size)


@admit.register(OffloadArrays)
@lean_jit
def _admit(
    memory: OffloadArrays,
    rules: OffloadRules,
    requests: RequestArrays,
    segments: Segments,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Give a waiting `request` its hits, blocks to load what was found in the tier, and the slots of its first tokens."""
    pool, tier, size = memory.pool, memory.tier, rules.paged.block_size
    num_loaded, slots = int(tier.counts[NUM_HITS]), num_cached + num_tokens
    num_hits = num_cached // size - num_loaded
    if not hold_hits(pool, rules.paged, requests, request, row, num_hits, slots, something_runs):
        return False
    _note_removed(pool, tier, -(-slots // size) - num_hits + pool.states.shape[1])
    take_admitted(pool, rules.paged, requests, segments, request, row, num_hits, slots)
    loaded = tier.hits[:num_loaded]
    for block in loaded:
        tier_use(tier, block)
    tier.counts[STEP_LOADED] += num_loaded
    tier.counts[NUM_LOADED] += num_loaded
    _keep_removed(pool, tier, loaded)
    return True


@lean_jit
def _note_removed(pool: PagedArrays, tier: TierArrays, num_blocks: int) -> None:
    """Write down the keys of the next `num_blocks` of the free queue: they are about to lose them. O(num_blocks)."""
    queue, next_same = pool.queue, pool.blocks["next_same"]
    place, capacity, seen, removed = queue[HEAD], queue.size - FIRST, 0, 0
    while seen < num_blocks:
        block = queue[FIRST + place]
        place = place + 1 if place + 1 < capacity else 0
        if block != NULL_BLOCK:
            seen += 1
            if next_same[block] != NULL_BLOCK:
                tier.removed[removed, 0], tier.removed[removed, 1] = pool.key_index["key_a"][block], pool.key_index["key_b"][block]
                removed += 1
    tier.counts[NUM_REMOVED] = removed


@lean_jit
def _keep_removed(pool: PagedArrays, tier: TierArrays, pinned: Int32Array) -> None:
    """Store the content of the keys written down, but for those that the pool still has. O(blocks)."""
    for i in range(tier.counts[NUM_REMOVED]):
        key_a, key_b = tier.removed[i, 0], tier.removed[i, 1]
        if find_key(pool.key_index, pool.buckets, key_a, key_b) == NULL_BLOCK:
            tier_store(tier, key_a, key_b, pinned)


note_computed.register(OffloadArrays)(no_content)
keep_content.register(OffloadArrays)(no_content)
