"""How many tokens of whom a step computes for TensorRT-LLM's micro-batch scheduler, among those who have memory.

Rules, not code, of its microBatchScheduler.cpp.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """What a request has to compute."""

    request: int
    num_tokens: int
    """All that is left of its prompt, or 1."""
    is_context: bool
    """Whether that is a prompt, or what is recomputed after a pause."""


ChunkPolicy = Callable[[Sequence[int], int, int], list[int]]
"""(tokens left of each prompt, tokens that a step has room for, chunk unit) -> tokens of each in this step."""


def first_come_first_served(left: Sequence[int], room: int, unit: int) -> list[int]:
    """Give each prompt all it can get, in order; one that is cut is cut to whole units."""
    sizes = []
    for num_tokens in left:
        size = min(num_tokens, room)
        sizes.append(size if size == num_tokens else size // unit * unit)
        room -= sizes[-1]
    return sizes


def equal_progress(left: Sequence[int], room: int, unit: int) -> list[int]:
    """Give a unit to each prompt in turn, until none gets another one."""
    sizes = [0] * len(left)
    while True:
        progress = 0
        for i, num_tokens in enumerate(left):
            step = min(unit, num_tokens - sizes[i])
            if step <= room:
                sizes[i] += step
                room -= step
                progress += step
        if not progress:
            return sizes


CHUNK_POLICIES: dict[str, ChunkPolicy] = {
    "first_come_first_served": first_come_first_served,
    "equal_progress": equal_progress,
}
"""By TensorRT-LLM's names, in lower case."""


class MicroBatchLimits(NamedTuple):
    """The limits of a step."""

    max_num_seqs: int
    max_num_tokens: int
    chunk: ChunkPolicy | None
    """How prompts are cut; None: they are not."""
    chunk_unit: int


def micro_batch(work: Sequence[Work], limits: MicroBatchLimits) -> list[tuple[int, int]]:
    """Return (request, tokens) of a step.

    In order, until the first that the tokens do not suffice for. Prompts that can be cut are served from what the others leave.
    """
    chosen: list[tuple[int, int]] = []
    prompts: list[Work] = []
    room = limits.max_num_tokens
    for each in work[: limits.max_num_seqs]:
        if each.is_context and limits.chunk is not None:
            prompts.append(each)
            continue
        if each.num_tokens > room:
            break
        chosen.append((each.request, each.num_tokens))
        room -= each.num_tokens
    left = [each.num_tokens for each in prompts]
    if limits.chunk is not None and sum(left) > room:
        left = limits.chunk(left, room, limits.chunk_unit)
    return chosen + [(each.request, size) for each, size in zip(prompts, left, strict=True) if size]
