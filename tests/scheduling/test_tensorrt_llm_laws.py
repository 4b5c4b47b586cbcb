"""TensorRT-LLM's scheduler: all of its rules together on random loads, and settings that cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorrt_llm_scheduling import scheduler

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.errors import ConfigError
from pagedkv.reuse_steps import ReuseStepAllocator
from pagedkv.scheduling.capacity_policy import CAPACITY_POLICIES
from pagedkv.scheduling.content import shared_segments
from pagedkv.scheduling.tensorrt_llm_scheduler import TensorRTLLMScheduler, TensorRTLLMSettings


def test_bad_settings_are_refused() -> None:
    for wrong in (
        {"capacity_policy": "no_evict"},
        {"chunk_policy": "fifo"},
        {"max_num_batched_tokens": 0},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 3},
        {"max_model_len": 300},
    ):
        with pytest.raises(ConfigError):
            TensorRTLLMScheduler(
                TensorRTLLMSettings(**{"max_num_seqs": 8, "max_model_len": 256, **wrong}),
                ReuseStepAllocator(
                    TensorRTLLMAllocator(KVPoolSettings(num_blocks=8, block_size=4, max_num_seqs=8, max_model_len=256))
                ),
            )
    with pytest.raises(ConfigError):
        scheduler(num_blocks=8).add(prompt_tokens=0, output_tokens=1)


LENGTHS = st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2), st.integers(0, 3))


@given(
    requests=st.lists(LENGTHS, min_size=1, max_size=12),
    num_blocks=st.integers(2, 20),
    policy=st.sampled_from(sorted(CAPACITY_POLICIES)),
    chunk=st.sampled_from([None, "first_come_first_served", "equal_progress"]),
    caching=st.booleans(),
    late=st.integers(0, 6),
)
def test_all_are_served(
    requests: list[tuple[int, int, int, int]], num_blocks: int, policy: str, chunk: str | None, caching: bool, late: int
) -> None:
    """Whoever is accepted is served, whatever the policy; no policy but MAX_UTILIZATION pauses; when all end, all is free."""
    one = scheduler(
        num_blocks=num_blocks,
        caching=caching,
        capacity_policy=policy,
        enable_chunked_prefill=chunk is not None,
        max_num_batched_tokens=12 if chunk else 60,
        chunk_policy=chunk or "equal_progress",
        max_num_seqs=4,
        max_model_len=60,
    )
    accepted, served, arrivals = 0, 0, list(requests)
    while arrivals or one.num_running or one.num_waiting:
        for prompt, output, priority, stream in [arrivals.pop(0) for _ in range(min(len(arrivals), 12 - late))]:
            content = shared_segments(np.array([stream]), np.array([prompt])) if stream else None
            added = one.add(prompt_tokens=prompt, output_tokens=output, priority=priority, content=content)
            accepted += added is not None
        if not one.num_waiting and not one.num_running:
            continue
        before = one.waiting().tolist()
        step = one.schedule()
        assert step.num_entries > 0
        assert step.batch["num_scheduled_tokens"][: step.num_entries].min() > 0
        assert step.batch["num_scheduled_tokens"][: step.num_entries].sum() <= one.settings.max_num_batched_tokens
        one.check_integrity()
        if policy != "max_utilization":
            assert not one.preempted.size
            if not caching and chunk is None:  # in queue order
                assert before == [*step.batch["request"][step.num_running_before : step.num_entries], *one.waiting()]
        one.complete()
        one.check_integrity()
        served += one.finished.size
        assert one.failed.size == 0
    assert served == accepted
    assert one.allocator.free_slots == one.allocator.usable_slots
