"""Memory over time: what owners of a Spark have seen, and laws of every timeline."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import Figure
from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import TIMELINE_PARTS, VERDICTS, MemoryPhase, MemoryTimeline
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import Deployment, deploy, memory_request
from pagedkv.start_timeline import memory_timeline
from pagedkv.start_up import COMPILE_PEAK_BYTES, Guest, StartOptions
from pagedkv.timeline_advice import advise_start
from pagedkv.units import GIB
from pagedkv.weight_format import WeightFormat

WARM = StartOptions(warm_compile_caches=True)


def request(**serving: Any) -> MemoryRequest:
    return memory_request(ServingConfig(**serving))


def timeline(options: StartOptions = StartOptions(), **serving: Any) -> MemoryTimeline:  # noqa: B008
    return memory_timeline(request(**serving), options)


def phase(of: MemoryTimeline, name: str) -> MemoryPhase:
    found = of.phase(name)
    assert found is not None, name
    return found


def kinds(of: MemoryTimeline) -> dict[str, str]:
    return {phase.name: phase.verdict.kind for phase in of.phases}


# --- what owners of a Spark have seen -------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("direct_io", "seen_s", "within"), [(False, 110, 0.06), (True, 10.5, 0.25)])
def test_loading_gpt_oss_120b_takes_what_it_took(*, direct_io: bool, seen_s: float, within: float) -> None:
    told = timeline(StartOptions(direct_io=direct_io), engine="llama-cpp", model="gpt-oss-120b", ctx_size=32_768)
    assert phase(told, "loading").seconds == pytest.approx(seen_s, rel=within), "ggml-org/llama.cpp PR 18012"


def test_page_cache_lowers_mem_free_and_not_mem_available() -> None:
    mapped, direct = (
        phase(timeline(StartOptions(drops_caches=dropped), engine="sglang"), "loading").worst for dropped in (False, True)
    )
    assert mapped.mem_available == direct.mem_available
    assert direct.mem_free - mapped.mem_free == mapped.parts["page_cache"] == request().weight_bytes


def test_the_page_cache_of_a_file_of_half_the_memory_crowds_loading() -> None:
    told = timeline(WARM, model="gpt-oss-120b")
    assert kinds(told)["loading"] == "crowded"
    assert kinds(memory_timeline(told.request, replace(WARM, drops_caches=True)))["loading"] == "ok"
    assert kinds(timeline(WARM, model="gpt-oss-20b"))["loading"] == "ok"


def test_tensorrt_llm_takes_its_share_of_mem_free() -> None:
    told = timeline(engine="tensorrt-llm", free_gpu_memory_fraction=0.8)
    assert told.budget is not None
    assert told.least_blocks is not None
    lost = (told.budget.num_blocks - told.least_blocks) * told.budget.block_bytes
    assert lost == pytest.approx(0.8 * told.request.weight_bytes, abs=2 * told.budget.block_bytes)
    assert told.start.reads == "MemFree"
    dropped = memory_timeline(told.request, StartOptions(drops_caches=True))
    assert dropped.least_blocks == told.budget.num_blocks


def test_a_model_that_comes_and_goes() -> None:
    guest = Guest(name="an embedder", num_bytes=14 * GIB, during="serving")
    told = timeline(replace(WARM, guests=(guest,)))
    beside, serving = phase(told, "guest"), phase(told, "serving")
    assert beside.verdict.kind == "dangerous"
    assert serving.worst.mem_available - beside.worst.mem_available == guest.num_bytes
    assert beside.end == serving.end, "it has gone"
    advice = advise_start(told)
    assert advice is not None
    assert advice.solved
    assert advice.timeline.tightest.worst.mem_available >= 8 * GIB


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_who_comes_while_an_engine_measures_is_missing_in_its_kv_cache(engine: str) -> None:
    guest = Guest(name="an embedder", num_bytes=14 * GIB, during="loading")
    told = timeline(replace(WARM, guests=(guest,)), engine=engine)
    assert told.budget is not None
    assert told.least_blocks is not None
    lost = (told.budget.num_blocks - told.least_blocks) * told.budget.block_bytes
    assert lost == pytest.approx(guest.num_bytes, abs=2 * told.budget.block_bytes), "vLLM issue 35920"
    assert phase(told, "kv_cache").end.parts["guests"] == 0


def test_a_tier_in_the_processor_s_memory_frees_nothing() -> None:
    tier = StartOptions(warm_compile_caches=True, host_tier_bytes=16 * GIB)
    told, without = timeline(tier), timeline(WARM)
    assert told.budget == without.budget, "no block more"
    assert phase(without, "serving").end.mem_available - phase(told, "serving").end.mem_available == 16 * GIB
    assert "frees nothing" in told.notes[0]
    assert f"{16 * GIB // told.request.block_bytes:,} blocks more" in told.notes[0]
    card = timeline(tier, hardware="rtx-4090", quantization="fp8")
    assert phase(card, "serving").end.parts["host_tier"] == 0
    assert any("memory gained" in note for note in card.notes)


def test_llama_server_comes_to_keep_old_prompts_in_the_same_memory() -> None:
    asked = request(engine="llama-cpp", model="qwen3-8b", ctx_size=32_768)
    serving = phase(memory_timeline(asked), "serving")
    assert serving.end.mem_available - serving.worst.mem_available == 8 * GIB
    off = phase(memory_timeline(asked, StartOptions(host_cache_bytes=0)), "serving")
    assert off.end == off.worst


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "serving", "message"),
    [
        (StartOptions(direct_io=True), {"engine": "sglang"}, "no loader that reads past the page cache"),
        (StartOptions(compile_jobs=0), {}, "--compile-jobs is 0: needs 1 or more"),
        (StartOptions(host_cache_bytes=0), {}, "it is for llama-cpp and ollama"),
        (StartOptions(host_tier_bytes=1 << 40), {}, "--kv-offloading-size 1,024.00 GiB: needs 0 to 121.69 GiB"),
        (StartOptions(guests=(Guest(name="x", num_bytes=-1, during="serving"),)), {}, "needs 0 to 121.69 GiB"),
        (StartOptions(), {"model": "llama-3.1-405b"}, "What fits:"),
    ],
)
def test_what_cannot_be_is_refused(options: StartOptions, serving: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        timeline(options, **serving)


# --- laws -----------------------------------------------------------------------------------------------------------

ENGINES = ("vllm", "vllm@0.19", "sglang", "tensorrt-llm", "llama-cpp", "ollama", "naive", "orca", "vattention")
SERVING = st.fixed_dictionaries(
    {
        "engine": st.sampled_from(ENGINES),
        "model": st.sampled_from(model_names()),
        "hardware": st.one_of(st.just("dgx-spark"), st.sampled_from(hardware_names())),
    },
    optional={"quantization": st.sampled_from(["fp8", "nvfp4", "q4_k_m"]), "other_programs": st.sampled_from(["8GiB", "30GiB"])},
)
SIZES = st.integers(0, 20).map(lambda n: n * GIB)
GUESTS = st.builds(Guest, name=st.just("x"), num_bytes=SIZES, during=st.sampled_from(["loading", "serving"]))
OPTIONS = st.builds(
    StartOptions,
    drops_caches=st.booleans(),
    warm_compile_caches=st.booleans(),
    compile_jobs=st.none() | st.integers(1, 40),
    host_tier_bytes=SIZES,
    guests=st.lists(GUESTS, max_size=2).map(tuple),
)


def told_or_none(asked: MemoryRequest, options: StartOptions) -> MemoryTimeline | None:
    try:
        return memory_timeline(asked, options)
    except ConfigError:
        return None


def asked_or_none(chosen: dict[str, Any]) -> MemoryRequest | None:
    try:
        return request(**chosen, max_model_len=2048)
    except ConfigError:
        return None


def asked_and_told(chosen: dict[str, Any], options: StartOptions) -> tuple[MemoryRequest, MemoryTimeline]:
    """What can be asked and has an answer; other examples are passed over."""
    asked = asked_or_none(chosen)
    told = None if asked is None else told_or_none(asked, options)
    assume(told is not None)
    assert asked is not None
    assert told is not None
    return asked, told


@given(chosen=SERVING, options=OPTIONS)
@settings(max_examples=250)
def test_every_moment_adds_up_and_serving_is_the_ledger_s(chosen: dict[str, Any], options: StartOptions) -> None:
    asked, told = asked_and_told(chosen, options)
    visible = asked.hardware.visible_bytes
    for each in told.phases:
        for moment in (each.worst, each.end):
            assert tuple(moment.parts) == TIMELINE_PARTS
            assert sum(moment.parts.values()) == visible
            assert all(size >= 0 for part, size in moment.parts.items() if part != "unassigned")
            assert moment.mem_free <= moment.mem_available
            if not asked.hardware.unified:
                assert moment.parts["page_cache"] == moment.parts["compilers"] == moment.parts["host_tier"] == 0
        assert each.worst.mem_available <= each.end.mem_available
        assert each.verdict.kind in VERDICTS
        assert bool(each.verdict.text) is (each.verdict.kind != "ok")
    if told.budget is None:
        assert told.phases[-1].verdict.kind == "refused"
        return
    serving = phase(told, "serving").end
    ledger = told.budget.parts
    tier = options.host_tier_bytes if asked.hardware.unified else 0
    assert {part: serving.parts[part] for part in ledger if part != "unassigned"} == {
        part: size for part, size in ledger.items() if part != "unassigned"
    }
    assert serving.mem_available + tier == ledger["unassigned"]
    assert told.least_blocks is not None
    assert 0 <= told.least_blocks <= told.budget.num_blocks


@given(chosen=SERVING, options=OPTIONS, free=st.tuples(st.integers(0, 122), st.integers(0, 122)).map(sorted))
@settings(max_examples=150)
def test_more_free_memory_gives_no_fewer_blocks_and_no_worse_verdict(
    chosen: dict[str, Any], options: StartOptions, free: list[int]
) -> None:
    chosen.pop("other_programs", None)
    asked = asked_or_none(chosen)
    assume(asked is not None)
    assert asked is not None
    visible = asked.hardware.visible_bytes
    less, more = (told_or_none(replace(asked, free_memory_bytes=min(n * GIB, visible)), options) for n in free)
    if less is None or less.budget is None:
        return
    assert more is not None
    assert more.budget is not None, "what starts with less free memory starts with more"
    assert less.least_blocks is not None
    assert more.least_blocks is not None
    assert more.budget.num_blocks >= less.budget.num_blocks
    assert more.least_blocks >= less.least_blocks


@given(chosen=SERVING, options=OPTIONS)
@settings(max_examples=60)
def test_advice_that_says_it_avoids_everything_does(chosen: dict[str, Any], options: StartOptions) -> None:
    asked, told = asked_and_told(chosen, options)
    advice = advise_start(told)
    if told.worst.verdict.kind == "ok":
        assert advice is None
    if advice is None:
        return
    assert advice.settings
    again = memory_timeline(advice.timeline.request, advice.timeline.options)
    assert again == advice.timeline
    assert again.worst.verdict.severity <= told.worst.verdict.severity
    assert again.budget is not None
    if advice.solved:
        floor = asked.hardware.memory_floor.value
        assert all(each.worst.mem_available >= floor for each in again.phases)
        assert again.budget is not None
        assert again.least_blocks == again.budget.num_blocks


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


# --- the processor's own work ---------------------------------------------------------------------------------------


def deployed(engine: str, quantization: str, work: str | None) -> Deployment:
    context = 4096 if engine == "llama-cpp" else None
    return deploy(ServingConfig(engine=engine, model="qwen2.5-7b", quantization=quantization, ctx_size=context, cpu_bandwidth=work))


@pytest.mark.parametrize(
    ("engine", "quantization", "basis"), [("vllm", "bf16", "the catalogue"), ("llama-cpp", "q8_0", "llama-cpp on")]
)
def test_work_of_the_processor_slows_decoding_by_its_share(engine: str, quantization: str, basis: str) -> None:
    alone, beside = (deployed(engine, quantization, work) for work in (None, "58GB/s"))
    assert alone.calibration.basis.startswith(basis), "with the catalogue's constants, and with fitted ones"
    share = 1 - 58 / 232
    before, after = (one.step_time.coefficients.model for one in (alone, beside))
    assert before.dense_weight_s == pytest.approx(share * after.dense_weight_s)
    assert before.kv_s_per_token.tolist() == pytest.approx((share * after.kv_s_per_token).tolist())
    assert before.linear_s_per_token == after.linear_s_per_token, "arithmetic is the GPU's own"
    assert after.step_overhead_s == before.step_overhead_s
    assert alone.budget == beside.budget
    assert "58 GB/s of CPU work" in beside.hardware.title


@pytest.mark.parametrize(
    ("work", "hardware", "message"),
    [
        ("40GB/s", "rtx-4090", "has memory of its own"),
        ("232GB/s", "dgx-spark", "leaves the GPU nothing of the 232 GB/s"),
        ("much", "dgx-spark", "write a bandwidth"),
    ],
)
def test_work_that_cannot_be_is_refused(work: str, hardware: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deploy(ServingConfig(hardware=hardware, cpu_bandwidth=work))


def test_no_work_is_no_setting() -> None:
    assert deploy(ServingConfig(cpu_bandwidth="0 GB/s")).config == ServingConfig()
    assert load_hardware("dgx-spark").beside_cpu_work(0.0) == load_hardware("dgx-spark")
