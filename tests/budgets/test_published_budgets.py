"""Budgets against runs that somebody made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_budgets import GIB, NEMOTRON_3_5_LIGHTNING, plan, plan_memory

from pagedkv.activation_peak import activation_bytes
from pagedkv.catalogue import load_hardware, load_model
from pagedkv.weight_format import WeightFormat


def test_a_real_run_on_an_rtx_4090(shared_data: Path) -> None:
    meta = json.loads((shared_data / "vllm_rtx4090_llama31_8b" / "meta.json").read_text(encoding="utf-8"))
    kwargs, kv = meta["engine_kwargs"], meta["kv_cache"]
    assert load_hardware("rtx-4090").visible_bytes == meta["hardware"]["device_total_memory_bytes"]
    chosen = {name: kwargs[name] for name in ("kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")}
    chosen |= {"block_size": kv["block_size"], "gpu_memory_utilization": kv["gpu_memory_utilization"]}
    assert plan(kwargs["model"], "rtx-4090", **chosen).num_blocks == pytest.approx(kv["num_gpu_blocks"], rel=0.03)
    # vLLM 0.19 did not yet set CUDA graphs aside.
    without_graphs = plan(kwargs["model"], "rtx-4090", enforce_eager=True, **chosen)
    assert without_graphs.num_blocks == pytest.approx(kv["num_gpu_blocks"], rel=0.002)
    overhead = without_graphs.requested - without_graphs.weights - without_graphs.kv_cache
    assert overhead / 1e9 == pytest.approx(1.24, abs=0.01)


@pytest.mark.parametrize(
    ("model", "hardware", "utilization", "kv_gib"),
    [
        ("llama-3.1-8b", "h100", 0.90, 51.38),  # llm-d-benchmark, empirical-vllm-memory-results.md
        ("gpt-oss-20b", "h100", 0.90, 50.28),  # the same
        ("gpt-oss-20b", "a100-80gb", 0.65, 36.56),  # myoceane.fr, vLLM 0.19.0
    ],
)
def test_published_sizes_of_the_kv_cache(model: str, hardware: str, utilization: float, kv_gib: float) -> None:
    budget = plan(model, hardware, gpu_memory_utilization=utilization)
    assert budget.kv_cache / GIB == pytest.approx(kv_gib, rel=0.03)


@pytest.mark.parametrize(("utilization", "kv_gb"), [(0.80, 75), (0.91, 88)])
def test_kv_left_by_nemotron_on_a_spark(utilization: float, kv_gb: int) -> None:
    # Its weights take 21.5 GB, so the stand-in's bits are those that make them so: 5.45 each, wide layers included.
    bits = 21.5e9 * 8 / NEMOTRON_3_5_LIGHTNING.params_total
    weights = WeightFormat(
        name="nvfp4", bits_per_weight=bits, wide_bits=16, head_bits=bits, embedding_bits=bits, compute_dtype="fp4", source="21.5 GB"
    )
    spark = load_hardware("dgx-spark")
    budget = plan_memory(
        NEMOTRON_3_5_LIGHTNING,
        spark,
        weight_format=weights,
        kv_cache_dtype="auto",
        block_size=16,
        max_model_len=32_768,
        max_num_seqs=spark.default_max_num_seqs,
        max_num_batched_tokens=spark.default_max_num_batched_tokens,
        gpu_memory_utilization=utilization,
    )
    assert budget.weights == pytest.approx(21.5e9, rel=1e-6)
    assert budget.kv_bytes_per_token == 6144
    assert budget.kv_cache / 1e9 == pytest.approx(kv_gb, abs=2)
    assert bool(budget.warnings) is (utilization > 0.9), "at 0.91 its owner had about 1 GB left"


def test_overheads_on_a_spark_are_those_of_published_runs() -> None:
    for name in ("llama-3.1-8b", "qwen2.5-7b", "gpt-oss-20b"):
        budget = plan(name)
        overhead = budget.engine_overhead + budget.activations + budget.cuda_graphs
        assert 7.9e9 <= overhead <= 9.4e9, "8.0 and 9.4 GB beyond weights and KV"
    assert budget.requested / GIB == pytest.approx(97.35, abs=0.01)


@pytest.mark.parametrize(("tokens", "peak_gib"), [(2048, 1.39), (8224, 5.30)])
def test_activations_of_a_mixture_grow_as_measured_on_a_spark(tokens: int, peak_gib: float) -> None:
    deepseek_v4_flash = replace(load_model("gpt-oss-20b"), hidden_size=4096, vocab_size=129_280)
    peak = activation_bytes(deepseek_v4_flash, max_num_batched_tokens=tokens, max_num_seqs=1)
    assert peak / GIB == pytest.approx(peak_gib, rel=0.07)


def test_qwen_with_16_gib_of_kv_has_the_blocks_of_the_vllm_log() -> None:
    budget = plan("qwen2.5-7b", kv_cache_memory_bytes=16 * GIB)
    assert (budget.num_blocks, budget.num_kv_tokens, budget.usable_blocks) == (18_724, 299_584, 18_723)


def test_opt_13b_on_an_a100_has_the_slots_of_the_paged_attention_paper() -> None:
    assert plan("opt-13b", "a100-40gb", block_size=1, kv_cache_memory_bytes=12 * GIB).num_kv_tokens == 15_728
    assert plan("opt-13b", "a100-40gb").kv_cache / GIB == pytest.approx(12, rel=0.1)
