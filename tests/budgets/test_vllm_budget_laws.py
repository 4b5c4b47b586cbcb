"""What holds of every budget under vLLM's ledger."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_budgets import GIB, SPARK_VISIBLE, plan, suggestions

from pagedkv.catalogue import hardware_names, model_names
from pagedkv.errors import ConfigError
from pagedkv.ledgers.vllm import start_gate
from pagedkv.weight_format import WEIGHT_FORMATS

SETTINGS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(model_names()),
        "hardware": st.sampled_from(hardware_names()),
        "max_model_len": st.integers(1, 2048),
    },
    optional={
        "quantization": st.sampled_from(sorted(WEIGHT_FORMATS)),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8"]),
        "block_size": st.sampled_from([1, 16, 24, 256]),
        "max_num_seqs": st.sampled_from([1, 64, 256, 1024]),
        "max_num_batched_tokens": st.sampled_from([512, 2048, 8192]),
        "gpu_memory_utilization": st.integers(5, 94).map(lambda hundredths: hundredths / 100),
        "enforce_eager": st.booleans(),
        "free_memory_bytes": st.integers(0, 23 * GIB),
        "os_reserve_bytes": st.integers(0, 12 * GIB),
        "other_programs_bytes": st.integers(0, 8 * GIB),
        "kv_cache_memory_bytes": st.integers(0, 20 * GIB),
        "num_gpu_blocks_override": st.integers(2, 4000),
    },
)


@given(chosen=SETTINGS)
@settings(max_examples=400)
def test_eight_parts_sum_to_what_is_visible_or_every_suggestion_fits(chosen: dict[str, Any]) -> None:
    try:
        budget = plan(**chosen)
    except ConfigError as error:
        for suggestion in suggestions(error):
            assert plan(**{**chosen, **suggestion}).usable_blocks > 0
        return
    assert sum(budget.parts.values()) == budget.visible
    assert len(budget.parts) == 8
    assert all(size >= 0 for size in budget.parts.values())
    assert budget.kv_cache == budget.num_blocks * budget.block_bytes
    assert budget.usable_blocks * budget.block_size >= chosen["max_model_len"]
    by_hand = "kv_cache_memory_bytes" in chosen or "num_gpu_blocks_override" in chosen
    if not by_hand:
        engine = sum(budget.parts[part] for part in ("weights", "engine_overhead", "activations", "cuda_graphs"))
        assert 0 <= budget.requested - engine - budget.kv_cache < budget.block_bytes
        assert start_gate(visible=budget.visible, free=budget.free_at_start, utilization=budget.utilization)


@given(hundredths=st.integers(20, 93), model=st.sampled_from(["llama-3.1-8b", "qwen2.5-7b", "gpt-oss-20b"]))
def test_more_utilization_gives_more_blocks(hundredths: int, model: str) -> None:
    budgets = [plan(model, gpu_memory_utilization=h / 100) for h in (hundredths, hundredths + 1)]
    gained = budgets[1].kv_cache - budgets[0].kv_cache
    assert gained == pytest.approx(SPARK_VISIBLE / 100, abs=budgets[0].block_bytes + 1)


def test_eager_mode_saves_the_graphs() -> None:
    graphs, eager = plan(), plan(enforce_eager=True)
    assert graphs.cuda_graphs / GIB == pytest.approx(1.7)
    assert eager.cuda_graphs == 0
    assert eager.kv_cache > graphs.kv_cache


def test_an_override_replaces_the_number_of_blocks() -> None:
    budget = plan(num_gpu_blocks_override=1000, kv_cache_memory_bytes=50 * GIB)
    assert (budget.num_blocks, budget.kv_cache) == (1000, 1000 * budget.block_bytes)
