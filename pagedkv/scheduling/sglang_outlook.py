"""Whether memory outlasts a request whose outputs are known, compiled: at every end of a request, what is given back then counted.

Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py).
"""

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.sglang_budgets import (
    NUM_OUTLOOK,
    NUM_PREFILLS,
    RATIO,
    PassArrays,
    PassNumbers,
    current_left,
    num_output,
    total_left,
    whole_blocks,
)
from pagedkv.scheduling.sglang_request import SGLangRecords

IGNORE_EOS_RESERVE = 1
"""Tokens per request that must stay free at any time when outputs are known. Source: SGLang 0.5.23."""


@lean_jit
def _to_come(one: PassArrays, requests: RequestArrays, records: SGLangRecords, request: int) -> float:
    """Return how many tokens `request` will make still, if all outputs have the length expected."""
    ratio = one.expected[RATIO]
    if records["ignore_eos"][request]:
        ratio = 1.0
    return float(records["max_new_tokens"][request] * ratio - num_output(requests, request))


@lean_jit
def _look_ahead(one: PassArrays, requests: RequestArrays, records: SGLangRecords, request: int, place: int) -> None:
    """Enter the end of `request` into the outlook at `place`; if that is -1, behind all that do not end later."""
    left, count = _to_come(one, requests, records, request), one.counters[NUM_OUTLOOK]
    if left <= 0:
        return
    if place < 0:
        place = count
        while place > 0 and one.outlook[place - 1] > left:
            place -= 1
    for i in range(count, place, -1):
        one.outlook[i], one.outlook_held[i] = one.outlook[i - 1], one.outlook_held[i - 1]
    one.outlook[place], one.outlook_held[place] = left, requests["num_known_tokens"][request]
    one.counters[NUM_OUTLOOK] += 1


@lean_jit
def outlasts(
    one: PassArrays,
    limits: PassNumbers,
    num_free: int,
    block_size: int,
    requests: RequestArrays,
    records: SGLangRecords,
    running: Int64Array,
    num_running: int,
    request: int,
    num_new: int,
) -> bool:
    """Return whether memory suffices at every end of a request, if all outputs have the length expected. O(requests)."""
    counters = one.counters
    slots = whole_blocks(num_new, block_size) + block_size + limits.state_slots
    free = current_left(one, num_free)
    if slots > min(free, total_left(one, num_free)):
        return False
    if counters[NUM_OUTLOOK] < 0:
        counters[NUM_OUTLOOK] = 0
        _look_ahead(one, requests, records, request, -1)
        for i in range(num_running):
            _look_ahead(one, requests, records, running[i], -1)
        for i in range(counters[NUM_PREFILLS]):
            _look_ahead(one, requests, records, one.prefills["request"][i], -1)
    else:  # before those that end as late, and never the last: as SGLang does
        place, left = 0, _to_come(one, requests, records, request)
        while place < counters[NUM_OUTLOOK] and one.outlook[place] < left:
            place += 1
        _look_ahead(one, requests, records, request, min(place, max(counters[NUM_OUTLOOK] - 1, 0)))
    free -= slots
    for i in range(counters[NUM_OUTLOOK]):
        alive = counters[NUM_OUTLOOK] - i
        if free - one.outlook[i] * alive <= IGNORE_EOS_RESERVE * alive:
            return False
        free += one.outlook_held[i]
    return True
