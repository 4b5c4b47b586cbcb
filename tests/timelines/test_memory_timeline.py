"""Memory over time, from before the start until an engine serves: what owners of a Spark have seen."""

from dataclasses import replace
from typing import Any

import pytest
from starts import WARM, kinds, phase, request, timeline

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import Figure
from pagedkv.memory_request import MemoryRequest
from pagedkv.start_timeline import memory_timeline
from pagedkv.start_up import COMPILE_PEAK_BYTES, StartOptions
from pagedkv.timeline_advice import advise_start
from pagedkv.units import GIB
from pagedkv.weight_format import WeightFormat


@pytest.mark.parametrize(
    ("utilization", "asked", "starts"),
    [
        (0.94, "114.39", False),
        (0.92, "111.95", False),
        (0.87, "105.87", False),
        (0.85, "103.44", False),
        (0.83, "101.00", True),
        (0.80, "97.35", True),
    ],
)
@pytest.mark.parametrize("free_gib", [101.3, 102.2])
def test_the_start_gate_with_what_some_machines_have_free(utilization: float, asked: str, free_gib: float, *, starts: bool) -> None:
    told = timeline(WARM, gpu_memory_utilization=utilization, free_memory=f"{free_gib}GiB")
    start = phase(told, "start")
    assert (start.verdict.kind != "refused") is starts
    if not starts:
        assert [each.name for each in told.phases] == ["idle", "start"]
        assert f"asks for {asked} GiB" in start.verdict.text
        assert "0.83 is the highest that starts" in start.verdict.text
        assert told.least_blocks is None
    # 0.83, and 0.80 too, start there and leave the host less than its floor; what is advised instead does not.
    assert told.worst.verdict.kind == ("dangerous" if starts else "refused")
    advice = advise_start(told)
    assert advice is not None
    assert advice.solved


def test_a_headless_spark_starts_at_094_and_nothing_is_known_to_start_above() -> None:
    told = timeline(WARM, gpu_memory_utilization=0.94)
    assert phase(told, "start").verdict.kind == "ok"
    assert phase(told, "serving").verdict.kind == "dangerous"
    with pytest.raises(ConfigError, match=r"0\.94, the highest"):
        timeline(WARM, gpu_memory_utilization=0.95)


@pytest.mark.parametrize(("os_gib", "free_gib"), [(4, 117.69), (7, 114.69)])
def test_what_is_free_before_the_start(os_gib: int, free_gib: float) -> None:
    idle = phase(timeline(os_reserve=f"{os_gib}GiB"), "idle").end
    assert idle.mem_available / GIB == pytest.approx(free_gib, abs=0.01), "about 117 headless, 114.5 with a desktop"


def nemotron(utilization: float) -> MemoryRequest:
    """Nemotron-3.5-Lightning NVFP4, whose weights take 21.5 GB; its shape is that of the Nano of the catalogue."""
    model = load_model("nemotron-3-nano-30b-a3b")
    bits = 21.5e9 * 8 / model.params_total
    same = {"bits_per_weight": bits, "wide_bits": bits, "head_bits": bits, "embedding_bits": bits}
    weights = WeightFormat(name="nvfp4", **same, compute_dtype="fp4", source="21.5 GB")
    asked = request(model="nemotron-3-nano-30b-a3b", quantization="nvfp4", gpu_memory_utilization=utilization)
    return replace(asked, weight_format=weights)


@pytest.mark.parametrize(("utilization", "kv_gb", "kind"), [(0.80, 75, "ok"), (0.91, 88, "dangerous")])
def test_nemotron_is_served_at_080_and_endangers_the_host_at_091(utilization: float, kv_gb: int, kind: str) -> None:
    told = memory_timeline(nemotron(utilization), WARM)
    serving = phase(told, "serving")
    assert serving.end.parts["kv_cache"] / 1e9 == pytest.approx(kv_gb, abs=2)
    assert serving.verdict.kind == kind
    beside = sum(serving.end.parts[part] for part in ("engine_overhead", "activations", "cuda_graphs"))
    assert 7.8e9 <= beside <= 9.4e9, "8.0 and 9.4 GB were seen"
    if kind == "dangerous":
        advice = advise_start(told)
        assert advice is not None
        assert advice.timeline.tightest.worst.mem_available >= 8 * GIB
        assert advice.settings == ("--gpu-memory-utilization 0.9",)


@pytest.mark.parametrize(("tokens", "peak_gib"), [(2048, 1.39), (8224, 5.30)])
def test_the_trial_step_takes_the_activation_peak(tokens: int, peak_gib: float) -> None:
    deepseek_v4_flash = replace(load_model("gpt-oss-20b"), hidden_size=4096, vocab_size=129_280)
    told = memory_timeline(replace(request(max_num_batched_tokens=tokens, max_num_seqs=1), model=deepseek_v4_flash), WARM)
    profile = phase(told, "profile")
    assert profile.worst.parts["activations"] / GIB == pytest.approx(peak_gib, rel=0.07)
    assert profile.end.mem_available - profile.worst.mem_available == profile.worst.parts["activations"]


def freeze_case(hardware: str) -> MemoryRequest:
    """vLLM issue 46307: Gemma 4 26B-A4B in bf16, utilization 0.70, on a Spark whose driver shows 119.7 GiB."""
    asked = request(hardware=hardware, model="gemma-4-26b-a4b", gpu_memory_utilization=0.70)
    if hardware == "dgx-spark":
        visible = Figure(119.7 * GIB, "measured", "an older driver")
        asked = replace(asked, hardware=replace(asked.hardware, visible=visible))
    return asked


def test_the_start_that_froze_a_host_at_utilization_070_is_dangerous() -> None:
    told = memory_timeline(freeze_case("dgx-spark"))
    profile = phase(told, "profile")
    assert told.worst is profile
    assert profile.verdict.kind == "dangerous"
    assert profile.worst.parts["weights"] / GIB == pytest.approx(48, abs=1.2)
    in_use = told.request.hardware.visible_bytes - profile.worst.mem_available
    assert in_use / GIB == pytest.approx(112, rel=0.06), "seen: 112 of 119 GiB"
    promised = 0.70 * told.request.hardware.visible_bytes
    assert in_use > promised, "utilization is no bound while a start compiles"
    assert phase(told, "serving").verdict.kind == "ok", "which no steady-state formula shows"


def test_what_is_advised_for_it_avoids_it_and_utilization_does_not() -> None:
    told = memory_timeline(freeze_case("dgx-spark"))
    advice = advise_start(told)
    assert advice is not None
    assert advice.solved
    jobs = advice.timeline.options.compile_jobs
    assert jobs is not None
    assert f"MAX_JOBS={jobs}" in advice.settings
    one_more = memory_timeline(advice.timeline.request, replace(advice.timeline.options, compile_jobs=jobs + 1))
    assert phase(one_more, "profile").verdict.kind == "dangerous", "the advice asks for no more than is needed"
    lower = replace(told.request, ledger=replace(told.request.ledger, gpu_memory_utilization=0.6))  # type: ignore[type-var]
    assert phase(memory_timeline(lower), "profile").verdict.kind == "dangerous"


def test_the_same_start_on_a_card_of_96_gb_goes_well() -> None:
    told = memory_timeline(freeze_case("rtx-pro-6000"))
    assert told.worst.verdict.kind == "ok", "as its owner says: compilers and page cache take the host's memory"
    assert "host" in told.notes[0]


def test_a_compiler_s_heap_starves_the_kv_cache_of_vllm() -> None:
    """As in eugr/spark-vllm-docker PR 286: 9.5 GiB instead of more than 40, and all of it with a size that is fixed."""
    kv_bytes = round(41.1 * GIB)
    asked = request(model="qwen3-8b", kv_cache_dtype="fp8")
    others = request(model="qwen3-8b", kv_cache_dtype="fp8", kv_cache_memory_bytes="41.1GiB")
    fixed = memory_timeline(others)
    assert fixed.budget is not None
    engine = fixed.budget.weights + fixed.budget.engine_overhead + fixed.budget.activations + fixed.budget.cuda_graphs
    utilization = (engine + kv_bytes) / asked.hardware.visible_bytes
    told = memory_timeline(replace(asked, ledger=replace(asked.ledger, gpu_memory_utilization=utilization)))  # type: ignore[type-var]
    assert told.budget is not None
    assert told.least_blocks is not None
    assert told.budget.kv_cache / GIB == pytest.approx(41.1, abs=0.01)
    assert told.least_blocks * told.budget.block_bytes / GIB == pytest.approx(9.5, abs=0.01)
    assert kinds(told)["kv_cache"] == "starved"
    assert (fixed.least_blocks, kinds(fixed)["kv_cache"]) == (fixed.budget.num_blocks, "ok")
    assert any("--gpu-memory-utilization" in note for note in fixed.notes), "vLLM checks that all the same"


def test_the_compile_peak_needs_cold_caches_and_a_model_that_is_compiled() -> None:
    def compilers(options: StartOptions = StartOptions(), **serving: Any) -> int:  # noqa: B008
        return phase(timeline(options, **serving), "profile").worst.parts["compilers"]

    assert compilers() == COMPILE_PEAK_BYTES
    assert compilers(enforce_eager=True) == compilers(WARM) == 0
    assert compilers(model="gpt-oss-20b") == 20 * 3 * GIB, "one nvcc for each core of a Spark"
    assert compilers(StartOptions(compile_jobs=5), model="gpt-oss-20b") == 5 * 8 * GIB, "of few, each may be at its peak"
    assert compilers(StartOptions(compile_jobs=3), model="gpt-oss-20b") == COMPILE_PEAK_BYTES
    assert compilers(model="gpt-oss-20b", hardware="strix-halo") == COMPILE_PEAK_BYTES, "without CUDA there is no nvcc"
    assert compilers(model="gpt-oss-20b", hardware="rtx-pro-6000") == 0, "the host's memory"
