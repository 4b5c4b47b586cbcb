"""What a person sees: the answer in 80 columns of plain text, commands that can be copied, progress on stderr."""

import io
import re
import shlex
import time
from pathlib import Path

import pytest
from rich.console import Console

from pagedkv.catalogue import hardware_names
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.console import show
from pagedkv.sims.progress import ProgressOnStderr
from pagedkv.sims.results import Results, simulate
from pagedkv.sims.scenario import resolve


def answer(results: Results, *, width: int = 80) -> str:
    """Return what `show` prints to a terminal of `width` columns."""
    file = io.StringIO()
    show(results, Console(file=file, width=width, highlight=False))
    return file.getvalue()


@pytest.fixture(scope="module")
def results() -> Results:
    config = SimulationConfig(
        load=LoadConfig(users=12, think_time="2s", random_input_len=1234, random_output_len=56),
        serving=ServingConfig(num_gpu_blocks_override=400, max_model_len=2048),
        measurement=MeasurementConfig(
            duration="20s",
            warmup="5s",
            repeats=2,
            goodput=("ttft:900",),
            allocator=("paged", "contiguous-max", "contiguous-oracle"),
        ),
    )
    return simulate(resolve(config))


@pytest.mark.parametrize("width", [80, 100, 200])
def test_it_fits_the_terminal(results: Results, width: int) -> None:
    text = answer(results, width=width)
    assert max(len(line) for line in text.splitlines() if not line.startswith(("Try next", "This run"))) <= width


def test_many_allocators_are_several_tables_of_80_columns(results: Results) -> None:
    """Every line of the comparison is there once per table, whole, and every allocator has a column."""
    (paged, *_), scenario = results.by_allocator.values(), results.scenario
    many = Results(scenario=scenario, by_allocator={f"contiguous-growing-{i}": paged for i in range(7)})
    text = answer(many)
    assert max(len(line) for line in text.splitlines() if not line.startswith(("Try next", "This run"))) <= 80
    heads = re.findall(r"^ +((?:contiguous-growing-\d *)+)$", text, re.MULTILINE)
    assert " ".join(heads).split() == list(many.by_allocator)
    assert len(heads) > 1
    assert len(re.findall(r"^TTFT P99, ms ", text, re.MULTILINE)) == len(heads)


SETTINGS = ("max_model_len", "block_size", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "seed")


def test_settings_and_figures_of_the_document_are_shown(results: Results) -> None:
    text, document = answer(results, width=400), results.document()
    for setting in SETTINGS:
        assert f"{setting.replace('_', '-')} {document['config'][setting]:,}" in text
    for part in ("visible", "weights", "engine_overhead", "activations", "cuda_graphs", "kv_cache", "os_reserve", "unassigned"):
        assert f"{document['budget'][part] / 2**30:,.2f} GiB" in text
    for column in document["results"]:
        assert column["verdict"]["text"] in text
        assert f"{column['running_mean']:.1f} ({column['running_max']})" in text
        assert all(f"{100 * share:.1f} %" in text for kind, share in column["kv"].items() if kind not in ("cached", "state"))
        low, high = column["ci95"]["output_tokens_per_s"]
        assert f"{column['output_tokens_per_s']:,.0f} ± {(high - low) / 2:,.0f}" in text


def test_counts_add_up_where_they_are_shown(results: Results) -> None:
    rows = dict(
        re.findall(r"^ *(requests|finished|unfinished|rejected|failed) +([0-9, ]+)$", answer(results, width=200), re.MULTILINE)
    )
    numbers = {label: [int(word.replace(",", "")) for word in row.split()] for label, row in rows.items()}
    total = numbers.pop("requests")
    assert len(total) == 3
    assert [sum(column) for column in zip(*numbers.values(), strict=True)] == total


def test_paging_is_compared_with_each_other_allocator(results: Results) -> None:
    figures = {name: result.figures for name, result in results.by_allocator.items()}
    for name in ("contiguous-max", "contiguous-oracle"):
        ratio = figures["paged"]["output_tokens_per_s"] / figures[name]["output_tokens_per_s"]
        assert f"paged against {name}: {ratio:.2f} × the output tokens/s" in answer(results, width=200)


def test_the_kv_cache_is_an_equation_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    for hardware in hardware_names():
        main(
            [
                "--users",
                "1",
                "--hardware",
                hardware,
                "--model",
                "opt-13b",
                "--quantization",
                "fp8",
                "--duration",
                "1s",
                "--warmup",
                "0",
            ]
        )
        out = capsys.readouterr().out
        equation = re.search(
            r"KV cache = ([0-9.]+) × ([0-9.]+) − ([0-9.]+) − ([0-9.]+) − ([0-9.]+) − ([0-9.]+) = ([0-9.]+) GiB", out
        )
        assert equation
        share, visible, *parts, kv = map(float, equation.groups())
        assert share * visible - sum(parts) == pytest.approx(kv, abs=0.04)
        blocks = re.search(r"= ([0-9,]+) blocks of 16 tokens = ([0-9,]+) tokens of ([0-9,]+) bytes", out)
        assert blocks
        number, tokens, per_token = (int(text.replace(",", "")) for text in blocks.groups())
        assert number * 16 == tokens
        assert tokens * per_token / 2**30 == pytest.approx(kv, abs=0.006)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line.partition("simulate ")[2]) for line in text.splitlines() if line.startswith(("Try next", "This run"))]


def test_the_commands_are_whole_on_a_wide_terminal(results: Results) -> None:
    following, this = commands(answer(results, width=400))
    assert " ".join(["simulate", *following]) == results.by_allocator["paged"].verdict.next_command
    assert this[:4] == ["--users", "12", "--think-time", "2s"]


def test_the_commands_are_whole_on_any_terminal(results: Results) -> None:
    wide, narrow = (re.sub(r"\s", "", answer(results, width=width).partition("Try next:")[2]) for width in (400, 80))
    assert narrow == wide


def test_a_file_name_is_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    name = "[red]t[bold].csv"
    Path(name).write_text("arrival_s,input_tokens,output_tokens\n0,90,9\n")
    main(["--trace", name, "--allocator", "paged"])
    out = capsys.readouterr().out
    assert f"of {name} on NVIDIA DGX Spark" in out
    assert out.rstrip().endswith(f"--trace '{name}' --allocator paged")


def test_no_escape_codes_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    main("--users 3 --duration 1s --warmup 0".split())
    assert "\x1b" not in capsys.readouterr().out


def test_a_run_without_requests_can_be_shown() -> None:
    config = SimulationConfig(load=LoadConfig(users=1, think_time="10h"), measurement=MeasurementConfig(duration="1s", warmup="0"))
    text = answer(simulate(resolve(config)))
    assert "–" in text  # no latency is not 0
    assert "nan" not in text.lower()


def test_a_warning_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main("--users 1 --gpu-memory-utilization 0.94 --duration 1s --warmup 0".split())
    assert "the machine may freeze" in " ".join(capsys.readouterr().out.split())


def test_quick_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressOnStderr(["paged"], repeats=1) as progress:
        progress("paged", 0, 0.5)
    assert capsys.readouterr() == ("", "")


def test_slow_work_says_how_far_it_is_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pagedkv.sims.progress._QUIET_S", 0.01)
    monkeypatch.setattr("pagedkv.sims.progress._INTERVAL_S", 0.0)
    with ProgressOnStderr(["paged", "contiguous-max"], repeats=2) as progress:
        progress("contiguous-max", 1, 0.5)  # the last quarter of the work, half done
        time.sleep(0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert set(err.splitlines()) == {" 88% contiguous-max, repeat 2 of 2"}


def test_the_spread_of_lengths_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main("--users 1 --random-input-len 90 --random-output-len 9 --random-range-ratio 0.5 --duration 1s --warmup 0".split())
    assert "lengths 90 + 9, ±50%" in " ".join(capsys.readouterr().out.split())
