"""What server slots still have of layers with a window, and the checkpoints from which these layers can go on.

llama.cpp keeps such layers in a cache of few cells. What a slot remembers can only be continued where that cache still has the
window before; else from a context checkpoint, a copy in the processor's memory of the window before some token; else all is
computed again. Checkpoints are made while a prompt is computed: `TAIL` and a micro-batch before its end, `TAIL` before it, and
where its last message starts; a batch ends there. Not modelled: checkpoints at earlier messages (--checkpoint-min-step), and that
of a full list those too close to each other leave first in the newest versions.
Source: llama.cpp, tools/server/server-context.cpp as of September 2026; --ctx-checkpoints, PR 15293, 20288, 22929, 24176.
"""

from typing import NamedTuple

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit

TAIL = 4
"""Tokens of a prompt behind its last checkpoint. Source: as above, checkpoint_offsets."""


class SlotWindows(NamedTuple):
    """The windows of the server slots, by slot."""

    tokens: int
    """Tokens of the window, the query's own included; 0: slots can be continued anywhere."""
    cells: int
    """Cells of a stream for layers with a window."""
    shared: bool
    """All slots draw from one stream."""
    ubatch: int
    """Tokens of a micro-batch."""
    first: Int64Array
    """The first token that was there when a request began."""
    holes: Int64Array
    """Cells that it gave back then, behind what it kept."""
    computed: Int64Array
    """Tokens computed there ever."""
    total: Int64Array
    """[1]: tokens computed in all slots."""
    checkpoints: Int64Array
    """[slots, most]: how many tokens lie before each, ascending."""
    num_checkpoints: Int64Array

    @classmethod
    def of(cls, settings: KVPoolSettings, num_server_slots: int, *, shared: bool) -> "SlotWindows":
        """Return the windows of slots that never ran anything."""
        cells = settings.window_cells // (1 if shared else max(num_server_slots, 1))
        first, holes, computed, number = np.zeros((4, num_server_slots), np.int64)
        checkpoints = np.zeros((num_server_slots, settings.context_checkpoints), np.int64)
        rules = int(settings.window_tokens), int(cells), bool(shared), int(settings.ubatch_tokens)
        return cls(*rules, first, holes, computed, np.zeros(1, np.int64), checkpoints, number)


@lean_jit
def first_in_window(windows: SlotWindows, slot: int, num_kept: int) -> int:
    """Return the first of the `num_kept` tokens of `slot` that layers with a window are sure to have.

    The cells are filled in a circle, so these are as many as there are cells. Where several slots have computed in one stream, or a
    request has begun before the end of what was there, tokens do not lie in order any more; since a token takes the place of the
    first that no window needs, and all before that one are given up, only a window is sure to be left.
    """
    alone = num_kept - windows.tokens + 1
    if windows.holes[slot] > 0 or (windows.shared and windows.total[0] > windows.computed[slot]):
        return max(alone, 0)
    return int(max(min(max(windows.first[slot], num_kept - windows.cells), alone), 0))


@lean_jit
def reusable_tokens(windows: SlotWindows, slot: int, num_kept: int, num_common: int, num_tokens: int) -> int:
    """Return how many tokens a request of `num_tokens` finds in idle `slot`, whose `num_kept` begin with `num_common` of them.

    Never all: the last token is always computed. O(checkpoints).
    """
    found = min(num_common, num_tokens - 1)
    if windows.tokens == 0 or num_common == 0:
        return found
    before = num_common - windows.tokens - (1 if num_common == num_tokens else 0)
    if first_in_window(windows, slot, num_kept) < before:
        return found
    for k in range(windows.num_checkpoints[slot] - 1, -1, -1):
        at = windows.checkpoints[slot, k]
        if at - 1 <= num_common:  # the last token before a checkpoint is computed again
            return int(min(max(at - 1, 1), found))
    return 0


@lean_jit
def next_stop(windows: SlotWindows, num_computed: int, num_tokens: int, message_start: int) -> int:
    """Return where the batch ends for a checkpoint in a prompt of `num_tokens` of which `num_computed` are there; else its end."""
    stop = num_tokens
    if windows.tokens > 0 and windows.checkpoints.shape[1] > 0:
        for at in (message_start, num_tokens - TAIL - windows.ubatch, num_tokens - TAIL):
            if num_computed < at < stop:
                stop = at
    return stop


@lean_jit
def _add_checkpoint(windows: SlotWindows, slot: int, at: int) -> None:
    """Keep one more; the oldest leaves if there are too many."""
    places, number = windows.checkpoints[slot], windows.num_checkpoints[slot]
    if number > 0 and places[number - 1] >= at:
        return
    if number == places.size:
        number -= 1
        for k in range(number):
            places[k] = places[k + 1]
    places[number] = at
    windows.num_checkpoints[slot] = number + 1


@lean_jit
def begin_window(windows: SlotWindows, slot: int, num_kept: int, found: int, num_tokens: int, message_start: int) -> None:
    """Let a prompt of `num_tokens` begin in `slot`, which remembered `num_kept` tokens, behind the first `found` of them.

    O(checkpoints).
    """
    if windows.tokens == 0:
        return
    first = first_in_window(windows, slot, num_kept)
    goes_on = first < found - windows.tokens
    windows.first[slot] = first if goes_on else max(found + 1 - windows.tokens, 0)
    windows.holes[slot] = num_kept - found if goes_on else 0
    if windows.checkpoints.shape[1] == 0:
        return
    number = 0
    while found > 0 and number < windows.num_checkpoints[slot] and windows.checkpoints[slot, number] - 1 <= found:
        number += 1
    windows.num_checkpoints[slot] = number
    if found > 0 and num_tokens - found <= TAIL + windows.ubatch:
        _add_checkpoint(windows, slot, found)
    at = next_stop(windows, found, num_tokens, message_start)
    while at < num_tokens:
        _add_checkpoint(windows, slot, at)
        at = next_stop(windows, at, num_tokens, message_start)


@lean_jit
def count_computed(windows: SlotWindows, slot: int, num_tokens: int) -> None:
    """Note that `slot` computes so many more tokens."""
    windows.computed[slot] += num_tokens
    windows.total[0] += num_tokens


@lean_jit
def end_window(windows: SlotWindows, slot: int, num_kept: int) -> None:
    """Let `slot` be idle with its first `num_kept` tokens: checkpoints behind them are none."""
    number = windows.num_checkpoints[slot]
    while number > 0 and windows.checkpoints[slot, number - 1] > num_kept:
        number -= 1
    windows.num_checkpoints[slot] = number
