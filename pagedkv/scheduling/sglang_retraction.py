"""What SGLang does when running requests do not all fit any more, and how that changes what it expects of them.

Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.radix_arrays import RadixRules
from pagedkv.radix_cache import CacheArrays, RadixCache, make_room
from pagedkv.scheduling.stable_order import SortArrays, sort_places

RETRACT_DECODE_STEPS = 20
"""Tokens per remaining request that a retraction makes room for."""
INITIAL_RATIO, SMALLEST_SHARE, DECAY_STEPS = 0.7, 0.14, 600
"""The share of their possible output that running requests are expected to make, at first, at conservativeness 1; its floor as a
share of that; steps from one to the other."""
NUM_KEPT, NUM_RETRACTED, NUM_COUNTERS = range(3)
"""In `Shortage.counters`."""
NOBODY = -1


class NewTokenRatio(NamedTuple):
    """Which share of their possible output running requests are expected to make: where it begins, and its floor."""

    initial: float
    smallest: float

    @classmethod
    def of(cls, conservativeness: float) -> "NewTokenRatio":
        """Return those at `conservativeness`; 1 is SGLang's default."""
        initial = min(INITIAL_RATIO * conservativeness, 1.0)
        return cls(initial, initial * SMALLEST_SHARE)


@lean_jit
def decayed(ratio: NewTokenRatio, current: float) -> float:
    """Return what to expect after a decode step that fitted: a little less than `current`."""
    return max(current - (ratio.initial - ratio.smallest) / DECAY_STEPS, ratio.smallest)


class Shortage(NamedTuple):
    """A batch that is short of slots. What is known of each is by its place in the batch."""

    sort: SortArrays
    """sort.order[:counters[NUM_KEPT]] are the places of those who stay, by preference: the last of them is next to go."""
    num_prompt: Int64Array
    num_output: Int64Array
    """Tokens generated so far."""
    max_new: Int64Array
    """Tokens that each may generate."""
    counters: Int64Array

    @classmethod
    def empty(cls, max_requests: int) -> "Shortage":
        """Return room for so many."""
        num_prompt, num_output, max_new = np.zeros((3, max_requests), np.int64)
        return cls(SortArrays.empty(max_requests), num_prompt, num_output, max_new, np.zeros(NUM_COUNTERS, np.int64))


def _new_slots(num_stored: Any, block_size: int, num_new: int) -> Any:
    """Return the slots, whole blocks, that `num_new` more tokens take for a request with `num_stored`; for arrays too."""
    return block_size * (-(-(num_stored + num_new) // block_size) + (-num_stored // block_size))


new_slots = lean_jit(_new_slots)
"""The same, compiled."""


def slots_for_decode(num_stored: Int64Array, block_size: int, num_new: int = 1) -> int:
    """Return the slots that `num_new` more tokens take for all requests; `num_stored` is what each has stored."""
    return int(_new_slots(num_stored, block_size, num_new).sum())


@lean_jit
def begin_shortage(short: Shortage, number: int) -> None:
    """Put the places of a batch of `number` in order of preference.

    The one with the fewest outputs goes first, of these the one with the longest prompt, of these the last.
    """
    for i in range(number):
        short.sort.keys[0, i], short.sort.keys[1, i], short.sort.keys[2, i] = -short.num_output[i], short.num_prompt[i], 0.0
    sort_places(short.sort, number)
    short.counters[NUM_KEPT], short.counters[NUM_RETRACTED] = number, 0


@lean_jit
def next_to_go(short: Shortage, cache: CacheArrays, rules: RadixRules, tokens_per_step: int) -> int:
    """Return the place of who is to give up all slots before this is asked again, or NOBODY if the others fit.

    Whoever is the last one left is aborted: SGLang gives up there. At least one goes unless it is alone.
    """
    counters, order, slots = short.counters, short.sort.order, 0
    kept = counters[NUM_KEPT]
    if counters[NUM_RETRACTED] > 0:
        make_room(cache, rules, RETRACT_DECODE_STEPS * kept)
    if kept == 0:
        return NOBODY
    if kept == 1 or counters[NUM_RETRACTED] > 0:
        for i in range(kept):
            stored = short.num_prompt[order[i]] + short.num_output[order[i]] - 1
            slots += new_slots(stored, rules.block_size, tokens_per_step)
        if make_room(cache, rules, slots):
            return NOBODY
    counters[NUM_KEPT] -= 1
    counters[NUM_RETRACTED] += kept > 1
    return int(order[kept - 1])


@lean_jit
def ratio_of_kept(short: Shortage) -> float:
    """Return what to expect of those who stay."""
    made = possible = 0
    for i in range(short.counters[NUM_KEPT]):
        made += short.num_output[short.sort.order[i]]
        possible += short.max_new[short.sort.order[i]]
    return float(min(1.0, (made + RETRACT_DECODE_STEPS * short.counters[NUM_KEPT]) / (possible + 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraction:
    """Who stays and who goes. All are places in the batch that was short."""

    kept: list[int]
    """By preference: the last of them would have been next to go."""
    retracted: list[int]
    """In the order in which they gave up their slots."""
    aborted: list[int]
    """The last one, if it did not fit alone."""
    new_token_ratio: float
    """What to expect from now on of those who stay."""


def retract(
    cache: RadixCache, *, num_prompt: Int64Array, num_output: Int64Array, max_new: Int64Array, release: Callable[[int], None]
) -> Retraction:
    """Take requests out of a batch that is short of slots until the others fit, for who has no scheduler.

    O(requests log requests) besides what is released and evicted.

    Args:
        cache: The memory.
        num_prompt: Prompt lengths, by place in the batch.
        num_output: Tokens generated so far.
        max_new: Tokens that each may generate.
        release: Gives back all that the request at a place holds, but for what the tree has.
    """
    short = Shortage.empty(num_prompt.size)
    short.num_prompt[:], short.num_output[:], short.max_new[:] = num_prompt, num_output, max_new
    begin_shortage(short, num_prompt.size)
    gone = list[int]()
    while (place := int(next_to_go(short, cache.arrays, cache.rules, 1))) != NOBODY:
        gone.append(place)
        release(place)
    retracted = int(short.counters[NUM_RETRACTED])
    return Retraction(
        kept=short.sort.order[: short.counters[NUM_KEPT]].tolist(),
        retracted=gone[:retracted],
        aborted=gone[retracted:],
        new_token_ratio=float(ratio_of_kept(short)),
    )
