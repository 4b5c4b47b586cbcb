"""What a compiled step asks of memory, row by row: a version of each function for each kind of memory.

A kind is a NamedTuple of arrays, `memory`, and one of plain numbers, `rules`. `requests` are `REQUEST` records; what they share
with others is in `segments`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.jit import by_kind, lean_jit

NEVER = -1
"""In place of the slots that a request takes at admission: it can never fit."""


def each_admission_slots(
    admission_slots: Callable[[int, int], int | None], prompt_tokens: Int64Array, output_tokens: Int64Array
) -> Int64Array:
    """Return what `admission_slots` says of each of many requests, NEVER where it is None."""
    slots = map(admission_slots, prompt_tokens.tolist(), output_tokens.tolist())
    return np.array([NEVER if each is None else each for each in slots], np.int64)


@by_kind
def begin_step(memory: Any, rules: Any) -> Any:
    """Hear that a step is about to be decided."""


@lean_jit
def no_news(memory: Any, rules: Any) -> None:
    """`begin_step` of memory to which a step is nothing new."""


@by_kind
def covers(memory: Any, rules: Any, row: int, num_slots: int, num_computed: int) -> Any:
    """Return whether `row` has `num_slots` already, and `grant` would have nothing to do. Most steps end here: let it be short."""


@by_kind
def grant(memory: Any, rules: Any, requests: Any, segments: Any, request: int, row: int, num_tokens: int) -> Any:
    """Give a running `request` the slots of its next tokens; return whether they fit. If not, nothing has changed."""


@by_kind
def find_cached(memory: Any, rules: Any, requests: Any, segments: Any, request: int) -> Any:
    """Return how many tokens that a waiting `request` begins with are there already; fewer than it knows."""


@lean_jit
def nothing_cached(memory: Any, rules: Any, requests: Any, segments: Any, request: int) -> int:
    """`find_cached` of memory that shares nothing."""
    return 0


@by_kind
def admit(
    memory: Any,
    rules: Any,
    requests: Any,
    segments: Any,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> Any:
    """Give a waiting `request` what `find_cached` found and the slots of its next tokens; return whether they fit.

    If not, nothing has changed.
    """


@by_kind
def note_computed(memory: Any, rules: Any, requests: Any, segments: Any, request: int, row: int) -> Any:
    """Hear that a running `request` has computed more tokens, of which others may find some from now on."""


@by_kind
def keep_content(memory: Any, rules: Any, requests: Any, segments: Any, request: int, row: int) -> Any:
    """Keep for others what a running `request` has computed, as far as that is done: its row is about to be given back."""


@lean_jit
def no_content(memory: Any, rules: Any, requests: Any, segments: Any, request: int, row: int) -> None:
    """`note_computed` and `keep_content` of memory that has nothing to do then."""


@by_kind
def free_row(memory: Any, rules: Any, row: int) -> Any:
    """Give back all that `row` holds."""


@by_kind
def slots_of(memory: Any, rules: Any) -> Any:
    """Return (free slots, those of them that keep a prefix, shared slots, slots lost to the rounding of a heap)."""


@by_kind
def rows_of(memory: Any, rules: Any) -> Any:
    """Return (units held, by row; slots in a unit; units of each running request for its state)."""


@by_kind
def use_in_groups(memory: Any, rules: Any, state: Any, requests: Any, batch: Any, num_entries: int) -> Any:
    """Return (slots with tokens, slots that await some, other slots) of what runs, where layer groups have slots of their own.

    The batch's entries are the head of the running list. What is shared counts once. NEVER thrice: a token has one slot for all
    layers, and how many each row holds says it all.
    """


@use_in_groups.register(object)
@lean_jit
def _no_groups(memory: Any, rules: Any, state: Any, requests: Any, batch: Any, num_entries: int) -> tuple[int, int, int]:
    return NEVER, NEVER, NEVER


@by_kind
def moved_blocks(memory: Any, rules: Any) -> Any:
    """Return (blocks copied from a second tier, blocks copied to it) for the step that was decided last."""


@lean_jit
def nothing_moved(memory: Any, rules: Any) -> tuple[int, int]:
    """`moved_blocks` of memory without a second tier."""
    return 0, 0
