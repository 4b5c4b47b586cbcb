"""TensorRT-LLM's scheduler as its tests make and use it."""

from typing import Any

from steps import advance

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.reuse_steps import ReuseStepAllocator
from pagedkv.scheduling.tensorrt_llm_scheduler import TensorRTLLMScheduler, TensorRTLLMSettings


def scheduler(
    *, num_blocks: int, block_size: int = 4, allocator: str = "tensorrt-llm", caching: bool = False, state: int = 0, **limits: Any
) -> TensorRTLLMScheduler:
    settings = TensorRTLLMSettings(**{"max_num_seqs": 8, "max_model_len": 256, "enable_block_reuse": caching, **limits})
    pool = KVPoolSettings(
        num_blocks=num_blocks + (allocator == "paged"),  # it has a null block
        block_size=block_size,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        enable_prefix_caching=caching,
        state_slots=state,
    )
    own = allocator == "tensorrt-llm"
    return TensorRTLLMScheduler(settings, ReuseStepAllocator(TensorRTLLMAllocator(pool)) if own else PagedStepAllocator(pool))


def iterations(one: TensorRTLLMScheduler) -> int:
    """Steps until all are served; nothing may stand still or fail."""
    steps = 0
    while one.num_running + one.num_waiting:
        assert advance(one)
        steps += 1
    assert one.allocator.free_slots == one.allocator.usable_slots
    return steps
