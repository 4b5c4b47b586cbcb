"""What does not fit is refused with numbers, and with settings that would fit."""

import math
from dataclasses import replace
from typing import Any

import pytest
from vllm_budgets import GIB, NEMOTRON_3_5_LIGHTNING, plan, plan_memory, suggestions

from pagedkv.catalogue import load_hardware
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import LayerGroup


@pytest.mark.parametrize(
    ("chosen", "first"),
    [
        ({"model": "llama-3.1-70b"}, {"quantization": "fp8"}),
        ({"model": "llama-3.1-70b", "hardware": "h100"}, {"quantization": "nvfp4"}),
        ({"model": "llama-3.1-70b", "hardware": "rtx-4090"}, {"hardware": "b200"}),
        ({"gpu_memory_utilization": 0.15}, {"gpu_memory_utilization": 0.19}),
        ({"hardware": "rtx-4090", "max_model_len": 131_072}, {"max_model_len": 44_240}),
        ({"model": "opt-13b", "hardware": "rtx-4090"}, {"quantization": "fp8"}),
        ({"model": "opt-175b"}, {"hardware": "h200", "quantization": "nvfp4"}),  # int4 at 0.84 holds it, and would freeze the host
    ],
)
def test_what_does_not_fit_is_refused_with_numbers_and_three_ways_out(chosen: dict[str, Any], first: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs [0-9.]+ GiB on .*, but [0-9.]+ GiB are available") as caught:
        plan(**chosen)
    ways_out = suggestions(caught.value)
    assert len(ways_out) == 3
    assert ways_out[0] == first
    for way_out in ways_out:
        assert plan(**{**chosen, **way_out}).num_blocks > 0


def test_the_longest_context_named_is_the_longest_that_fits() -> None:
    with pytest.raises(ConfigError, match="44240 is the longest that fits"):
        plan(hardware="rtx-4090", max_model_len=131_072)
    assert plan(hardware="rtx-4090", max_model_len=44_240).usable_blocks * 16 == 44_240
    with pytest.raises(ConfigError):
        plan(hardware="rtx-4090", max_model_len=44_241)


def test_the_lowest_sufficient_utilization_is_named() -> None:
    with pytest.raises(ConfigError):
        plan(gpu_memory_utilization=0.18)
    assert plan(gpu_memory_utilization=0.19).num_blocks > 0


def test_a_pool_sized_by_hand_must_fit_and_must_hold_one_request() -> None:
    with pytest.raises(ConfigError, match=r"117\.69 GiB are free: .*--kv-cache-memory-bytes 107374182400") as too_large:
        plan(kv_cache_memory_bytes=100 * GIB)
    (key, fitting), *_ = suggestions(too_large.value)[0].items()
    assert key == "kv_cache_memory_bytes"
    block, floor = plan().block_bytes, 8 * GIB
    assert floor <= plan(kv_cache_memory_bytes=fitting).unassigned < floor + block  # less than that, and the host may freeze
    assert plan(kv_cache_memory_bytes=fitting + floor).num_blocks
    with pytest.raises(ConfigError):
        plan(kv_cache_memory_bytes=fitting + floor + block)
    with pytest.raises(ConfigError, match="30 holds 464 tokens beside the null block") as too_small:
        plan(num_gpu_blocks_override=30)
    assert suggestions(too_small.value) == [{"max_model_len": 464}, {"num_gpu_blocks_override": 129}]


def test_a_model_without_attention_is_refused() -> None:
    states = LayerGroup(kind="state", num_layers=52, state_bytes=2**20)
    model = replace(NEMOTRON_3_5_LIGHTNING, layer_groups=(states,))
    with pytest.raises(ConfigError, match="caches only states of fixed size"):
        plan_memory(
            model,
            load_hardware("dgx-spark"),
            weight_format=model.native_format,
            kv_cache_dtype="auto",
            block_size=16,
            max_model_len=2048,
            max_num_seqs=256,
            max_num_batched_tokens=2048,
            gpu_memory_utilization=0.8,
        )


def test_nothing_fits_into_nothing() -> None:
    with pytest.raises(ConfigError, match=r"only 1\.00 GiB of .* are free \(--free-memory\).*What fits: nothing in the catalogue"):
        plan(hardware="rtx-4090", free_memory_bytes=GIB)


def test_a_utilization_above_the_highest_seen_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.95 is above 0\.94, .* use 0\.94 or less"):
        plan(gpu_memory_utilization=0.95)
    assert plan(gpu_memory_utilization=0.94).warnings


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, r"--gpu-memory-utilization 0\.0 must be above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.01}, r"--gpu-memory-utilization 1\.01 must be"),
        ({"gpu_memory_utilization": math.nan}, r"--gpu-memory-utilization nan must be"),
        ({"block_size": 0}, r"--block-size 0 must be at least 1"),
        ({"max_model_len": 0}, r"--max-model-len 0 must be"),
        ({"max_model_len": 131_073}, r"--max-model-len 131073 .* use 131072 or less"),
        ({"max_num_seqs": 0}, r"--max-num-seqs 0 must be"),
        ({"max_num_batched_tokens": -1}, r"--max-num-batched-tokens -1 must be"),
        ({"free_memory_bytes": 200 * GIB}, r"--free-memory 200GiB: needs 0 to 121\.69 GiB"),
        ({"os_reserve_bytes": -1}, r"--os-reserve -1 bytes: needs 0 to"),
        ({"other_programs_bytes": -1}, r"--other-programs -1 bytes: needs 0 to"),
        ({"kv_cache_memory_bytes": -1}, r"--kv-cache-memory-bytes -1 bytes: needs 0 to"),
        ({"num_gpu_blocks_override": 1}, r"--num-gpu-blocks-override 1 must be at least 2"),
        ({"kv_cache_dtype": "fp9"}, r"unknown --kv-cache-dtype 'fp9'"),
        ({"kv_cache_dtype": "q8_0"}, r"--kv-cache-dtype q8_0 is not for this engine: use auto, .*fp8"),
        ({"tensor_parallel_size": 2}, r"--tensor-parallel-size 2: one device is supported so far, use 1"),
    ],
)
def test_values_that_cannot_work_are_named(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**chosen)
