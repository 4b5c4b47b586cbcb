"""llama.cpp's cells and buffers, held against its logs."""

from dataclasses import replace
from typing import Any

import pytest
from asked_budgets import GIB, MIB, OWN, ask, budget, suggestions
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.catalogue import model_names
from pagedkv.errors import ConfigError
from pagedkv.ledgers.llama_cpp import LlamaCppLedger, padded
from pagedkv.memory_plan import plan
from pagedkv.weight_format import WEIGHT_FORMATS


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
