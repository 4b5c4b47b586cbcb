"""Memory over time: what else takes of it, such as page cache, guests, a second tier and old prompts; and what cannot be."""

import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from starts import WARM, kinds, phase, request, timeline

from pagedkv.errors import ConfigError
from pagedkv.memory_timeline import MemoryTimeline
from pagedkv.sims.budget_timeline import budget_timeline
from pagedkv.sims.console_timeline import show_timeline
from pagedkv.start_timeline import memory_timeline
from pagedkv.start_up import Guest, StartOptions
from pagedkv.timeline_advice import advise_start
from pagedkv.units import GIB


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


def test_llama_server_comes_to_keep_copies_of_windows_as_well() -> None:
    def timeline_with(**own: Any) -> MemoryTimeline:
        asked = request(engine="llama-cpp", model="gemma-3-27b", quantization="q4_k_m", ctx_size=32_768, **own)
        return memory_timeline(asked, StartOptions(host_cache_bytes=0))

    told = timeline_with(parallel=2)
    serving = phase(told, "serving")
    assert serving.end.mem_available - serving.worst.mem_available == 2 * 32 * 1024 * 52 * 16 * 2 * 128 * 2
    assert "32 context checkpoints of each of 2 slots" in told.notes[-1]
    for own in ({"ctx_checkpoints": 0}, {"swa_full": True}):
        assert phase(timeline_with(**own), "serving").end == phase(timeline_with(**own), "serving").worst


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


@pytest.mark.parametrize("columns", [40, 60, 71, 72, 80])
def test_no_number_is_cut_at_any_width(columns: int) -> None:
    """In a terminal of 40 columns, too: every phase with what is available at its worst moment and at its end."""
    answer = budget_timeline(request(model="gpt-oss-120b"))
    console = Console(width=columns)
    with console.capture() as shown:
        show_timeline(answer, console)
    text = shown.get()
    assert "…" not in text
    for each in answer.timeline.phases:
        row = next(line for line in text.splitlines() if line.startswith(each.title[:11]) and "." in line)
        assert f"{each.worst.mem_available / GIB:,.2f}" in row
        assert f"{each.end.mem_available / GIB:,.2f}" in row
    assert "≥ 115 s" in text
