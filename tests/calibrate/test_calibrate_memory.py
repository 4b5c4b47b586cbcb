"""A start-up log of vLLM: what it took beside weights and KV, and that the ledger then comes to the same blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pagedkv.errors import ConfigError
from pagedkv.memory_budget import MemoryBudget
from pagedkv.sims.calibrate.memory import MemoryFound, memory_of
from pagedkv.sims.calibrate.study import CalibrationStudy, calibrate
from pagedkv.sims.calibrate.subject import subject_of
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy, memory_request
from pagedkv.sims.measurements import StartUp
from pagedkv.units import GIB

DATE = "2026-11-29"
QWEN = ServingConfig(
    model="qwen2.5-7b", max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=16_384, gpu_memory_utilization=0.8
)
LOG = """\
INFO [core.py:93] Initializing a V1 LLM engine (v{version}) with config: model='{model}', quantization=None, enforce_eager={eager}
INFO [scheduler.py:216] Chunked prefill is enabled with max_num_batched_tokens=2048.
INFO [gpu_model_runner.py:4879] Model loading took {weights} GiB memory and 17.657031 seconds
INFO [gpu_model_runner.py:5993] Estimated CUDA graph memory: 0.73 GiB total
INFO [gpu_worker.py:440] Available KV cache memory: {kv} GiB
INFO [kv_cache_utils.py:1305] GPU KV cache size: {tokens} tokens
"""
USUAL = {
    "version": "0.33.0",
    "model": "Qwen/Qwen2.5-7B",
    "eager": "False",
    "weights": "14.25",
    "kv": "76.91",
    "tokens": "1,440,096",
}


def log_file(tmp_path: Path, **changes: str) -> Path:
    path = tmp_path / "server.log"
    path.write_text(LOG.format(**USUAL | changes))
    return path


def study(serving: ServingConfig, *paths: Path) -> CalibrationStudy:
    return calibrate(serving, paths, date=DATE, name="mine.toml")


def found(serving: ServingConfig, log: StartUp) -> MemoryFound:
    return memory_of(subject_of(serving, ()), log, date=DATE)


def test_the_ledger_comes_to_the_blocks_of_the_log(tmp_path: Path) -> None:
    calibrated = study(QWEN, log_file(tmp_path))
    assert calibrated.speed is None
    memory = calibrated.memory
    assert memory is not None
    assert (memory.logged_blocks, memory.exact, memory.blocks_after) == (90_006, True, 90_006)
    assert memory.blocks_before != 90_006
    assert memory.changed == ("engine_overhead", "cuda_graphs")
    path = tmp_path / "mine.toml"
    path.write_text(calibrated.toml())
    deployment = deploy(replace(QWEN, hardware=str(path)))
    assert deployment.budget.num_blocks == 90_006
    assert deployment.budget.cuda_graphs == round(0.73 * GIB)
    assert deployment.hardware.engine_overhead.tag == "measured"
    assert deployment.hardware.engine_overhead.source.startswith(f"{tmp_path}/server.log, {DATE}: 90,006 blocks of 16")


def test_a_real_run_comes_to_its_2588_blocks(shared_data: Path, tmp_path: Path) -> None:
    serving = ServingConfig(hardware="rtx-4090", model="llama-3.1-8b", engine="vllm@0.19")
    calibrated = study(serving, shared_data / "vllm_rtx4090_llama31_8b")
    assert calibrated.memory is not None
    assert (calibrated.memory.blocks_before, calibrated.memory.blocks_after) == (2586, 2588)
    path = tmp_path / "mine.toml"
    path.write_text(calibrated.toml())
    budget = deploy(replace(calibrated.subject.serving, hardware=str(path))).budget
    assert (budget.num_blocks, budget.num_kv_tokens) == (2588, 41_408)


@given(
    blocks=st.integers(20_000, 92_000),
    seqs=st.sampled_from([16, 64, 256]),
    tokens=st.sampled_from([2048, 8192]),
    eager=st.booleans(),
    version=st.sampled_from(["vllm", "vllm@0.19"]),
)
@examples(max_examples=30)
def test_any_number_of_blocks_is_met_whatever_the_settings(blocks: int, seqs: int, tokens: int, eager: bool, version: str) -> None:
    serving = replace(QWEN, max_num_seqs=seqs, max_num_batched_tokens=tokens, enforce_eager=eager, engine=version)
    memory = found(serving, StartUp(where="log", num_blocks=blocks, block_size=16))
    assert (memory.blocks_after, memory.exact) == (blocks, True)
    outcome = replace(memory_request(serving), hardware=memory.hardware).attempt()
    assert isinstance(outcome, MemoryBudget)
    assert outcome.num_blocks == blocks
    assert sum(outcome.parts.values()) == outcome.visible


@given(kv_gib=st.floats(20, 80))
@examples(max_examples=20)
def test_a_size_alone_is_met_within_its_last_digit(kv_gib: float) -> None:
    size = round(kv_gib, 2)
    memory = found(QWEN, StartUp(where="log", kv_bytes=round(size * GIB), kv_bytes_digit=GIB // 100))
    block_bytes = memory_request(QWEN).block_bytes
    assert not memory.exact
    assert abs(memory.blocks_after * block_bytes - size * GIB) <= block_bytes


def test_layers_that_cache_differently_are_told_by_their_size() -> None:
    """vLLM's tokens of such a model are derived: only the size counts."""
    gemma = ServingConfig(model="gemma-3-27b", quantization="fp8", max_num_seqs=64, gpu_memory_utilization=0.8)
    with pytest.raises(ConfigError, match=r"layers that cache differently.*Available KV cache memory"):
        found(gemma, StartUp(where="log", kv_tokens=400_000))
    memory = found(gemma, StartUp(where="log", kv_tokens=400_000, kv_bytes=60 * GIB, kv_bytes_digit=GIB // 100))
    assert memory.blocks_after == 60 * GIB // memory_request(gemma).block_bytes


def test_a_share_that_the_log_does_not_name_is_vllms_own(tmp_path: Path) -> None:
    unnamed = replace(QWEN, gpu_memory_utilization=None)
    calibrated = study(unnamed, log_file(tmp_path, kv="91.50", tokens="1,713,280"))
    assert calibrated.subject.serving.gpu_memory_utilization == 0.92
    assert any("vLLM's default, 0.92" in note for note in calibrated.notes)


def test_what_was_loaded_is_compared_with_the_weights(tmp_path: Path) -> None:
    memory = study(QWEN, log_file(tmp_path)).memory
    assert memory is not None
    assert any("the difference is in the overhead" in note for note in memory.notes)


@pytest.mark.parametrize(
    ("serving", "changes", "complaint"),
    [
        ({"model": "llama-3.1-8b"}, {}, "is of Qwen/Qwen2.5-7B, and --model is llama-3.1-8b: give --model Qwen/Qwen2.5-7B"),
        ({"engine": "vllm@0.19"}, {}, "is of vLLM 0.33.0, and --engine vllm@0.19 is 0.19.*give --engine vllm"),
        ({}, {"version": "0.19.0"}, "is of vLLM 0.19.0, and --engine vllm is 0.33.*give --engine vllm@0.19"),
        ({}, {"version": "0.7.3"}, "versions before 0.8 are not modelled"),
        ({"engine": "sglang"}, {}, "is of vllm, and --engine is sglang"),
        ({}, {"weights": "7.60"}, "loaded 7.60 GiB, and Qwen2.5 7B in bf16 takes 14.19 GiB"),
        ({"quantization": "fp8"}, {}, "loaded 14.25 GiB, and Qwen2.5 7B in fp8 takes"),
        ({"kv_cache_dtype": "fp8"}, {}, "28,672: give the --model and the --kv-cache-dtype"),
        ({"max_num_batched_tokens": 8192}, {}, "--max-num-batched-tokens is 8192, and .*says 2048"),
        ({"enforce_eager": True}, {}, "--enforce-eager is True, and .*says False"),
        ({"hardware": "h100"}, {}, "less than the 15.2. GiB that vllm's weights"),
        ({"gpu_memory_utilization": 0.7}, {}, "is it --model qwen2.5-7b with bf16 weights"),
        ({"num_gpu_blocks_override": 500}, {}, "sized by hand"),
        ({"other_programs": "30GiB"}, {}, "asks for 97.35 GiB, but only .*it did start, so give --free-memory"),
    ],
)
def test_a_log_of_something_else_is_refused(
    tmp_path: Path, serving: dict[str, Any], changes: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        study(replace(QWEN, **serving), log_file(tmp_path, **changes))


def test_two_logs_are_one_too_many(tmp_path: Path) -> None:
    path = log_file(tmp_path)
    with pytest.raises(ConfigError, match="both start-up logs"):
        study(QWEN, path, path)


def test_another_machine_is_refused_by_its_memory_or_its_name(shared_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"saw 79.18 GiB of memory, and --hardware dgx-spark has 121.69"):
        found(QWEN, StartUp(where="log", num_blocks=50_000, visible_bytes=round(79.18 * GIB)))
    with pytest.raises(ConfigError, match="is of 'NVIDIA GeForce RTX 4090', and --hardware dgx-spark"):
        study(replace(QWEN, model="llama-3.1-8b", engine="vllm@0.19"), shared_data / "vllm_rtx4090_llama31_8b")
    seen = found(QWEN, StartUp(where="log", num_blocks=80_000, visible_bytes=round(119.70 * GIB)))
    assert "visible" in seen.changed
    assert seen.hardware.visible_bytes == round(119.70 * GIB)
