"""`simulate budget`: where the memory goes, and --timeline, how it gets there; as a user and a script read it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pagedkv.sims.budget_timeline import STACK, TimelineFlags, budget_timeline, troubles
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import memory_request
from pagedkv.sims.report import html
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.timeline_figure import caption, memory_over_time
from pagedkv.units import GIB

DOCS = Path(__file__).parents[1] / "docs"
FREEZE = "budget --timeline --model gemma-4-26b-a4b --gpu-memory-utilization 0.7"


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def said(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    main(shlex.split(arguments))
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(arguments))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_without_timeline_it_is_the_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    assert "KV cache = 0.8 × 121.69 − 14.96 − 4.66 − 1.02 − 1.70 = 75.01 GiB" in said(capsys, "budget")
    budget = json.loads(said(capsys, "budget --json -"))["budget"]
    parts = ("weights", "engine_overhead", "activations", "cuda_graphs", "kv_cache", "os_reserve", "other_programs", "unassigned")
    assert sum(budget[part] for part in parts) == budget["visible"]


@pytest.mark.parametrize(
    "arguments",
    [
        "budget --timeline",
        FREEZE,
        "budget --timeline --model nemotron-3-super-120b-a12b --quantization nvfp4 --comes-and-goes qwen3-8b 4GiB@loading",
        "budget --timeline --hardware rtx-4090 --quantization fp8 --comes-and-goes 4GiB",
        "budget --timeline --gpu-memory-utilization 0.92 --free-memory 102.2GiB",
        "budget --timeline --engine llama-cpp --model gpt-oss-120b",
    ],
)
def test_eighty_columns_are_enough_and_the_bars_are_whole(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, arguments)
    flags = [line for line in text.splitlines() if line.startswith("  --") or "drop page caches" in line]
    assert all(len(line) <= 80 for line in text.splitlines() if line not in flags)
    assert "…" not in text
    bars = [bar for line in text.splitlines() for bar in line.split() if len(bar) == 24 and set(bar) <= set("▓█■▒░·")]
    phases = json.loads(said(capsys, f"{arguments} --json -"))["timeline"]["phases"]
    assert len(bars) == len(phases)


def test_the_terminal_says_what_the_document_says(capsys: pytest.CaptureFixture[str]) -> None:
    timeline = json.loads(said(capsys, f"{FREEZE} --json -"))["timeline"]
    text = " ".join(said(capsys, FREEZE).split())
    assert timeline["verdict"] == "dangerous"
    assert timeline["worst_phase"] == timeline["least_available_phase"] == "profile"
    assert f"The least available is {timeline['least_available'] / GIB:.2f} GiB: compile, trial step." in text
    for phase in timeline["phases"]:
        assert phase["text"] in text
        assert sum(size for part, size in phase["worst"].items() if not part.startswith("mem_")) == timeline["visible"]
        assert f"{phase['worst']['mem_available'] / GIB:.2f} {phase['end']['mem_available'] / GIB:.2f}" in text
    assert timeline["avoid"]["verdict"] == "ok"
    assert all(setting in text for setting in timeline["avoid"]["settings"])


def test_what_is_advised_avoids_it_on_the_command_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads(said(capsys, f"{FREEZE} --json -"))["timeline"]["avoid"]["settings"]
    flags = " ".join(setting.replace("MAX_JOBS=", "--compile-jobs ") for setting in settings)
    assert json.loads(said(capsys, f"{FREEZE} {flags} --json -"))["timeline"]["verdict"] == "ok"


def test_who_comes_takes_what_it_needs_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "budget --timeline --warm-caches --comes-and-goes qwen3-8b 12GiB 3GiB@loading --json -"
    timeline = json.loads(said(capsys, arguments))["timeline"]
    *_, serving, model, size = timeline["phases"]
    assert (model["title"], size["title"]) == ("beside Qwen3 8B", "beside 12.00 GiB")
    assert size["worst"]["guests"] == 12 * GIB
    assert model["worst"]["guests"] > 8.2e9 * 2, "its weights, and an engine with room for one request"
    assert model["end"] == serving["end"]
    loading = {phase["name"]: phase["worst"]["guests"] for phase in timeline["phases"]}
    assert loading["loading"] == loading["profile"] == 3 * GIB


def test_a_tier_in_cpu_memory_is_told_beside_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    notes = " ".join(said(capsys, "budget --timeline --kv-offloading-size 16GiB").split())
    assert 'A tier of 16.00 GiB in "CPU" memory frees nothing here' in notes
    assert "comes back in 53 ms (5.1 GB/s, 0.2 ms of latency)" in notes, "256 MiB / 5.1 GB/s + 206 us"
    assert "frees nothing" not in said(capsys, "budget --timeline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--warm-caches", "--warm-caches is about the way to the budget: add --timeline"),
        ("--comes-and-goes 4GiB", "--comes-and-goes is about the way"),
        ("--timeline --comes-and-goes qwen9", "neither a model (simulate models) nor a size such as 12GiB"),
        ("--timeline --comes-and-goes 12GiB@noon", "neither a model"),
        ("--timeline --comes-and-goes 400GiB", "400.00 GiB: needs 0 to 121.69 GiB"),
        ("--timeline --kv-offloading-size 16", "would be 16 bytes: write a unit"),
        ("--timeline --compile-jobs 0", "--compile-jobs is 0: needs 1 or more"),
        ("--timeline --cache-ram 0GiB", "it is for llama-cpp and ollama"),
        ("--timeline --engine sglang --direct-io", "no loader that reads past the page cache"),
        ("--timeline --model llama-3.1-405b", "What fits:"),
        ("--timeline --engine ollama --model qwen3-8b,llama-3.1-8b", "names several models, and this needs one"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, f"budget {arguments}")


@pytest.mark.parametrize(("hardware", "noted"), [("dgx-spark", True), ("rtx-4090", False)])
def test_a_vllm_command_that_offloads_is_told_what_that_is_worth(
    hardware: str, capsys: pytest.CaptureFixture[str], *, noted: bool
) -> None:
    command = "'vllm serve Qwen/Qwen3-4B --cpu-offload-gb 10 --kv-offloading-size=8'"
    text = " ".join(said(capsys, f"from-vllm {command} --hardware {hardware} --gpu-memory-utilization 0.8").split())
    assert ("--cpu-offload-gb 10, --kv-offloading-size 8 frees nothing" in text) is noted


def test_the_example_of_the_docs_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, block = (DOCS / "hardware.md").read_text(encoding="utf-8").partition("```console\n$ simulate budget")
    command, _, shown = block.partition("\n")
    assert said(capsys, f"budget{command}").rstrip() == shown.partition("```")[0].rstrip()


# --- the picture ----------------------------------------------------------------------------------------------------


def test_the_bars_of_the_picture_are_the_moments() -> None:
    request = memory_request(ServingConfig(model="gpt-oss-120b"))
    answer = budget_timeline(request, TimelineFlags(comes_and_goes=("12GiB",)))
    figure = memory_over_time(answer.timeline)
    for bar in figure.data:
        sizes = [sum(phase.worst.parts[part] for part in STACK[bar.name]) / GIB for phase in answer.timeline.phases]
        assert list(bar.x) == pytest.approx(sizes)
    assert {bar.name for bar in figure.data} == set(STACK)
    assert figure.layout.xaxis.range[1] > 121.69, "more is needed than there is"
    assert len({bar.marker.color for bar in figure.data}) == len(STACK)
    assert "floor of 8 GiB" in caption(answer.timeline)


@pytest.mark.parametrize(("hardware", "shown"), [("dgx-spark", True), ("rtx-4090", False)])
def test_the_report_of_a_machine_with_unified_memory_shows_it(hardware: str, *, shown: bool) -> None:
    serving = ServingConfig(hardware=hardware, model="qwen3-4b", max_model_len=2048)
    load = LoadConfig(users=2, random_input_len=50, random_output_len=20)
    measurement = MeasurementConfig(allocator=("paged",), duration="2s", warmup="0")
    page = html(simulate(resolve(SimulationConfig(load=load, serving=serving, measurement=measurement))))
    assert ('<section id="timeline"' in page) is shown
    if shown:
        answer: Any = budget_timeline(memory_request(serving))
        assert all(phase.title in page for phase in troubles(answer.timeline))
        assert answer.advice.settings[0] in page
