"""Who may run in a step for TensorRT-LLM's capacity scheduler: one function per policy, compiled.

Rules, not code, of its capacityScheduler.cpp. Requests come in queue order, by priority and arrival, started or not; the answer's
order is the one in which the micro-batch scheduler looks at them.
"""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.content import Segments, segment_of, stream_of
from pagedkv.scheduling.filled_blocks import FilledBlocks, add_filled
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.waiting import (
    KV_MEMORY,
    MAX_NUM_SEQS,
    NUM_RUNNING,
    NUM_WAITING,
    TOKEN_BUDGET,
    SchedulerArrays,
    goes_before,
    leave_running,
)
from pagedkv.scheduling.waiting_line import waiting_at
from pagedkv.step_memory import find_cached, free_row, keep_content, rows_of, slots_of

GUARANTEED_NO_EVICT, MAX_UTILIZATION, STATIC_BATCH = range(3)
CAPACITY_POLICIES = {
    "guaranteed_no_evict": GUARANTEED_NO_EVICT,
    "max_utilization": MAX_UTILIZATION,
    "static_batch": STATIC_BATCH,
}
"""By TensorRT-LLM's names, in lower case."""
_NOBODY = -1


class Capacity(NamedTuple):
    """What a policy must know of an engine, and who has started."""

    max_num_seqs: int
    max_model_len: int
    block_size: int
    state_blocks: int
    """Blocks that each request takes for its state."""
    max_tokens_given: bool
    """Whether requests say how many tokens they want; if not, all of max_model_len is reserved for each."""
    shares: bool
    """Blocks are shared."""
    started: Int64Array
    """Who has started, in queue order."""
    filled: FilledBlocks
    """Blocks that somebody fills in this step."""


@lean_jit
def blocks_lacking(capacity: Capacity, requests: RequestArrays, memory: Any, rules: Any, request: int, num_tokens: int) -> int:
    """Return the blocks that `request` lacks to have `num_tokens` in memory."""
    needed = -(-num_tokens // capacity.block_size)
    row = requests["row"][request]
    if row == NO_ROW:
        return int(needed + capacity.state_blocks)
    held, unit_slots, _ = rows_of(memory, rules)
    return max(int(needed - held[row] * unit_slots // capacity.block_size), 0)


@lean_jit
def blocks_to_completion(capacity: Capacity, requests: RequestArrays, memory: Any, rules: Any, request: int) -> int:
    """Return ceil((prompt + output) / block size), less those it holds; the last token counts, though it never gets a slot."""
    final = requests["prompt_tokens"][request] + requests["output_tokens"][request]
    if not capacity.max_tokens_given:
        final = capacity.max_model_len
    return blocks_lacking(capacity, requests, memory, rules, request, final)


@lean_jit
def is_delayed(capacity: Capacity, requests: RequestArrays, memory: Any, rules: Any, segments: Segments, request: int) -> bool:
    """Return whether another request fills the first block that this one does not find cached; if not, this one fills it.

    Then it had better wait a step, and reuse that block. Who runs never waits.
    """
    if not capacity.shares:
        return False
    runs = requests["row"][request] != NO_ROW
    num_there = requests["num_computed_tokens"][request] if runs else find_cached(memory, rules, requests, segments, request)
    first_new = num_there // capacity.block_size
    end_token = (first_new + 1) * capacity.block_size
    if end_token > requests["num_known_tokens"][request]:
        return False
    first = requests["first_segment"][request]
    last = first + requests["num_segments"][request]
    word_a, word_b = stream_of(segments, segment_of(segments, first, last, end_token), last, request)
    is_filled = add_filled(capacity.filled, word_a + np.uint64(first_new), word_b)
    return bool(is_filled and not runs)


@lean_jit
def _free_blocks(capacity: Capacity, memory: Any, rules: Any) -> int:
    return int(slots_of(memory, rules)[0] // capacity.block_size)


@lean_jit
def _admit_to_completion(
    capacity: Capacity,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    num_started: int,
    delays: bool,  # noqa: FBT001
    fitting: Int64Array,
) -> tuple[int, int]:
    """Let all started ones go on; admit who can get all blocks to its end besides theirs, until the first who cannot."""
    for i in range(num_started):
        fitting[i] = capacity.started[i]
    number, left, counted = num_started, 0, False
    for k in range(state.counts[NUM_WAITING]):
        request = waiting_at(state, k)
        if delays and is_delayed(capacity, requests, memory, rules, segments, request):
            continue
        if number >= capacity.max_num_seqs:
            return number, MAX_NUM_SEQS
        if not counted:
            counted = True
            left = _free_blocks(capacity, memory, rules)
            for i in range(num_started):
                left -= blocks_to_completion(capacity, requests, memory, rules, capacity.started[i])
        needed = blocks_to_completion(capacity, requests, memory, rules, request)
        if needed > left:
            return number, KV_MEMORY
        fitting[number] = request
        number += 1
        left -= needed
    return number, TOKEN_BUDGET


@lean_jit
def guaranteed_no_evict(
    capacity: Capacity,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    num_started: int,
    fitting: Int64Array,
) -> tuple[int, int]:
    """Let all started ones go on; admit who can get all blocks to its end besides theirs, until the first who cannot. No pause.

    Returns:
        (number of those who may run, now in `fitting`; why the next one may not: if there is none, only tokens can hold them up).
    """
    return _admit_to_completion(capacity, state, requests, memory, rules, segments, num_started, True, fitting)  # noqa: FBT003


@lean_jit
def static_batch(
    capacity: Capacity,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    num_started: int,
    fitting: Int64Array,
) -> tuple[int, int]:
    """Do the same, but admit only when nobody has started, and delay nobody."""
    if num_started > 0:
        for i in range(num_started):
            fitting[i] = capacity.started[i]
        return num_started, MAX_NUM_SEQS
    return _admit_to_completion(capacity, state, requests, memory, rules, segments, 0, False, fitting)  # noqa: FBT003


@lean_jit
def pause(
    capacity: Capacity,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    request: int,
) -> None:
    """Take the blocks of a started request away; it computes all its known tokens anew, but for those found cached.

    It is in no queue until the step is decided. O(running + its blocks).
    """
    if capacity.shares:
        keep_content(memory, rules, requests, segments, request, requests["row"][request])
    place = 0
    while state.running[place] != request:
        place += 1
    free_row(memory, rules, leave_running(state, requests, place))
    requests["num_preemptions"][request] += 1


@lean_jit
def max_utilization(
    capacity: Capacity,
    state: SchedulerArrays,
    requests: RequestArrays,
    memory: Any,
    rules: Any,
    segments: Segments,
    num_started: int,
    fitting: Int64Array,
    preempted: Int64Array,
) -> tuple[int, int, int]:
    """Let run who gets the blocks of its next step; for one who does not, pause the started ones behind it, the last one first.

    It ends at the first who does not get them though none is left to pause, and where the first paused one stands: nobody
    overtakes those.

    Returns:
        As `guaranteed_no_evict`, and how many were paused: they are in `preempted`.
    """
    started, num_waiting = capacity.started, state.counts[NUM_WAITING]
    number = taken = next_started = next_waiting = num_paused = first = 0
    last, end = num_started, _NOBODY  # behind whoever is asked: started[first:last]
    while next_started < num_started or next_waiting < num_waiting:
        if next_waiting == num_waiting or (
            next_started < num_started and goes_before(requests, started[next_started], waiting_at(state, next_waiting))
        ):
            request = int(started[next_started])
            next_started += 1
        else:
            request = waiting_at(state, next_waiting)
            next_waiting += 1
        if request == end:
            return number, KV_MEMORY, num_paused
        if is_delayed(capacity, requests, memory, rules, segments, request):
            continue
        needed = blocks_lacking(capacity, requests, memory, rules, request, requests["num_known_tokens"][request])
        while number >= capacity.max_num_seqs or taken + needed > _free_blocks(capacity, memory, rules):
            if first == last:
                return number, MAX_NUM_SEQS if number >= capacity.max_num_seqs else KV_MEMORY, num_paused
            last -= 1
            end = int(started[last])
            pause(capacity, state, requests, memory, rules, segments, end)
            preempted[num_paused] = end
            num_paused += 1
            if end == request:
                return number, KV_MEMORY, num_paused
        fitting[number] = request
        number += 1
        taken += needed
        if first < last and started[first] == request:
            first += 1
    return number, TOKEN_BUDGET, num_paused


@lean_jit
def write_started(capacity: Capacity, state: SchedulerArrays, requests: RequestArrays) -> int:
    """Write who runs into capacity.started, in queue order, and return how many they are. O(running), if few changed places."""
    number = state.counts[NUM_RUNNING]
    for i in range(number):
        request = state.running[i]
        place = i
        while place > 0 and goes_before(requests, request, capacity.started[place - 1]):
            capacity.started[place] = capacity.started[place - 1]
            place -= 1
        capacity.started[place] = request
    return int(number)
