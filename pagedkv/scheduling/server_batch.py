"""The batch of llama.cpp's server: what it is made of, and what is left of it while it is computed in several steps."""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.slot_steps import find_slot, message_start
from pagedkv.scheduling.waiting import NUM_RUNNING, NUM_WAITING, WAITING_HEAD, SchedulerArrays
from pagedkv.slot_arrays import SlotArrays
from pagedkv.slot_windows import next_stop

NUM_PENDING, NUM_ASSIGNED, NUM_COUNTS = range(3)
"""In `ServerBatch.counts`: entries of the batch that are still to be computed; how many at the head of the queue have been promised
a server slot."""


class ServerBatch(NamedTuple):
    """How the server batches, and the batch that it is working through: if cells run short, it takes several steps."""

    n_batch: int
    n_ubatch: int
    cont_batching: bool
    equal_sequences: bool
    """Micro-batches have sequences of one length each: every slot has a stream of its own."""
    counts: Int64Array
    """See NUM_PENDING."""
    requests: Int64Array
    """Of the pending entries, in the order of the batch."""
    num_tokens: Int64Array
    """By pending entry: tokens still to be computed."""
    num_found: Int64Array
    """By pending entry, in a decision: what it would find in the slot that it would get now; 0 if it has one."""
    order: Int64Array
    """Room for a number by server slot."""
    left: Int64Array
    """The same."""

    @classmethod
    def empty(
        cls, *, n_batch: int, n_ubatch: int, cont_batching: bool, equal_sequences: bool, num_server_slots: int
    ) -> "ServerBatch":
        """Return a server that has nothing to compute."""
        room = np.zeros((5, num_server_slots), np.int64)
        return cls(int(n_batch), int(n_ubatch), bool(cont_batching), equal_sequences, np.zeros(NUM_COUNTS, np.int64), *room)


@lean_jit
def generates(requests: RequestArrays, request: int) -> bool:
    """Return whether `request` has its prompt behind it."""
    return bool(requests["num_known_tokens"][request] > requests["prompt_tokens"][request])


@lean_jit
def _append(server: ServerBatch, request: int, num_tokens: int, num_found: int) -> None:
    place = server.counts[NUM_PENDING]
    server.requests[place], server.num_tokens[place], server.num_found[place] = request, num_tokens, num_found
    server.counts[NUM_PENDING] = place + 1


@lean_jit
def _tokens_to_stop(slots: SlotArrays, requests: RequestArrays, segments: Segments, request: int, num_computed: int) -> int:
    """Return how many tokens of a prompt come into a batch at once: all that are left, or those up to its next checkpoint."""
    known, start = requests["num_known_tokens"][request], message_start(requests, segments, request)
    return int(next_stop(slots.windows, num_computed, known, start) - num_computed)


@lean_jit
def fill_batch(
    server: ServerBatch, state: SchedulerArrays, requests: RequestArrays, memory: Any, rules: Any, segments: Segments
) -> None:
    """Begin a batch: a token of each slot that generates, then prompts, those begun before others, up to n_batch tokens.

    A prompt comes into it only up to where a checkpoint is made (`pagedkv.slot_windows`).
    Idle slots are promised to those who wait, in order of arrival; whose turn it is then joins the batch as far as there is room.
    """
    counts, slots = state.counts, memory.slots
    for row in range(slots.runs.size):
        if slots.runs[row] and generates(requests, slots.requests[row]):
            _append(server, slots.requests[row], 1, 0)
    server.counts[NUM_ASSIGNED] = min(slots.runs.size - counts[NUM_RUNNING], counts[NUM_WAITING])
    if server.counts[NUM_PENDING] > 0 and not server.cont_batching:
        return
    room = server.n_batch - server.counts[NUM_PENDING]
    for row in range(slots.runs.size):
        if room > 0 and slots.runs[row] and not generates(requests, slots.requests[row]):
            request = slots.requests[row]
            tokens = min(_tokens_to_stop(slots, requests, segments, request, requests["num_computed_tokens"][request]), room)
            _append(server, request, tokens, 0)
            room -= tokens
    for k in range(server.counts[NUM_ASSIGNED]):
        if room == 0:
            break
        request = state.waiting[(counts[WAITING_HEAD] + k) % state.waiting.size]
        _, found = find_slot(slots, rules, requests, segments, request)
        tokens = min(_tokens_to_stop(slots, requests, segments, request, found), room)
        _append(server, request, tokens, found)
        room -= tokens


@lean_jit
def look_again(server: ServerBatch, requests: RequestArrays, memory: Any, rules: Any, segments: Segments) -> None:
    """Find out what those of the pending entries who wait would find now."""
    for i in range(server.counts[NUM_PENDING]):
        server.num_found[i] = 0
        if requests["row"][server.requests[i]] == NO_ROW:
            _, server.num_found[i] = find_slot(memory.slots, rules, requests, segments, server.requests[i])


@lean_jit
def cells_for(server: ServerBatch, size: int) -> int:
    """Return the cells that the first `size` tokens of the batch take or keep from being purged."""
    needed = 0
    for i in range(server.counts[NUM_PENDING]):
        if size == 0:
            break
        tokens = min(server.num_tokens[i], size)
        needed += tokens + server.num_found[i]
        size -= tokens
    return needed
