import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.ledgers import LEDGERS
from pagedkv.ledgers.llama_cpp import LlamaCppLedger, padded
from pagedkv.ledgers.sglang import (
    SGLangLedger,
    default_chunked_prefill_size,
    default_cuda_graph_max_bs,
    reserved_bytes,
)
from pagedkv.ledgers.tensorrt_llm import TensorRTLLMLedger
from pagedkv.ledgers.transformers import TransformersLedger
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_plan import plan
from pagedkv.memory_request import MemoryRequest
from pagedkv.weight_format import WEIGHT_FORMATS, load_weight_format

GIB, MIB = 2**30, 2**20
SHARES = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static", "tensorrt-llm": "free_gpu_memory_fraction"}


def ask(engine: str, model: str = "llama-3.1-8b", hardware: str = "dgx-spark", **settings: Any) -> MemoryRequest:
    """Ask for a budget with the machine's defaults, unless `settings` says otherwise; names as on the command line."""
    spec, machine, ledger_type = load_model(model), load_hardware(hardware), LEDGERS.load(engine)
    quantization = settings.pop("quantization", None)
    own = {f.name: settings.pop(f.name) for f in fields(ledger_type) if f.name in settings}  # type: ignore[arg-type]
    if engine == "vllm":
        own.setdefault("gpu_memory_utilization", machine.default_utilization.value)
    defaults: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_seqs": machine.default_max_num_seqs,
        "max_num_batched_tokens": machine.default_max_num_batched_tokens,
        "weight_format": load_weight_format(quantization) if quantization else spec.native_format,
    }
    return MemoryRequest(model=spec, hardware=machine, engine=engine, ledger=ledger_type(**own), **{**defaults, **settings})


def budget(engine: str, *names: str, **settings: Any) -> MemoryBudget:
    return plan(ask(engine, *names, **settings))


def suggestions(error: ConfigError) -> list[dict[str, Any]]:
    """Return the settings that a message proposes, as arguments of `ask`."""
    _, _, listed = str(error).partition("What fits: ")
    listed = re.sub(r" \(at its start: [^)]*\)", "", listed)
    if listed in ("", "nothing in the catalogue"):
        return []
    pairs = (re.findall(r"--([a-z-]+)(?: (?!--)(\S+))?", alternative) for alternative in listed.split("; or "))
    return [dict(_setting(name, value) for name, value in each) for each in pairs]


def _setting(flag: str, value: str) -> tuple[str, Any]:
    if flag.startswith("no-"):
        return flag.removeprefix("no-").replace("-", "_"), False
    return flag.replace("-", "_"), json.loads(value) if re.fullmatch(r"[0-9.]+", value) else value or True


# --- the contract ---------------------------------------------------------------------------------------------------


def test_ledgers_are_what_the_files_register() -> None:
    assert LEDGERS.names() == ("llama-cpp", "sglang", "tensorrt-llm", "transformers", "vllm")
    for name in LEDGERS.names():
        LEDGERS.load(name)
    assert sorted(LEDGERS._registered) == list(LEDGERS.names())


COMMON = st.fixed_dictionaries(
    {"model": st.sampled_from(model_names()), "hardware": st.sampled_from(hardware_names()), "max_model_len": st.integers(1, 2048)},
    optional={
        "quantization": st.sampled_from(sorted(WEIGHT_FORMATS)),
        "max_num_seqs": st.sampled_from([1, 64, 256]),
        "max_num_batched_tokens": st.sampled_from([512, 2048, 8192]),
        "enforce_eager": st.booleans(),
        "free_memory_bytes": st.integers(0, 23 * GIB),
        "os_reserve_bytes": st.integers(0, 12 * GIB),
        "other_programs_bytes": st.integers(0, 8 * GIB),
    },
)
HUNDREDTHS = st.integers(5, 99).map(lambda hundredths: hundredths / 100)
DTYPES = st.sampled_from(["auto", "fp8"])
OWN = {
    "vllm": st.fixed_dictionaries({}, optional={"kv_cache_dtype": DTYPES, "kv_cache_memory_bytes": st.integers(0, 20 * GIB)}),
    "sglang": st.fixed_dictionaries(
        {},
        optional={
            "kv_cache_dtype": DTYPES,
            "mem_fraction_static": HUNDREDTHS,
            "page_size": st.sampled_from([1, 16, 64]),
            "max_total_tokens": st.integers(1, 100_000),
        },
    ),
    "tensorrt-llm": st.fixed_dictionaries(
        {},
        optional={
            "kv_cache_dtype": DTYPES,
            "free_gpu_memory_fraction": HUNDREDTHS,
            "tokens_per_block": st.sampled_from([2, 32, 128]),
            "max_tokens": st.integers(1, 100_000),
        },
    ),
    "transformers": st.fixed_dictionaries({}, optional={"kv_cache_dtype": st.sampled_from(["auto", "float16"])}),
    "llama-cpp": st.fixed_dictionaries(
        {},
        optional={
            "kv_cache_dtype": st.sampled_from(["auto", "q8_0", "q8_0/q4_0", "q4_0"]),
            "ctx_size": st.integers(0, 200_000),
            "parallel": st.integers(1, 9),
            "kv_unified": st.booleans(),
            "ubatch_size": st.sampled_from([64, 512, 2048]),
            "swa_full": st.booleans(),
        },
    ),
}


@pytest.mark.parametrize("engine", LEDGERS.names())
@given(data=st.data())
@settings(max_examples=120)
def test_eight_parts_sum_to_what_is_visible_or_every_suggestion_fits(engine: str, data: st.DataObject) -> None:
    chosen = data.draw(COMMON) | data.draw(OWN[engine])
    try:
        divided = budget(engine, **chosen)
    except ConfigError as error:
        for suggestion in suggestions(error):
            assert budget(engine, **{**chosen, **suggestion}).usable_blocks > 0
        return
    assert sum(divided.parts.values()) == divided.visible
    assert all(size >= 0 for size in divided.parts.values())
    assert divided.usable_blocks * divided.block_size >= chosen["max_model_len"]
    assert divided.equation.startswith("KV cache = ")
    assert divided.equation.endswith(f" = {divided.kv_cache / GIB:,.2f} GiB")
    assert "GiB are free" in divided.gate
    for warning in divided.warnings:
        named = re.search(r"freeze \(.*\); --([a-z-]+) ([0-9.]+) leaves enough", warning)
        if named:
            changed = {named[1].replace("-", "_"): json.loads(named[2])}
            assert not budget(engine, **{**chosen, **changed}).warnings


@pytest.mark.parametrize("engine", sorted(SHARES))
@pytest.mark.parametrize("hardware", ["dgx-spark", "h100"])
def test_the_equation_is_true(engine: str, hardware: str) -> None:
    divided = budget(engine, "llama-3.1-8b", hardware)
    terms, result = re.fullmatch(r"KV cache = (.*) = ([0-9.]+) GiB", divided.equation).groups()  # type: ignore[union-attr]
    assert eval(terms.replace("×", "*").replace("−", "-")) == pytest.approx(float(result), abs=0.03)


@pytest.mark.parametrize("engine", sorted(SHARES))
@given(hundredths=st.integers(40, 85))
@settings(max_examples=30)
def test_a_larger_share_gives_more_blocks(engine: str, hundredths: int) -> None:
    budgets = [budget(engine, **{SHARES[engine]: h / 100}) for h in (hundredths, hundredths + 1)]
    whole = {
        "vllm": budgets[0].visible,
        "sglang": budgets[0].free_at_start - budgets[0].engine_overhead,
        "tensorrt-llm": budgets[0].free_at_start - budgets[0].weights - budgets[0].engine_overhead - budgets[0].activations,
    }[engine]
    gained = budgets[1].kv_cache - budgets[0].kv_cache
    assert gained == pytest.approx(whole / 100, abs=budgets[0].block_bytes + 1)


@pytest.mark.parametrize("engine", LEDGERS.names())
def test_one_device_is_supported(engine: str) -> None:
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 2: one device is supported so far"):
        budget(engine, tensor_parallel_size=2)


@pytest.mark.parametrize("engine", LEDGERS.names())
def test_a_model_that_is_too_large_is_refused_with_its_numbers(engine: str) -> None:
    with pytest.raises(
        ConfigError, match=r"Llama 3\.1 70B needs [0-9.]+ GiB on .*, but [0-9.]+ GiB .*: [0-9.]+ GiB of weights"
    ) as caught:
        budget(engine, "llama-3.1-70b")
    first, *_ = suggestions(caught.value)
    if engine == "vllm":
        assert first == {"quantization": "fp8"}
    else:  # they take more than leaves a Spark its floor
        narrower = "q8_0" if engine == "llama-cpp" else "fp8"
        assert re.search(rf"--quantization {narrower} holds it, but its start does not go well \(.* the host", str(caught.value))


@pytest.mark.parametrize("engine", LEDGERS.names())
def test_unified_memory_is_named_in_the_check_and_discrete_memory_is_not(engine: str) -> None:
    own = {"ctx_size": 4096} if engine == "llama-cpp" else {}
    unified = budget(engine, other_programs_bytes=GIB, **own)
    discrete = budget(engine, "qwen2.5-7b", "rtx-4090", **own)
    assert "121.69 visible less 4.00 of the operating system and 1.00 of other programs" in unified.gate
    assert "GiB stay free, and the machine's floor is 8.00 GiB" in unified.gate
    assert "23.52 visible less 0.00 of other programs" in discrete.gate
    assert "floor" not in discrete.gate
    known = budget(engine, free_memory_bytes=int(102.2 * GIB), **own)
    assert "102.20 GiB are free (--free-memory)" in known.gate


# --- vLLM -----------------------------------------------------------------------------------------------------------


def test_vllm_explains_its_gate_with_the_numbers_of_the_machine() -> None:
    assert budget("vllm").gate == (
        "start check: 0.8 × 121.69 = 97.35 GiB must be free, and 117.69 GiB are free (121.69 visible less 4.00 of the operating "
        "system and 0.00 of other programs); 20.34 GiB stay free, and the machine's floor is 8.00 GiB"
    )
    by_hand = budget("vllm", kv_cache_memory_bytes=16 * GIB)
    assert by_hand.equation == f"KV cache = --kv-cache-memory-bytes {16 * GIB} = 16.00 GiB"
    held = by_hand.free_at_start - by_hand.unassigned
    assert f"the engine's {held / GIB:.2f} GiB must be free" in by_hand.gate


# --- SGLang ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "chunk", "batch"),
    [
        (15.6, 2048, 8),
        (23.5, 4096, 48),
        (31.4, 4096, 48),
        (39.4, 4096, 32),
        (79.2, 8192, 256),
        (121.7, 8192, 256),
        (178.4, 16384, 512),
    ],
)
def test_sglang_chooses_by_the_size_of_the_device(gib: float, chunk: int, batch: int) -> None:
    assert default_chunked_prefill_size(int(gib * GIB)) == chunk
    assert default_cuda_graph_max_bs(int(gib * GIB)) == batch


@pytest.mark.parametrize(
    ("gib", "chunk", "batch", "eager", "mib"),
    [
        (80, 8192, 256, False, 512 + 12_288 + 128 + 512 + 8 * 58),
        (80, 8192, 256, True, 512 + 12_288 + 128),
        (80, 2048, 8, False, 10_240),
        (24, 1024, 8, True, 512 + 3072 + 128),
        (24, 512, 8, False, 512 + 3072 + 128 + 16 + 8 * 30),
    ],
)
def test_sglang_reserves_by_its_formula(gib: int, chunk: int, batch: int, eager: bool, mib: int) -> None:
    reserved = reserved_bytes(visible_bytes=gib * GIB, chunked_prefill_size=chunk, cuda_graph_max_bs=batch, enforce_eager=eager)
    assert reserved == mib * MIB


def test_sglang_gives_weights_and_pool_a_share_of_what_is_free() -> None:
    divided = budget("sglang", hardware="h100", mem_fraction_static=0.8, page_size=16)
    static = 0.8 * (divided.free_at_start - divided.engine_overhead)
    assert divided.requested == int(static)
    assert divided.usable_blocks == (static - divided.weights) // divided.block_bytes
    assert divided.num_blocks == divided.usable_blocks + 1
    assert budget("sglang", hardware="h100").utilization == 0.829
    capped = budget("sglang", hardware="h100", max_total_tokens=10_000, page_size=16)
    assert capped.usable_blocks * 16 == 10_000


def test_sglang_refuses_a_share_that_leaves_no_room_for_activations() -> None:
    with pytest.raises(ConfigError, match=r"GiB are free: .* of KV cache at --mem-fraction-static 0\.99") as caught:
        budget("sglang", hardware="h100", mem_fraction_static=0.99)
    lower, *_ = suggestions(caught.value)
    assert lower == {"mem_fraction_static": 0.94}
    with pytest.raises(ConfigError):
        budget("sglang", hardware="h100", mem_fraction_static=0.95)


def test_a_pool_that_the_user_made_too_small_is_enlarged() -> None:
    for engine, setting in (("sglang", "max_total_tokens"), ("tensorrt-llm", "max_tokens")):
        with pytest.raises(ConfigError, match=f"--{setting.replace('_', '-')} 1000 is less than one request") as caught:
            budget(engine, **{setting: 1000})
        assert suggestions(caught.value)[0] == {setting: 2048}


# --- TensorRT-LLM ---------------------------------------------------------------------------------------------------


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


# --- llama.cpp ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "mib"),
    [("llama-3.1-8b", 258.50), ("llama-2-7b", 70.50), ("gpt-oss-20b", 398.38)],
)
def test_llama_cpp_has_the_compute_buffers_of_its_logs(model: str, mib: float) -> None:
    assert budget("llama-cpp", model, "h100", ctx_size=4096).activations / MIB == pytest.approx(mib, abs=0.005)


def test_llama_cpp_has_the_kv_buffers_of_its_logs() -> None:
    assert budget("llama-cpp", ctx_size=512, max_model_len=512).kv_cache == 64 * MIB  # K (f16): 32.00 MiB, V (f16): 32.00 MiB
    assert budget("llama-cpp", "llama-2-7b", ctx_size=512, max_model_len=512).kv_cache == 256 * MIB


@pytest.mark.parametrize(
    ("model", "own", "mib"),
    [
        # gpt-oss-20b on an M5, -np 1: "131072 cells, 12 layers, 1/1 seqs" and "768 cells"; "2304 cells" at n_ubatch 2048.
        ("gpt-oss-20b", {"parallel": 1}, (3072.00, 18.00)),
        ("gpt-oss-20b", {"parallel": 1, "ubatch_size": 2048}, (3072.00, 54.00)),
        # gpt-oss-120b, "using full-size SWA cache": "4096 cells, 18 layers" twice, 144.00 MiB each.
        ("gpt-oss-120b", {"parallel": 1, "ctx_size": 4096, "swa_full": True}, (288.00, 0)),
        # Gemma 4 12B: "8192 cells, 8 layers, 4/1 seqs" and "4608 cells, 40 layers, 4/1 seqs" in q8_0; in f16 at n_ubatch 2048.
        ("gemma-4-12b", {"ctx_size": 8192, "kv_cache_dtype": "q8_0"}, (68.00, 765.00)),
        ("gemma-4-12b", {"ctx_size": 8192, "ubatch_size": 2048}, (128.00, 1920.00)),
        # The same with -np 1, both caches together: 323 MiB, 391 at 16,384 cells, 289 at 4,096, 171 in q4_0, 608 in f16.
        ("gemma-4-12b", {"ctx_size": 8192, "parallel": 1, "kv_cache_dtype": "q8_0"}, (68, 255)),
        ("gemma-4-12b", {"ctx_size": 16_384, "parallel": 1, "kv_cache_dtype": "q8_0"}, (136, 255)),
        ("gemma-4-12b", {"ctx_size": 4096, "parallel": 1, "kv_cache_dtype": "q8_0"}, (34, 255)),
        ("gemma-4-12b", {"ctx_size": 8192, "parallel": 1, "kv_cache_dtype": "q4_0"}, (36, 135)),
        ("gemma-4-12b", {"ctx_size": 8192, "parallel": 1}, (128, 480)),
        # Gemma 4 E4B, qualcomm/GenieX PR 1346: 4,096 cells, 64.00 and 160.00 MiB at full size, 64.00 and 60.00 with 1,536 cells.
        ("gemma-4-e4b", {"ctx_size": 4096, "parallel": 1, "ubatch_size": 1024, "swa_full": True}, (64.00 + 160.00, 0)),
        ("gemma-4-e4b", {"ctx_size": 4096, "parallel": 1, "ubatch_size": 1024}, (64.00, 60.00)),
    ],
)
def test_llama_cpp_has_both_kv_buffers_of_its_logs(model: str, own: dict[str, Any], mib: tuple[float, float]) -> None:
    """Logs of llama.cpp from March to September 2026, as people published them."""
    divided = budget("llama-cpp", model, "h100", weight_format=WEIGHT_FORMATS["q4_k_m"], **own)
    assert ((divided.kv_cache - divided.window_bytes) / MIB, divided.window_bytes / MIB) == mib


@given(data=st.data())
@settings(max_examples=60)
def test_windows_never_take_more_than_at_full_length(data: st.DataObject) -> None:
    chosen = data.draw(OWN["llama-cpp"]) | {"model": data.draw(st.sampled_from(model_names())), "free_memory_bytes": None}
    request = ask("llama-cpp", max_model_len=1, **{**chosen, "swa_full": False})
    ledger = request.ledger
    assert isinstance(ledger, LlamaCppLedger)
    full = replace(request, ledger=replace(ledger, swa_full=True))
    apart = ledger.num_cells(request) * request.block_bytes + ledger.window_bytes(request)
    assert apart <= ledger.num_cells(full) * full.block_bytes + 2, "a cell of odd size is rounded up in both caches"
    assert ledger.window_cells(request) <= ledger.num_cells(request), "the cells of the others limit what a request can be"
    windows = [group.window for group in request.model.layer_groups if group.window]
    if windows and len(windows) < len(request.model.layer_groups):
        least = min(max(windows), ledger.slot_cells(request))
        assert ledger.window_cells(request) >= least * (1 if ledger.unified else ledger.num_slots)
    else:
        assert request.block_bytes == full.block_bytes


def test_a_model_whose_layers_all_have_a_window_runs_without_it_under_llama_cpp() -> None:
    assert budget("llama-cpp", "mistral-7b-v0.1").kv_cache == 4 * GIB


def test_llama_cpp_proposes_its_windows_before_fewer_cells() -> None:
    with pytest.raises(ConfigError) as caught:
        budget("llama-cpp", "gemma-3-27b", "rtx-4090", quantization="q4_k_m", ctx_size=20_480, swa_full=True)
    assert suggestions(caught.value)[0] == {"swa_full": False}
    with pytest.raises(ConfigError) as caught:
        budget("llama-cpp", "gemma-3-27b", "rtx-4090", quantization="q4_k_m")
    fits = suggestions(caught.value)[0]["ctx_size"]
    assert budget("llama-cpp", "gemma-3-27b", "rtx-4090", quantization="q4_k_m", ctx_size=fits).window_cells == 4608
    with pytest.raises(ConfigError):
        budget("llama-cpp", "gemma-3-27b", "rtx-4090", quantization="q4_k_m", ctx_size=fits + 256)


@pytest.mark.parametrize(
    ("own", "slot", "cells"),
    [
        ({"ctx_size": 0}, 131_072, 131_072),
        ({"ctx_size": 10_000}, 10_240, 10_240),
        ({"ctx_size": 10_000, "parallel": 3}, 3584, 10_752),
        ({"ctx_size": 10_000, "parallel": 3, "kv_unified": True}, 10_240, 10_240),
        ({"ctx_size": 10_000, "kv_unified": False}, 2560, 10_240),
    ],
)
def test_llama_cpp_pads_its_cells(own: dict[str, Any], slot: int, cells: int) -> None:
    request = ask("llama-cpp", **own)
    assert isinstance(request.ledger, LlamaCppLedger)
    assert (request.ledger.slot_cells(request), request.ledger.num_cells(request)) == (slot, cells)
    assert plan(request).num_blocks == cells
    assert padded(1) == padded(256) == 256


def test_llama_cpp_counts_cache_types_apart_and_leaves_the_embedding_to_the_processor() -> None:
    full = budget("llama-cpp", hardware="h100", ctx_size=8192)
    narrow = budget("llama-cpp", hardware="h100", ctx_size=8192, kv_cache_dtype="q8_0/q4_0")
    assert narrow.kv_cache / full.kv_cache == pytest.approx((34 / 32 + 18 / 32) / 4)
    unified = budget("llama-cpp", ctx_size=8192)
    assert unified.weights - full.weights == 128_256 * 4096 * 2


def test_llama_cpp_names_the_context_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"131072 cells of the model's own context, all allocated at the start") as caught:
        budget("llama-cpp", hardware="rtx-4090")
    first, second, _ = suggestions(caught.value)
    assert second == {"kv_cache_dtype": "q8_0"}
    assert budget("llama-cpp", hardware="rtx-4090", **first).unassigned < 256 * 131_072
    with pytest.raises(ConfigError):
        budget("llama-cpp", hardware="rtx-4090", ctx_size=first["ctx_size"] + 256)


@pytest.mark.parametrize(
    ("own", "enough"),
    [
        ({"ctx_size": 4096}, 8192),
        ({"ctx_size": 8192, "parallel": 4}, 32_768),
        ({"ctx_size": 8192, "parallel": 4, "kv_unified": True}, None),
    ],
)
def test_a_slot_must_hold_the_longest_request(own: dict[str, Any], enough: int | None) -> None:
    if enough is None:
        assert budget("llama-cpp", max_model_len=8000, **own)
        return
    with pytest.raises(ConfigError, match=rf"--max-model-len 8000 is more than .* use --ctx-size {enough} or"):
        budget("llama-cpp", max_model_len=8000, **own)
    assert budget("llama-cpp", max_model_len=8000, **{**own, "ctx_size": enough})


# --- values that cannot work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "own", "message"),
    [
        ("sglang", {"mem_fraction_static": 1.2}, r"--mem-fraction-static 1\.2 must be above 0 and at most 1"),
        ("sglang", {"page_size": 0}, r"--page-size 0 must be at least 1"),
        ("sglang", {"kv_cache_dtype": "q8_0"}, r"--kv-cache-dtype q8_0 is not for this engine: use auto, .*fp8"),
        ("tensorrt-llm", {"free_gpu_memory_fraction": 0.0}, r"--free-gpu-memory-fraction 0\.0 must be"),
        ("tensorrt-llm", {"tokens_per_block": 24}, r"--tokens-per-block 24 must be a power of two above 1"),
        ("tensorrt-llm", {"tokens_per_block": 1}, r"--tokens-per-block 1 must be a power of two above 1"),
        ("tensorrt-llm", {"max_tokens": 0}, r"--max-tokens 0 must be"),
        ("llama-cpp", {"ctx_size": -1}, r"--ctx-size -1 must be at least 0"),
        ("llama-cpp", {"parallel": 0}, r"--parallel 0 must be"),
        ("llama-cpp", {"ubatch_size": 0}, r"--ubatch-size 0 must be"),
        ("llama-cpp", {"ctx_checkpoints": -1}, r"--ctx-checkpoints -1 must be at least 0, which turns them off"),
        ("llama-cpp", {"kv_cache_dtype": "fp8"}, r"--kv-cache-dtype fp8 is not for this engine: use auto, .*q8_0"),
        ("transformers", {"kv_cache_dtype": "fp8"}, r"--kv-cache-dtype fp8 is not for this engine: use auto, .*float16"),
    ],
)
def test_values_that_cannot_work_are_named(engine: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget(engine, **own)


def test_a_request_can_be_asked_of_every_engine() -> None:
    request = ask("vllm")
    ledgers = (request.ledger, SGLangLedger(), TensorRTLLMLedger(), LlamaCppLedger(ctx_size=4096), TransformersLedger())
    assert len({plan(replace(request, ledger=ledger)).kv_cache for ledger in ledgers}) == 5


def test_a_warning_that_nothing_gentler_avoids_ends_there() -> None:
    least = budget("llama-cpp", ctx_size=256, max_model_len=256, free_memory_bytes=18 * GIB)
    assert "the machine may freeze" in least.warnings[0]
    assert "leaves enough" not in least.warnings[0]
