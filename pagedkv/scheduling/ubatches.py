"""The micro-batches (ubatches) that llama.cpp computes a batch in, one after the other: each reads all weights once."""

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.step_batch import StepBatch


@lean_jit
def _compute(batch: StepBatch, i: int, left: int, num_tokens: int, passes: StepBatch, place: int) -> None:
    """Let entry `place` of `passes` be the next `num_tokens` of the `left` that entry `i` of `batch` has yet to compute."""
    passes[place] = batch[i]
    passes["num_scheduled_tokens"][place] = num_tokens
    passes["num_slots_needed"][place] = batch["num_slots_needed"][i] - left + num_tokens


@lean_jit
def simple_split(batch: StepBatch, order: Int64Array, n_ubatch: int, passes: StepBatch, ends: Int64Array) -> int:
    """Cut a batch every `n_ubatch` tokens, in its order: what llama.cpp does with one stream of cells.

    Args:
        batch: The step.
        order: Its entries in the order of the server's batch.
        n_ubatch: Most tokens of a micro-batch.
        passes: Receives what each micro-batch computes, one behind the other.
        ends: Receives where each ends.

    Returns:
        How many there are. O(entries of all).
    """
    number = place = 0
    room = n_ubatch
    for i in order:
        left = batch["num_scheduled_tokens"][i]
        while left > 0:
            if room == 0:
                ends[number] = place
                number, room = number + 1, n_ubatch
            size = min(left, room)
            _compute(batch, i, left, size, passes, place)
            place += 1
            left -= size
            room -= size
    ends[number] = place
    return number + 1


@lean_jit
def equal_split(batch: StepBatch, order: Int64Array, n_ubatch: int, left: Int64Array, passes: StepBatch, ends: Int64Array) -> int:
    """Cut a batch so that sequences are as long as each other in a micro-batch: what llama.cpp does with a stream for each slot.

    A micro-batch begins with the first entry that has tokens left, and takes in those of the server slots (rows) that follow its
    own without a gap. So a prompt shares only one token's worth of it with those who decode. Arguments as in `simple_split`, and
    room for as many numbers as the batch has entries, `left`. O(entries × micro-batches).
    """
    for i in order:
        left[i] = batch["num_scheduled_tokens"][i]
    number = place = 0
    while True:
        first, slot = place, -1
        size = n_ubatch
        for i in order:
            if left[i] > 0 and place - first < n_ubatch and (place == first or batch["row"][i] == slot + 1):
                slot = batch["row"][i]
                size = min(size, left[i])
                _compute(batch, i, left[i], 0, passes, place)
                place += 1
        if place == first:
            return number
        size = min(size, n_ubatch // (place - first))
        for i in range(first, place):
            passes["num_scheduled_tokens"][i] = size
            passes["num_slots_needed"][i] += size
        member = first
        for i in order:
            if member < place and batch["request"][i] == passes["request"][member]:
                left[i] -= size
                member += 1
        ends[number] = place
        number += 1
