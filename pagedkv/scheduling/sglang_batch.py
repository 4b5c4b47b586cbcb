"""SGLang's batch, compiled: who is in it, who holds memory, what they need. For the rules of `sglang_step`."""

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.sglang_arrays import (
    BATCH_SIZE,
    HALF_DONE,
    NOBODY,
    NUM_COMPUTING,
    NUM_DECODING,
    NUM_JOINED,
    NUM_PREFILLED,
    SGLangNumbers,
)
from pagedkv.scheduling.sglang_request import SGLangRecords
from pagedkv.scheduling.sglang_retraction import new_slots
from pagedkv.scheduling.stream_tokens import stream_tokens_of
from pagedkv.scheduling.waiting import NUM_RUNNING, SchedulerArrays, push_waiting
from pagedkv.token_source import write_tokens


@lean_jit
def know_tokens(segments: Segments, requests: RequestArrays, request: int, num_tokens: int, tokens: Int32Array) -> None:
    """Write the first tokens of `request` into `tokens`. O(tokens)."""
    write_tokens(stream_tokens_of(requests, segments, request), 0, num_tokens, tokens)


@lean_jit
def join_queue(counters: Int64Array, records: SGLangRecords, state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    """Let `request` wait behind the others."""
    records["arrival"][request], records["prefilled_before"][request] = counters[NUM_JOINED], counters[NUM_PREFILLED]
    counters[NUM_JOINED] += 1
    push_waiting(state, requests, request, by_priority=False)


@lean_jit
def leave_row(state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    """Give back the row of `request`, whose memory has been given back."""
    state.counts[NUM_RUNNING] -= 1
    state.free_rows[state.counts[NUM_RUNNING]] = requests["row"][request]
    requests["row"][request] = NO_ROW


@lean_jit
def drop_finished(batch: Int64Array, counters: Int64Array, requests: RequestArrays) -> int:
    """Let those who are done leave the batch; return how many are left."""
    kept = 0
    for i in range(counters[BATCH_SIZE]):
        request = batch[i]
        if requests["row"][request] != NO_ROW:
            batch[kept] = request
            kept += 1
    counters[BATCH_SIZE] = kept
    return kept


@lean_jit
def list_holders(batch: Int64Array, counters: Int64Array, requests: RequestArrays, running: Int64Array, num_entries: int) -> None:
    """Put who holds memory behind the entries of the step: the running ones, if they do not decode, and the prompt in pieces."""
    number = num_entries
    if counters[NUM_DECODING] == 0:
        for i in range(counters[BATCH_SIZE]):
            if requests["row"][batch[i]] != NO_ROW:
                running[number] = batch[i]
                number += 1
    if counters[NUM_COMPUTING] == 0 and counters[HALF_DONE] != NOBODY:  # if somebody prefills, it does
        running[number] = counters[HALF_DONE]


@lean_jit
def num_drafts(numbers: SGLangNumbers, requests: RequestArrays, request: int) -> int:
    """Return how many drafts a decode step verifies for `request`."""
    room = numbers.max_model_len - requests["num_computed_tokens"][request] - 1
    return int(min(numbers.num_speculative_tokens, room))


@lean_jit
def slots_for_batch(batch: Int64Array, number: int, requests: RequestArrays, block_size: int, num_new: int) -> int:
    """Return the slots that `num_new` more tokens take for all of the batch."""
    slots = 0
    for i in range(number):
        slots += new_slots(requests["num_computed_tokens"][batch[i]], block_size, num_new)
    return slots
