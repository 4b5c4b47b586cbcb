"""TensorRT-LLM's scheduler: who is in a step, and in what chunks."""

from steps import add, advance
from tensorrt_llm_scheduling import scheduler

from pagedkv.scheduling.micro_batch import (
    EQUAL_PROGRESS,
    FIRST_COME_FIRST_SERVED,
    WHOLE,
    MicroBatch,
    MicroBatchLimits,
    choose_entries,
)

Work = tuple[int, int, bool]
"""(request, its tokens, whether it is a prompt)."""


def micro_batch(work: list[Work], limits: MicroBatchLimits) -> list[tuple[int, int]]:
    """(request, tokens) of a step."""
    batch = MicroBatch.empty(len(work))
    for kept, values in zip((batch.requests, batch.num_tokens, batch.is_context), zip(*work, strict=True), strict=True):
        kept[:] = values
    number = choose_entries(batch, len(work), limits)
    return list(zip(batch.requests[batch.chosen[:number]].tolist(), batch.sizes[:number].tolist(), strict=True))


def test_without_chunks_a_prompt_that_exceeds_the_step_ends_it() -> None:
    work = [(0, 1, False), (1, 6, True), (2, 5, True), (3, 1, False)]
    assert micro_batch(work, MicroBatchLimits(8, 10, WHOLE, 4)) == [(0, 1), (1, 6)]  # nor does request 3 run
    assert micro_batch(work, MicroBatchLimits(1, 10, WHOLE, 4)) == [(0, 1)]


def test_chunks_are_whole_blocks_unless_they_end_a_prompt() -> None:
    work = [(0, 9, True), (1, 1, False), (2, 9, True)]
    assert micro_batch(work, MicroBatchLimits(8, 16, FIRST_COME_FIRST_SERVED, 4)) == [(1, 1), (0, 9), (2, 4)]
    assert micro_batch(work, MicroBatchLimits(8, 11, FIRST_COME_FIRST_SERVED, 4)) == [(1, 1), (0, 9)]
    assert micro_batch(work, MicroBatchLimits(8, 11, EQUAL_PROGRESS, 4)) == [(1, 1), (0, 4), (2, 4)]
    assert micro_batch(work, MicroBatchLimits(8, 19, EQUAL_PROGRESS, 4)) == [(1, 1), (0, 9), (2, 9)]
    assert micro_batch(work, MicroBatchLimits(8, 4, FIRST_COME_FIRST_SERVED, 4)) == [(1, 1)]


def test_a_prompt_longer_than_a_step_needs_chunks() -> None:
    assert add(scheduler(num_blocks=100, max_num_batched_tokens=8), (9, 1), (8, 1)) == [None, 0]
    one = scheduler(num_blocks=100, max_num_batched_tokens=8, enable_chunked_prefill=True)
    add(one, (9, 1), (8, 1))
    assert [advance(one) for _ in range(3)] == [[(0, 8)], [(0, 1), (1, 4)], [(1, 4)]]
