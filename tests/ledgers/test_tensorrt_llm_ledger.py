"""TensorRT-LLM's share of what is left."""

import pytest
from asked_budgets import MIB, budget

from pagedkv.errors import ConfigError


def test_tensorrt_llm_takes_a_share_of_what_is_left() -> None:
    divided = budget("tensorrt-llm", hardware="h100")
    left = divided.free_at_start - divided.weights - divided.engine_overhead - divided.activations
    assert divided.num_blocks == divided.usable_blocks == int(0.9 * left) // divided.block_bytes
    assert divided.block_size == 32
    assert budget("tensorrt-llm", hardware="h100", max_tokens=1_000_001).num_blocks == min(31_251, divided.num_blocks)
    assert budget("tensorrt-llm", hardware="h100", max_tokens=10_001).num_blocks == 313


def test_tensorrt_llm_must_leave_room_for_graphs() -> None:
    with pytest.raises(ConfigError, match=r"of KV cache at --free-gpu-memory-fraction 1\."):
        budget("tensorrt-llm", hardware="h100", free_gpu_memory_fraction=1.0)
    assert budget("tensorrt-llm", hardware="h100", free_gpu_memory_fraction=1.0, enforce_eager=True).unassigned < 4 * MIB
