"""The micro-batches (ubatches) that llama.cpp computes a batch in, one after the other: each reads all weights once."""

from collections.abc import Sequence
from typing import TypeAlias

UBatch: TypeAlias = list[tuple[int, int]]
"""(entry of the batch, tokens of it)."""


def simple_split(num_tokens: Sequence[int], n_ubatch: int) -> list[UBatch]:
    """Cut a batch every `n_ubatch` tokens, in its order: what llama.cpp does with one stream of cells.

    Args:
        num_tokens: By entry of the batch: its tokens.
        n_ubatch: Most tokens of a micro-batch.

    Example:
        >>> simple_split([1, 5], 4)
        [[(0, 1), (1, 3)], [(1, 2)]]
    """
    batches: list[UBatch] = [[]]
    room = n_ubatch
    for entry, left in enumerate(num_tokens):
        while left:
            if not room:
                batches.append([])
                room = n_ubatch
            size = min(left, room)
            batches[-1].append((entry, size))
            left, room = left - size, room - size
    return batches


def equal_split(num_tokens: Sequence[int], slots: Sequence[int], n_ubatch: int) -> list[UBatch]:
    """Cut a batch so that sequences are as long as each other in a micro-batch: what llama.cpp does with a stream for each slot.

    A micro-batch begins with the first entry that has tokens left, and takes in those of the server slots that follow its own
    without a gap. So a prompt shares only one token's worth of it with those who decode.

    Args:
        num_tokens: By entry of the batch: its tokens.
        slots: By entry: its server slot.
        n_ubatch: Most tokens of a micro-batch.

    Example:
        >>> equal_split([1, 1, 5], [0, 1, 2], 512), len(equal_split([1, 1], [0, 2], 512))
        ([[(0, 1), (1, 1), (2, 1)], [(2, 4)]], 2)
    """
    left, batches = list(num_tokens), []
    while any(left):
        members: list[int] = []
        for entry, slot in enumerate(slots):
            if left[entry] and len(members) < n_ubatch and (not members or slot == slots[members[-1]] + 1):
                members.append(entry)
        size = min(n_ubatch // len(members), *(left[entry] for entry in members))
        for entry in members:
            left[entry] -= size
        batches.append([(entry, size) for entry in members])
    return batches
