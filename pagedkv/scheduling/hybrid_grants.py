"""What a request gets of memory whose layer groups have block tables of their own, compiled: in every group, or in none.

A window gives back what it has left behind before its next tokens are asked for, and keeps that given back if they do not fit. A
prefix is found as far as all groups have what a request that begins behind it would read. Forks part where they write, group by
group.
"""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.block_moves import take_blocks, touch_blocks
from pagedkv.free_queue import NULL_BLOCK, NUM_FREE, NUM_KEYED, NUM_SHARES
from pagedkv.hybrid_arrays import HybridArrays, HybridRules, first_block, peak_blocks, release_part
from pagedkv.jit import lean_jit
from pagedkv.prefix_cache import find_key, insert_key
from pagedkv.scheduling.content import Segments, segment_of, stream_of
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.waiting import NUM_RUNNING, SchedulerArrays
from pagedkv.shared_tails import NUM_COPIES, NUM_FORKS, is_shared_tail, part_tail
from pagedkv.step_batch import StepBatch
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
    use_in_groups,
)

moved_blocks.register(HybridArrays)(nothing_moved)
note_computed.register(HybridArrays)(no_content)
keep_content.register(HybridArrays)(no_content)


@begin_step.register(HybridArrays)
@lean_jit
def _begin_step(memory: HybridArrays, rules: HybridRules) -> None:
    """Forget the copies of the last step."""
    memory.forks[NUM_COPIES] = 0


@lean_jit
def _shares_tail(memory: HybridArrays, group: int, row: int, num_tokens: int) -> bool:
    """Return whether `row` needs a copy of the block of a group that it writes next, behind `num_tokens`."""
    if memory.forks[NUM_FORKS] == 0:
        return False
    place = num_tokens // memory.groups["block_size"][group]
    table, registered = memory.tables[group, row], memory.num_registered[group, row]
    return is_shared_tail(memory, table, place, registered, memory.num_blocks[group, row])


@covers.register(HybridArrays)
@lean_jit
def _covers(memory: HybridArrays, rules: HybridRules, row: int, num_slots: int, num_computed: int) -> bool:
    """No block is due in any group, none has left a window, none gets full that is to carry its key, and tails are its own.

    O(groups).
    """
    groups, enough = memory.groups, True
    for group in range(groups.size):
        size = groups["block_size"][group]
        enough &= num_slots <= int(memory.num_blocks[group, row]) * size
        enough &= first_block(groups, group, num_computed) <= memory.num_given_back[group, row]
        if rules.caches:
            enough &= num_slots < int(memory.num_registered[group, row]) * size + rules.alignment
        enough &= not _shares_tail(memory, group, row, num_computed)
    return enough


@slots_of.register(HybridArrays)
@lean_jit
def _slots_of(memory: HybridArrays, rules: HybridRules) -> tuple[int, int, int, int]:
    size, queue = rules.unit_slots, memory.queue
    return queue[NUM_FREE] * size, queue[NUM_KEYED] * size, queue[NUM_SHARES] * size, 0


@rows_of.register(HybridArrays)
@lean_jit
def _rows_of(memory: HybridArrays, rules: HybridRules) -> tuple[Int32Array, int, int]:
    return memory.held, rules.unit_slots, memory.states.shape[1]


@use_in_groups.register(HybridArrays)
@lean_jit
def _use_in_groups(
    memory: HybridArrays, rules: HybridRules, state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, num_entries: int
) -> tuple[int, int, int]:
    """Tokens that a window has left behind count as long as their block is held for others of it. O(running * groups)."""
    groups = memory.groups
    tokens = reserved = held = 0
    for i in range(state.counts[NUM_RUNNING]):
        request = state.running[i]
        row, own = requests["row"][request], requests["num_computed_tokens"][request]
        if i < num_entries:
            own = min(batch["num_slots_needed"][i], requests["num_known_tokens"][request])  # slots of drafts await tokens
        final = requests["prompt_tokens"][request] + requests["output_tokens"][request] - 1  # the last output token needs no slot
        for group in range(groups.size):
            size = groups["block_size"][group]
            first, end = int(memory.num_given_back[group, row]) * size, int(memory.num_blocks[group, row]) * size
            tokens += max(own - first, 0)
            reserved += max(min(end, final) - max(own, first), 0)
        held += int(memory.held[row]) * rules.unit_slots
    for group in range(groups.size):  # shared blocks are full
        tokens -= memory.shares[group] * groups["block_size"][group]
        held -= memory.shares[group] * rules.unit_slots
    return tokens, reserved, held - tokens - reserved


@lean_jit
def _give_back(memory: HybridArrays, rules: HybridRules, row: int, num_computed: int) -> None:
    """Give back what no query after `num_computed` tokens reads. O(groups + blocks)."""
    for group in range(memory.groups.size):
        first, last = memory.num_given_back[group, row], first_block(memory.groups, group, num_computed)
        if last > first:
            release_part(memory, rules, group, row, first, last)
            memory.tables[group, row, first:last] = NULL_BLOCK
            memory.num_given_back[group, row] = last


@lean_jit
def _take(memory: HybridArrays, group: int, row: int, slots: int) -> None:
    """Let a table have room for `slots`: there are as many blocks. O(blocks taken)."""
    held = int(memory.num_blocks[group, row])
    needed = max(-(-slots // memory.groups["block_size"][group]), held)
    table = memory.tables[group, row]
    take_blocks(memory.blocks, memory.queue, memory.key_index, memory.buckets, needed - held, table, held)
    memory.num_blocks[group, row] = needed
    memory.held[row] += needed - held


@lean_jit
def grow_row(memory: HybridArrays, rules: HybridRules, row: int, num_computed: int, slots: int) -> bool:
    """Let a running row, of which so many tokens are computed, have `slots`, and tails of its own; return whether they fit.

    O(groups + blocks).
    """
    groups, due = memory.groups, 0
    _give_back(memory, rules, row, num_computed)
    for group in range(groups.size):
        due += max(-(-slots // groups["block_size"][group]) - int(memory.num_blocks[group, row]), 0)
        due += _shares_tail(memory, group, row, num_computed)
    if due > memory.queue[NUM_FREE]:
        return False
    for group in range(groups.size):
        if _shares_tail(memory, group, row, num_computed):
            part_tail(memory, memory.tables[group, row], num_computed // groups["block_size"][group])
            memory.shares[group] -= 1
        _take(memory, group, row, slots)
    return True


@grant.register(HybridArrays)
@lean_jit
def _grant(
    memory: HybridArrays, rules: HybridRules, requests: RequestArrays, segments: Segments, request: int, row: int, num_tokens: int
) -> bool:
    """Give a running `request` the slots of its next tokens. O(groups + blocks taken, filled and given back)."""
    computed = requests["num_computed_tokens"][request]
    if not grow_row(memory, rules, row, computed, computed + num_tokens):
        return False
    if rules.caches:
        _register(memory, rules, requests, segments, request, row, computed + num_tokens)
    return True


@lean_jit
def _register(
    memory: HybridArrays, rules: HybridRules, requests: RequestArrays, segments: Segments, request: int, row: int, slots: int
) -> None:
    """Let the blocks be found that `slots` fill with known tokens, as far as a hit can reach. O(groups + blocks filled)."""
    known = min(slots, requests["num_known_tokens"][request]) // rules.alignment * rules.alignment
    begin = requests["first_segment"][request]
    end = begin + requests["num_segments"][request]
    for group in range(memory.groups.size):
        size, stride = memory.groups["block_size"][group], memory.groups["keys_per_block"][group]
        salt_a, salt_b = memory.groups["salt_a"][group], memory.groups["salt_b"][group]
        first, last = int(memory.num_registered[group, row]), known // size
        if last <= first:
            continue
        place = segment_of(segments, begin, end, (first + 1) * size)
        for i in range(first, last):
            while place < end and segments["end_token"][place] < (i + 1) * size:
                place += 1
            block = memory.tables[group, row, i]
            if block != NULL_BLOCK and memory.blocks["next_same"][block] == NULL_BLOCK:  # one that was shared may carry its key
                word_a, word_b = stream_of(segments, place, end, request)
                key_a = (word_a + np.uint64((i + 1) * stride - 1)) ^ salt_a
                insert_key(memory.blocks, memory.key_index, memory.buckets, block, key_a, word_b ^ salt_b)
        memory.num_registered[group, row] = last


@lean_jit
def _find_run(
    memory: HybridArrays,
    requests: RequestArrays,
    segments: Segments,
    request: int,
    group: int,
    first: int,
    last: int,
) -> int:
    """Write the cached blocks of the longest run from block `first` on into the group's hits; return where it ends.

    `last` (exclusive) at most. O(run + log segments).
    """
    size, stride = memory.groups["block_size"][group], memory.groups["keys_per_block"][group]
    salt_a, salt_b = memory.groups["salt_a"][group], memory.groups["salt_b"][group]
    begin = requests["first_segment"][request]
    end = begin + requests["num_segments"][request]
    place = segment_of(segments, begin, end, (first + 1) * size)
    for i in range(first, last):
        while place < end and segments["end_token"][place] < (i + 1) * size:
            place += 1
        word_a, word_b = stream_of(segments, place, end, request)
        key_a = (word_a + np.uint64((i + 1) * stride - 1)) ^ salt_a
        block = find_key(memory.key_index, memory.buckets, key_a, word_b ^ salt_b)
        if block == NULL_BLOCK:
            return i
        memory.hits[group, i] = block
    return last


@find_cached.register(HybridArrays)
@lean_jit
def _find_cached(memory: HybridArrays, rules: HybridRules, requests: RequestArrays, segments: Segments, request: int) -> int:
    """Write the cached blocks that `request` can begin behind into memory.hits; return their tokens. The last token is no hit.

    Each group in turn shortens the prefix to one that it has, until all agree: that is the longest on which they can.
    O(groups * hits) expected.
    """
    if not rules.caches:
        return 0
    groups = memory.groups
    length = (requests["num_known_tokens"][request] - 1) // rules.alignment * rules.alignment
    agreed = group = 0
    while length > 0 and agreed < groups.size:
        shorter = length
        while shorter > 0:
            first, last = first_block(groups, group, shorter), shorter // groups["block_size"][group]
            found = _find_run(memory, requests, segments, request, group, first, last)
            if found == last:
                break
            shorter = found * groups["block_size"][group] // rules.alignment * rules.alignment
        agreed = agreed + 1 if shorter == length else 1
        length = shorter
        group = group + 1 if group + 1 < groups.size else 0
    return int(length)


@lean_jit
def _has_room(
    memory: HybridArrays,
    rules: HybridRules,
    num_known: int,
    num_cached: int,
    slots: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Return whether a request can be admitted with its hits to `slots`: with the gate, all its known tokens must find room."""
    groups, due = memory.groups, memory.states.shape[1] + (rules.watermark_blocks if something_runs else 0)
    for group in range(groups.size):
        size = groups["block_size"][group]
        held, first = num_cached // size, first_block(groups, group, num_cached)
        count = max(-(-slots // size) - held, 0)
        if rules.reserve_full_isl:
            peak = peak_blocks(groups, group, num_known, rules.max_new_tokens) - (held - first)
            count = max(count, min(-(-num_known // size) - held, peak))
        due += count
        for i in range(first, held):
            due += memory.blocks["ref_cnt"][memory.hits[group, i]] == 0  # those leave the free queue, so they need room too
    return bool(due <= memory.queue[NUM_FREE])


@lean_jit
def admit_row(
    memory: HybridArrays,
    rules: HybridRules,
    row: int,
    num_known: int,
    num_cached: int,
    slots: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Let a row that holds nothing hold the hits that were found, and have `slots`; return whether they fit."""
    groups, queue = memory.groups, memory.queue
    if not _has_room(memory, rules, num_known, num_cached, slots, something_runs):
        return False
    for group in range(groups.size):
        held, first = num_cached // groups["block_size"][group], first_block(groups, group, num_cached)
        hits, shares = memory.hits[group, first:held], queue[NUM_SHARES]
        touch_blocks(memory.blocks, queue, hits)
        memory.shares[group] += queue[NUM_SHARES] - shares
        for i in range(held):
            memory.tables[group, row, i] = memory.hits[group, i] if i >= first else NULL_BLOCK
        memory.num_blocks[group, row] = memory.num_registered[group, row] = held
        memory.num_given_back[group, row] = first
        memory.held[row] += held - first
    for group in range(groups.size):
        _take(memory, group, row, slots)
    num_states = memory.states.shape[1]
    take_blocks(memory.blocks, queue, memory.key_index, memory.buckets, num_states, memory.states[row], 0)
    return True


@admit.register(HybridArrays)
@lean_jit
def _admit(
    memory: HybridArrays,
    rules: HybridRules,
    requests: RequestArrays,
    segments: Segments,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    """Give a waiting `request` its hits and the slots of its first tokens. O(groups + hits + blocks taken and filled)."""
    slots = num_cached + num_tokens
    if not admit_row(memory, rules, row, requests["num_known_tokens"][request], num_cached, slots, something_runs):
        return False
    if rules.caches:
        _register(memory, rules, requests, segments, request, row, slots)
    return True
