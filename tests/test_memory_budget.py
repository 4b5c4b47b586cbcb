import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.activation_peak import activation_bytes
from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import LayerGroup
from pagedkv.ledgers.vllm import VLLMLedger, highest_utilization_that_starts, start_gate
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_plan import plan as plan_request
from pagedkv.memory_request import MemoryRequest
from pagedkv.model_spec import ModelSpec
from pagedkv.weight_format import WEIGHT_FORMATS, WeightFormat, load_weight_format

GIB = 2**30
SPARK_VISIBLE = load_hardware("dgx-spark").visible_bytes


OF_THE_LEDGER = {field.name for field in fields(VLLMLedger)}


def plan_memory(model: ModelSpec, hardware: HardwareSpec, **settings: Any) -> MemoryBudget:
    """Plan under vLLM's ledger: `settings` are its fields and those of a request."""
    ledger = VLLMLedger(**{name: value for name, value in settings.items() if name in OF_THE_LEDGER})
    others = {name: value for name, value in settings.items() if name not in OF_THE_LEDGER}
    return plan_request(MemoryRequest(model=model, hardware=hardware, engine="vllm", ledger=ledger, **others))


def plan(model: str = "llama-3.1-8b", hardware: str = "dgx-spark", **settings: Any) -> MemoryBudget:
    """Plan with the defaults of the machine, unless `settings` says otherwise; names as on the command line."""
    spec, machine = load_model(model), load_hardware(hardware)
    quantization = settings.pop("quantization", None)
    defaults: dict[str, Any] = {
        "weight_format": load_weight_format(quantization) if quantization else spec.native_format,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "max_model_len": 2048,
        "max_num_seqs": machine.default_max_num_seqs,
        "max_num_batched_tokens": machine.default_max_num_batched_tokens,
        "gpu_memory_utilization": machine.default_utilization.value,
    }
    return plan_memory(spec, machine, **{**defaults, **settings})


def suggestions(error: ConfigError) -> list[dict[str, Any]]:
    """Return the settings that a message proposes, as arguments of `plan`."""
    _, _, listed = str(error).partition("What fits: ")
    listed = re.sub(r" \(at its start: [^)]*\)", "", listed)
    if listed in ("", "nothing in the catalogue"):
        return []
    return [
        {
            flag.replace("-", "_"): json.loads(value) if re.fullmatch(r"[0-9.]+", value) else value or True
            for flag, value in re.findall(r"--([a-z-]+)(?: (?!--)(\S+))?", alternative)
        }
        for alternative in listed.split("; or ")
    ]


# --- the start gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("utilization", "asked_gib", "starts"),
    [(0.92, 111.95, False), (0.87, 105.87, False), (0.85, 103.44, False), (0.83, 101.00, True)],
)
def test_start_gate_of_a_spark_with_102_gib_free(utilization: float, asked_gib: float, starts: bool) -> None:
    free = int(102.2 * GIB)
    assert round(math.ceil(SPARK_VISIBLE * utilization) / GIB, 2) == asked_gib
    assert start_gate(visible=SPARK_VISIBLE, free=free, utilization=utilization) is starts
    if starts:
        assert plan(gpu_memory_utilization=utilization, free_memory_bytes=free).requested <= free
        return
    with pytest.raises(ConfigError) as caught:
        plan(gpu_memory_utilization=utilization, free_memory_bytes=free)
    message = str(caught.value)
    for number in ("121.69 GiB", f"{asked_gib:.2f} GiB", "102.20 GiB", "0.83 is the highest that starts"):
        assert number in message
    assert "MemAvailable falls to 1.20 GiB" in message  # with 0.83, or with what 0.83 would be refused for
    assert suggestions(caught.value)[0] == {"gpu_memory_utilization": 0.77}


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_the_gate_rounds_what_it_asks_up_and_lets_the_exact_amount_pass(spare: int) -> None:
    assert start_gate(visible=1001, free=501 + spare, utilization=0.5) is (spare >= 0)


@given(visible=st.integers(1, 2**40), free=st.integers(0, 2**40))
def test_the_named_utilization_is_the_highest_hundredth_that_starts(visible: int, free: int) -> None:
    highest = highest_utilization_that_starts(visible=visible, free=free)
    assert highest == 0 or start_gate(visible=visible, free=free, utilization=highest)
    if highest < 1:
        assert not start_gate(visible=visible, free=free, utilization=highest + 0.01)


# --- runs that somebody made ----------------------------------------------------------------------------------------


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


NEMOTRON_3_5_LIGHTNING = ModelSpec(
    name="nemotron-3.5-lightning",
    title="Nemotron 3.5 Lightning 30B-A3B",
    hf_id="",
    source="the published shape of Nemotron-3-Nano-30B-A3B: 6 attention layers, the others keep states",
    hidden_size=2688,
    num_layers=52,
    num_attention_heads=32,
    vocab_size=131_072,
    max_context=262_144,
    layer_groups=(LayerGroup(kind="full", num_layers=6, num_kv_heads=2, key_dim=128, value_dim=128),),
    params_total=31_580_000_000,
    params_active=3_500_000_000,
    embedding_params=131_072 * 2688,
    head_params=131_072 * 2688,
    tied_embeddings=False,
    wide_params=0,
    num_experts=128,
    experts_per_token=6,
    expert_params=29_000_000_000,
    native_format=load_weight_format("nvfp4"),
)


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


# --- laws -----------------------------------------------------------------------------------------------------------

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


def test_unified_memory_checks_the_operating_system_but_never_subtracts_it() -> None:
    headless, desktop = plan(), plan(os_reserve_bytes=7 * GIB, other_programs_bytes=3 * GIB)
    assert headless.kv_cache == desktop.kv_cache
    assert (headless.os_reserve, desktop.os_reserve) == (4 * GIB, 7 * GIB)
    assert headless.unassigned - desktop.unassigned == 6 * GIB
    assert headless.free_at_start == headless.visible - 4 * GIB


def test_known_free_memory_shows_what_the_operating_system_really_holds() -> None:
    free = int(102.2 * GIB)
    budget = plan(gpu_memory_utilization=0.8, free_memory_bytes=free, other_programs_bytes=5 * GIB)
    assert budget.other_programs == 5 * GIB
    assert budget.os_reserve == budget.visible - free - 5 * GIB
    explained = plan(free_memory_bytes=free, other_programs_bytes=40 * GIB)
    assert (explained.other_programs, explained.os_reserve) == (explained.visible - free, 0)
    discrete = plan("llama-3.1-8b", "rtx-4090", free_memory_bytes=23 * GIB)
    assert (discrete.os_reserve, discrete.other_programs) == (0, discrete.visible - 23 * GIB)


@pytest.mark.parametrize(
    ("chosen", "warned"),
    [
        ({"gpu_memory_utilization": 0.80}, False),
        ({"gpu_memory_utilization": 0.90}, False),
        ({"gpu_memory_utilization": 0.91}, True),
        ({"gpu_memory_utilization": 0.80, "os_reserve_bytes": 16 * GIB, "other_programs_bytes": GIB}, True),
        ({"gpu_memory_utilization": 0.83, "free_memory_bytes": int(102.2 * GIB)}, True),
        ({"kv_cache_memory_bytes": 80 * GIB}, False),
        ({"kv_cache_memory_bytes": 90 * GIB}, True),
        ({"hardware": "h100", "gpu_memory_utilization": 0.99}, False),
    ],
)
def test_a_machine_near_its_floor_is_warned_of(chosen: dict[str, Any], warned: bool) -> None:
    budget = plan(**chosen)
    assert bool(budget.warnings) is warned
    for warning in budget.warnings:
        assert "8.00 GiB" in warning
        if named := re.search(r"--gpu-memory-utilization ([0-9.]+) leaves enough", warning):
            assert not plan(**{**chosen, "gpu_memory_utilization": float(named[1])}).warnings
        else:
            assert "kv_cache_memory_bytes" in chosen


def test_eager_mode_saves_the_graphs() -> None:
    graphs, eager = plan(), plan(enforce_eager=True)
    assert graphs.cuda_graphs / GIB == pytest.approx(1.7)
    assert eager.cuda_graphs == 0
    assert eager.kv_cache > graphs.kv_cache


def test_an_override_replaces_the_number_of_blocks() -> None:
    budget = plan(num_gpu_blocks_override=1000, kv_cache_memory_bytes=50 * GIB)
    assert (budget.num_blocks, budget.kv_cache) == (1000, 1000 * budget.block_bytes)


# --- refusals -------------------------------------------------------------------------------------------------------


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
