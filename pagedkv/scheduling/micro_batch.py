"""How many tokens of whom a step computes for TensorRT-LLM's micro-batch scheduler, among those who have memory: compiled.

Rules, not code, of its microBatchScheduler.cpp.
"""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import BoolArray, Int64Array
from pagedkv.jit import lean_jit

WHOLE, FIRST_COME_FIRST_SERVED, EQUAL_PROGRESS = range(3)
"""How prompts share a step's tokens: not at all, they are not cut; or one of the chunk policies."""
CHUNK_POLICIES = {"first_come_first_served": FIRST_COME_FIRST_SERVED, "equal_progress": EQUAL_PROGRESS}
"""By TensorRT-LLM's names, in lower case."""


class MicroBatch(NamedTuple):
    """Who may run in a step, and who does: room for `max_num_seqs` each."""

    requests: Int64Array
    """Who may run, in order."""
    num_tokens: Int64Array
    """Of each: all that is left of its prompt, or 1."""
    is_context: BoolArray
    """Of each: whether that is a prompt, or what is recomputed after a pause."""
    chosen: Int64Array
    """Who runs: places in `requests`."""
    sizes: Int64Array
    """The tokens of each of those."""
    prompts: Int64Array
    """Places of prompts that can be cut."""
    cuts: Int64Array
    """Their tokens in this step."""

    @classmethod
    def empty(cls, max_num_seqs: int) -> "MicroBatch":
        """Return one without anybody."""
        requests, num_tokens, chosen, sizes, prompts, cuts = np.zeros((6, max_num_seqs), np.int64)
        return cls(requests, num_tokens, np.zeros(max_num_seqs, np.bool_), chosen, sizes, prompts, cuts)


class MicroBatchLimits(NamedTuple):
    """The limits of a step."""

    max_num_seqs: int
    max_num_tokens: int
    chunk: int
    """WHOLE, or a policy."""
    chunk_unit: int


@lean_jit
def _first_come_first_served(batch: MicroBatch, number: int, room: int, unit: int) -> None:
    """Give each prompt all it can get, in order; one that is cut is cut to whole units."""
    for i in range(number):
        left = batch.num_tokens[batch.prompts[i]]
        size = min(left, room)
        if size < left:
            size = size // unit * unit
        batch.cuts[i] = size
        room -= size


@lean_jit
def _equal_progress(batch: MicroBatch, number: int, room: int, unit: int) -> None:
    """Give a unit to each prompt in turn, until none gets another one."""
    batch.cuts[:number] = 0
    progress = 1
    while progress > 0:
        progress = 0
        for i in range(number):
            step = min(unit, batch.num_tokens[batch.prompts[i]] - batch.cuts[i])
            if step <= room:
                batch.cuts[i] += step
                room -= step
                progress += step


@lean_jit
def choose_entries(batch: MicroBatch, number: int, limits: MicroBatchLimits) -> int:
    """Write into batch.chosen and batch.sizes who of the first `number` runs, and return how many they are.

    In order, until the first that the tokens do not suffice for. Prompts that can be cut are served from what the others leave.
    """
    room, num_chosen, num_prompts, wanted = limits.max_num_tokens, 0, 0, 0
    for i in range(min(number, limits.max_num_seqs)):
        if limits.chunk != WHOLE and batch.is_context[i]:
            batch.prompts[num_prompts] = i
            num_prompts += 1
            wanted += batch.num_tokens[i]
            continue
        if batch.num_tokens[i] > room:
            break
        batch.chosen[num_chosen], batch.sizes[num_chosen] = i, batch.num_tokens[i]
        num_chosen += 1
        room -= batch.num_tokens[i]
    if wanted <= room:
        for i in range(num_prompts):
            batch.cuts[i] = batch.num_tokens[batch.prompts[i]]
    elif limits.chunk == FIRST_COME_FIRST_SERVED:
        _first_come_first_served(batch, num_prompts, room, limits.chunk_unit)
    else:
        _equal_progress(batch, num_prompts, room, limits.chunk_unit)
    for i in range(num_prompts):
        if batch.cuts[i] > 0:
            batch.chosen[num_chosen], batch.sizes[num_chosen] = batch.prompts[i], batch.cuts[i]
            num_chosen += 1
    return num_chosen
