"""What a prefill pass of SGLang's may take, compiled: its budgets, and what it has charged to them.

Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py).
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.sglang_request import MAX_NEW_TOKENS_COUNTED, SGLangRecords

CONTINUE, NO_TOKEN, OTHER = range(3)
"""Whether the pass goes on: the places of `pagedkv.scheduling.sglang_prefill.Verdict`."""
NO_LIMIT = 1 << 60
CONTINUED = -1
"""In place of the node where a prefix ends: a prompt that is being continued, which holds it already."""

PREFILL = np.dtype([("request", "<i8"), ("start", "<i8"), ("end", "<i8"), ("node", "<i8"), ("chunked", "<i8")])
"""What a request computes in the step: tokens start to end; node: where its prefix ends, locked once; whether more is left."""

Prefills: TypeAlias = npt.NDArray[np.void]
"""`PREFILL`, in order."""

INPUT_LEFT, CHUNK_LEFT, CURRENT_OFFSET, NUM_PREFILLS, IN_PIECES, NUM_OUTLOOK, NUM_COUNTERS = range(7)
"""In `PassArrays.counters`: tokens of the step, of whole prompts and in all; slots that this step takes; prefills; whether one is
in pieces; entries of the outlook, -1 before there is one."""
TOTAL_OFFSET, RATIO = 0, 1
"""In `PassArrays.expected`: slots that running and admitted requests may come to need; the share of outputs that is expected."""


class PassArrays(NamedTuple):
    """A pass. What a new request may count on is what is free or evictable now less the offsets."""

    prefills: Prefills
    counters: Int64Array
    expected: Float64Array
    outlook: Float64Array
    """Of requests by the time of their end: tokens to come until then."""
    outlook_held: Int64Array
    """What each gives back then."""

    @classmethod
    def empty(cls, max_requests: int) -> "PassArrays":
        """Return room for so many running requests, and as many more."""
        room = 2 * max_requests + 4
        return cls(np.zeros(room, PREFILL), np.zeros(NUM_COUNTERS, np.int64), np.zeros(2), np.zeros(room), np.zeros(room, np.int64))


class PassNumbers(NamedTuple):
    """What bounds every pass: see `pagedkv.scheduling.sglang_prefill.PassLimits`."""

    max_prefill_tokens: int
    chunk_tokens: int
    """NO_LIMIT: prompts are computed whole."""
    max_requests: int
    caches_prefixes: bool
    shortest_first: bool
    state_slots: int


@lean_jit
def whole_blocks(num_tokens: int, block_size: int) -> int:
    """Return `num_tokens` rounded up to blocks."""
    return -(-num_tokens // block_size) * block_size


@lean_jit
def num_output(requests: RequestArrays, request: int) -> int:
    """Return the outputs that `request` has made."""
    return int(requests["num_known_tokens"][request] - requests["prompt_tokens"][request])


@lean_jit
def begin_pass(
    one: PassArrays,
    limits: PassNumbers,
    requests: RequestArrays,
    records: SGLangRecords,
    running: Int64Array,
    num_running: int,
    num_mixed: int,
    ratio: float,
) -> None:
    """Begin while `running` requests, those of them that hold memory, are expected to make a share `ratio` of their outputs.

    `num_mixed` decode tokens share the step.
    """
    counters, reserved = one.counters, 0.0
    counters[INPUT_LEFT], counters[CHUNK_LEFT] = limits.max_prefill_tokens - num_mixed, limits.chunk_tokens - num_mixed
    counters[CURRENT_OFFSET], counters[NUM_PREFILLS], counters[IN_PIECES], counters[NUM_OUTLOOK] = num_mixed, 0, 0, -1
    for i in range(num_running):
        request = running[i]
        to_come = min(records["max_new_tokens"][request] - num_output(requests, request), MAX_NEW_TOKENS_COUNTED)
        if records["ignore_eos"][request]:
            reserved += to_come
        else:
            reserved += to_come * ratio
    one.expected[TOTAL_OFFSET], one.expected[RATIO] = num_mixed + reserved, ratio


@lean_jit
def is_spent(one: PassArrays) -> bool:
    """Return whether the step has no tokens left to compute: then nobody else is looked at."""
    return bool(one.counters[INPUT_LEFT] <= 0 or one.counters[CHUNK_LEFT] <= 0)


@lean_jit
def total_left(one: PassArrays, num_free: int) -> float:
    """Return the slots, of `num_free`, that a new request may count on until its end."""
    return float(num_free - one.expected[TOTAL_OFFSET])


@lean_jit
def current_left(one: PassArrays, num_free: int) -> int:
    """Return the slots, of `num_free`, that are left in this step."""
    return int(num_free - one.counters[CURRENT_OFFSET])
