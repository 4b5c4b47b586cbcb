"""Server slots as arrays: which run a request, which tokens the others still have, and which of them the next request gets."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int8Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.slot_windows import SlotWindows, end_window

SLOT_PROMPT_SIMILARITY = 0.1
"""An idle slot is preferred if it has more than this share of the prompt. Source: llama.cpp, --slot-prompt-similarity's default."""
NO_SLOT = -1
"""In place of a server slot: none is idle."""
NUM_BUSY, NUM_ENDED, NUM_COUNTS = range(3)
"""In `SlotArrays.counts`: slots in which a request runs; requests that have ended."""


class SlotArrays(NamedTuple):
    """The server slots, by number."""

    runs: Int8Array
    """1: a request runs there; 0: it is idle."""
    requests: Int64Array
    """Under a scheduler: the request that runs there, or whose tokens it remembers."""
    num_kept: Int64Array
    """Tokens that it remembers while it is idle; 0 while it is not."""
    last_used: Int64Array
    """How many requests had ended when its last one did; -1: it never ran one."""
    num_common: Int64Array
    """While a slot is chosen: how many of the tokens that it remembers the next request begins with."""
    counts: Int64Array
    """See NUM_BUSY."""
    windows: SlotWindows
    """What layers with a window still have."""

    @classmethod
    def empty(cls, num_server_slots: int, windows: SlotWindows) -> "SlotArrays":
        """Return slots that never ran anything."""
        requests, kept, common = np.zeros((3, num_server_slots), np.int64)
        runs, never = np.zeros(num_server_slots, np.int8), np.full(num_server_slots, -1, np.int64)
        return cls(runs, requests, kept, never, common, np.zeros(NUM_COUNTS, np.int64), windows)


@lean_jit
def choose_slot(slots: SlotArrays, num_tokens: int) -> int:
    """Return the slot that an admission of `num_tokens` known tokens gets now; NO_SLOT if none is idle. O(server slots).

    The idle slot that has the largest part of the request's tokens at its beginning, `num_common`, if that is more than a tenth of
    them; else the one that ended longest ago, the last one of several that never ran.
    """
    best = oldest = NO_SLOT
    longest = SLOT_PROMPT_SIMILARITY * num_tokens
    for slot in range(slots.runs.size):
        if slots.runs[slot] == 0:
            if slots.num_common[slot] > longest:
                best, longest = slot, float(slots.num_common[slot])
            if oldest == NO_SLOT or slots.last_used[slot] <= slots.last_used[oldest]:
                oldest = slot
    return oldest if best == NO_SLOT else best


@lean_jit
def start_slot(slots: SlotArrays, slot: int) -> None:
    """Let a request run in idle `slot`; what that remembers is the request's now, or nobody's."""
    slots.runs[slot] = 1
    slots.num_kept[slot] = 0
    slots.counts[NUM_BUSY] += 1


@lean_jit
def end_slot(slots: SlotArrays, slot: int, num_kept: int) -> None:
    """Make `slot` idle; it remembers the first `num_kept` tokens of the request that ran there."""
    slots.runs[slot] = 0
    slots.num_kept[slot] = num_kept
    end_window(slots.windows, slot, num_kept)
    slots.last_used[slot] = slots.counts[NUM_ENDED]
    slots.counts[NUM_ENDED] += 1
    slots.counts[NUM_BUSY] -= 1
