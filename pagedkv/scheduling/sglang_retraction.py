"""What SGLang does when running requests do not all fit any more, and how that changes what it expects of them.

Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError
from pagedkv.radix_cache import RadixCache

RETRACT_DECODE_STEPS = 20
"""Tokens per remaining request that a retraction makes room for."""
INITIAL_RATIO, SMALLEST_SHARE, DECAY_STEPS = 0.7, 0.14, 600
"""The ratio at the start, at conservativeness 1; its floor as a share of that; steps from one to the other."""


class NewTokenRatio:
    """Which share of their possible output running requests are expected to make.

    Example:
        >>> ratio = NewTokenRatio(conservativeness=1.0)
        >>> ratio.decay()
        >>> round(ratio.current, 6), round(ratio.smallest, 3)
        (0.698997, 0.098)
    """

    def __init__(self, *, conservativeness: float = 1.0) -> None:
        if not 0 < conservativeness < float("inf"):
            raise ConfigError(f"schedule-conservativeness is {conservativeness}: needs more than 0, and 1 is SGLang's default")
        self.initial = min(INITIAL_RATIO * conservativeness, 1.0)
        self.smallest = self.initial * SMALLEST_SHARE
        self.current = self.initial

    def decay(self) -> None:
        """Expect a little less: a decode step fitted."""
        self.current = max(self.current - (self.initial - self.smallest) / DECAY_STEPS, self.smallest)

    def reset(self) -> None:
        """Begin anew: the engine is idle."""
        self.current = self.initial


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


def fits_after_eviction(cache: RadixCache, num_slots: int) -> bool:
    """Evict what the free list is short of `num_slots`; return whether that many are free now."""
    missing = num_slots - cache.slots.num_free_slots
    if missing > 0:
        for slots in cache.tree.evict(missing):
            cache.slots.free_segment(slots)
    return cache.slots.num_free_slots >= num_slots


def slots_for_decode(num_stored: Int64Array, block_size: int, num_new: int = 1) -> int:
    """Return the slots, whole blocks, that `num_new` more tokens take for each request; `num_stored` is what each has stored."""
    return block_size * int((-(-(num_stored + num_new) // block_size) + (-num_stored // block_size)).sum())


def retract(
    cache: RadixCache,
    *,
    num_prompt: Int64Array,
    num_output: Int64Array,
    max_new: Int64Array,
    release: Callable[[int], None],
    tokens_per_step: int = 1,
) -> Retraction:
    """Take requests out of a batch that is short of slots until the others fit.

    The one with the fewest outputs goes first, of these the one with the longest prompt, of these the last. At least one goes
    unless it is alone. O(requests log requests) besides what is released and evicted.

    Args:
        cache: The memory.
        num_prompt: Prompt lengths, by place in the batch.
        num_output: Tokens generated so far.
        max_new: Tokens that each may generate.
        release: Gives back all that the request at a place holds, but for what the tree has.
        tokens_per_step: Tokens that a step computes for each: a new one, and drafts.
    """
    kept: list[int] = np.lexsort((num_prompt, -num_output)).tolist()
    retracted, aborted = list[int](), list[int]()

    def short() -> bool:
        stored = (num_prompt + num_output - 1)[kept]
        return not fits_after_eviction(cache, slots_for_decode(stored, cache.block_size, tokens_per_step))

    while (len(kept) > 1 and not retracted) or short():
        if len(kept) == 1:
            aborted = [kept.pop()]
            release(aborted[0])
            break
        retracted.append(kept.pop())
        release(retracted[-1])
        fits_after_eviction(cache, RETRACT_DECODE_STEPS * len(kept))
    made, possible = int(num_output[kept].sum()), int(max_new[kept].sum())
    ratio = min(1.0, (made + RETRACT_DECODE_STEPS * len(kept)) / (possible + 1))
    return Retraction(kept=kept, retracted=retracted, aborted=aborted, new_token_ratio=ratio)
