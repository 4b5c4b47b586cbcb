"""TensorRT-LLM's scheduler: requests that share a prefix, at once or one after the other."""

import numpy as np
import pytest
from steps import add, advance
from tensorrt_llm_scheduling import iterations, scheduler

from pagedkv.scheduling.content import shared_segments
from pagedkv.scheduling.tensorrt_llm_scheduler import TensorRTLLMScheduler


def with_prefix(to: TensorRTLLMScheduler, stream: int, shared: int, prompt: int, output: int) -> None:
    content = shared_segments(np.array([stream]), np.array([shared]))
    to.add(prompt_tokens=prompt, output_tokens=output, content=content)


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
def test_a_request_waits_a_step_for_the_block_that_another_one_fills(policy: str) -> None:
    """ "a context request whose first new block is being produced by another context request this step is delayed one step"."""
    one = scheduler(num_blocks=100, caching=True, capacity_policy=policy)
    with_prefix(one, 7, 8, 12, 3)
    with_prefix(one, 7, 8, 12, 3)
    with_prefix(one, 9, 8, 12, 3)  # another stream: it does not wait, and overtakes
    assert advance(one) == [(0, 12), (2, 12)]
    assert advance(one) == [(0, 1), (2, 1), (1, 4)]  # 8 of its tokens are found
    assert one.requests.arrays["num_cached_tokens"][:3].tolist() == [0, 8, 0]
    assert one.shared_slots == 8


def test_a_static_batch_delays_nobody() -> None:
    """The delay is part of the other two policies."""
    one = scheduler(num_blocks=100, caching=True, capacity_policy="static_batch")
    with_prefix(one, 7, 8, 12, 3)
    with_prefix(one, 7, 8, 12, 3)
    assert advance(one) == [(0, 12), (1, 12)]


def test_a_chunk_in_progress_delays_who_would_fill_the_same_block() -> None:
    """A prompt that is half computed produces blocks as well."""
    one = scheduler(num_blocks=100, caching=True, enable_chunked_prefill=True, max_num_batched_tokens=12)
    with_prefix(one, 7, 16, 20, 3)
    with_prefix(one, 7, 16, 20, 3)
    assert advance(one) == [(0, 12)]
    assert advance(one) == [(0, 8)]  # 4 tokens of the step are left, but request 0 fills the block that they would go to
    assert advance(one) == [(0, 1), (1, 4)]  # 16 of its tokens are found


def test_hits_are_counted_in_tokens_up_to_the_last_but_one() -> None:
    """ "Partial reuse: longest common prefix inside a block counts". "Prompt hit ≤ len−1"."""
    one = scheduler(num_blocks=100, caching=True)
    with_prefix(one, 7, 14, 12, 3)
    iterations(one)
    assert one.cached_slots == 16
    with_prefix(one, 7, 14, 14, 1)
    assert advance(one) == [(1, 1)]
    assert one.requests.arrays["num_cached_tokens"][1] == 13


def test_a_paused_request_finds_what_is_not_evicted() -> None:
    """ "recompute, with reuse if enabled"."""
    one = scheduler(num_blocks=7, capacity_policy="max_utilization", caching=True)
    add(one, (8, 9), (8, 9))
    while not one.preempted.size:
        advance(one)
    known = int(one.requests.arrays["num_known_tokens"][1])
    while not one.requests.arrays["row"][1] >= 0:
        advance(one)
    assert one.requests.arrays["num_hit_tokens"][1] > 0
    assert one.requests.arrays["num_queried_tokens"][1] == 8 + known
