"""The command line as a user and a script meet it: streams, exit codes, the result document, interruption."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from pagedkv import __version__
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig

LOAD = (
    "--users 9 --think-time 2s --lengths sharegpt --over-length drop --max-model-len 2048 --hardware rtx-4090 "
    "--duration 15s --warmup 5s --goodput ttft:30 tpot:18"
)
COMMAND = [sys.executable, "-c", "from pagedkv.sims.cli import main; main()"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that finds what this one finds."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changes


def stdout(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    main(shlex.split(arguments))
    return capsys.readouterr().out


def said(err: str) -> list[str]:
    """Return the lines of stderr that are not progress: how much of that there is depends on the machine."""
    return [line for line in err.splitlines() if not re.match(r" *[0-9]+% ", line)]


def not_json(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def document(text: str) -> dict[str, Any]:
    """Return the one JSON document that `text` is."""
    parsed, end = json.JSONDecoder(parse_constant=not_json).raw_decode(text)
    assert text[end:] == "\n"
    result: dict[str, Any] = parsed
    return result


# --- the result document --------------------------------------------------------------------------------------------

BUDGET_PARTS = (
    "weights",
    "engine_overhead",
    "activations",
    "cuda_graphs",
    "kv_cache",
    "os_reserve",
    "other_programs",
    "unassigned",
)
RESULT_KEYS = {
    *("allocator", "placement", "engine", "model", "hardware", "verdict", "ci95"),
    *("num_injected", "num_finished", "num_rejected", "num_failed", "num_unfinished", "num_preemptions"),
    *("error_rate", "busy_share", "memory_bandwidth_share", "compute_share"),
    *("running_mean", "running_max", "waiting_mean", "waiting_time_share", "kv", "kv_when_waiting"),
    *("ttft_s", "tpot_s", "itl_s", "e2e_s", "output_tokens_per_s", "request_throughput_per_s", "goodput_per_s", "goodput_share"),
    *("iterations", "request_steps", "simulated_s"),
}
KV_KEYS = {"tokens", "reserved", "internal", "external", "cached", "state", "free"}


def test_the_document_has_every_key_that_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    # Missing keys break readers, further ones do not: hence "at least".
    main(shlex.split(f"{LOAD} --json -"))
    out, err = capsys.readouterr()
    assert said(err) == []
    result = document(out)
    assert result.keys() >= {"schema_version", "config", "budget", "results"}
    assert result["schema_version"] == 1
    assert result["config"].keys() >= {
        f.name for section in (LoadConfig, ServingConfig, MeasurementConfig) for f in fields(section)
    }
    budget = result["budget"]
    assert budget.keys() >= {"visible", *BUDGET_PARTS, "num_blocks", "block_size", "kv_bytes_per_token"}
    assert sum(budget[part] for part in BUDGET_PARTS) == budget["visible"]
    assert [r["allocator"] for r in result["results"]] == ["paged", "contiguous-max", "contiguous-oracle"]
    for each in result["results"]:
        assert each.keys() >= RESULT_KEYS
        assert (each["engine"], each["model"], each["hardware"]) == ("vllm", "llama-3.1-8b", "rtx-4090")
        assert each["kv"].keys() >= KV_KEYS
        assert math.fsum(each["kv"].values()) == pytest.approx(1.0, abs=1e-9)
        for latency in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            assert each[latency].keys() >= {"mean", "p50", "p90", "p99", "ci95"}
            assert each[latency]["p50"] <= each[latency]["p90"] <= each[latency]["p99"]
        assert each["verdict"].keys() >= {"status", "binding", "text", "fits", "next_command"}
        assert each["num_injected"] == sum(each[f"num_{o}"] for o in ("finished", "rejected", "failed", "unfinished"))
        assert each["kv_when_waiting"] is None  # nobody waited; with a queue:
    crowded = document(stdout(capsys, f"{LOAD} --max-num-seqs 1 --think-time 10ms --json -".replace("--think-time 2s", "")))
    for each in crowded["results"]:
        assert each["kv_when_waiting"].keys() >= KV_KEYS
        assert math.fsum(each["kv_when_waiting"].values()) == pytest.approx(1.0, abs=1e-9)


def test_repeats_give_intervals_around_their_means(capsys: pytest.CaptureFixture[str]) -> None:
    for each in document(stdout(capsys, f"{LOAD} --repeats 3 --json -"))["results"]:
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            low, high = each[name]["ci95"]
            assert low < each[name]["mean"] < high
            assert each["ci95"][f"{name}.p99"][0] < each[name]["p99"] < each["ci95"][f"{name}.p99"][1]
        for name in ("running_mean", "output_tokens_per_s", "request_throughput_per_s", "goodput_share"):
            assert each["ci95"][name][0] <= each[name] <= each["ci95"][name][1]
        assert each["simulated_s"] == 60.0
    for each in document(stdout(capsys, f"{LOAD} --json -"))["results"]:
        assert each["ci95"] is None
        assert each["ttft_s"]["ci95"] is None


def test_the_same_seed_gives_the_same_bytes_in_any_process(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (stdout(capsys, f"{LOAD} --seed {seed} --json -") for seed in (1, 1, 2))
    assert first == again
    assert document(first)["results"] != document(other)["results"]
    argv = [*COMMAND, *shlex.split(f"{LOAD} --seed 1 --json -")]
    elsewhere = subprocess.run(
        argv, env=environment(PYTHONHASHSEED="7", TZ="Asia/Tokyo", LC_ALL="C"), capture_output=True, check=True
    )
    assert elsewhere.stdout.decode("utf-8") == first


def test_a_file_gets_the_same_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = stdout(capsys, f"{LOAD} --json -")
    shown = stdout(capsys, f"{LOAD} --json new/x.json --out result")
    assert (folder / "new" / "x.json").read_text("utf-8") == printed == (folder / "result" / "summary.json").read_text("utf-8")
    assert {path.name for path in (folder / "result").iterdir()} >= {"config.toml", "summary.json", "requests.csv", "timeline.csv"}
    assert "9 users on NVIDIA GeForce RTX 4090" in shown


def test_flags_override_the_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.toml").write_text(
        "users = 9\nthink-time = '2s'\nduration = '15s'\nwarmup = '5s'\nallocator = ['paged']\nseed = 3\n"
    )
    from_file = document(stdout(capsys, "--config c.toml --json -"))
    assert from_file["config"] | {"seed": 4} == document(stdout(capsys, "--config c.toml --seed 4 --json -"))["config"]
    flags = "--users 9 --think-time 2s --duration 15s --warmup 5s --allocator paged"
    for seed in (3, 4):
        changed = stdout(capsys, f"--config c.toml --seed {seed} --json -")
        assert document(changed)["results"] == document(stdout(capsys, f"{flags} --seed {seed} --json -"))["results"]


def test_underscores_and_the_name_of_the_command_are_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.toml").write_text("think_time = '2s'\nblock_size = 32\n")
    plain = document(stdout(capsys, f"simulate {LOAD} --block_size 32 --json -"))
    assert plain["config"]["block_size"] == 32
    assert document(stdout(capsys, f"{LOAD} --config c.toml --json -")) == plain


def test_a_warning_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("--users 1 --gpu-memory-utilization 0.94 --duration 1s --warmup 0 --json -"))
    out, err = capsys.readouterr()
    document(out)
    (warning,) = said(err)
    assert re.match("warning: .*the machine may freeze", warning)


# --- help -----------------------------------------------------------------------------------------------------------


def test_version_and_help_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert stdout(capsys, "--version") == f"{__version__}\n"
    assert "Usage: simulate" in stdout(capsys, "--help")
    assert stdout(capsys, "-h") == stdout(capsys, "simulate --help")


def test_help_explains_every_setting() -> None:
    code = "from pagedkv.sims.cli import main; main(['--help'])"  # in a process of its own: a console keeps its first width
    wide = environment() | {"COLUMNS": "400"}
    text = subprocess.run([sys.executable, "-c", code], env=wide, capture_output=True, text=True, check=True).stdout
    for section in (LoadConfig, ServingConfig, MeasurementConfig):
        for field in fields(section):
            row = re.search(rf"^\W*--{field.name.replace('_', '-')} .*?  (\w.*)$", text, re.MULTILINE)
            assert row, field.name
            assert len(re.findall(r"[A-Za-z]{2,}", row[1])) >= 3, f"{field.name} is not explained"
    for flag in ("--json", "--out", "--config"):
        assert re.search(rf"{flag} .*\w+ \w+", text)


def test_no_help_is_mangled_by_a_word_that_begins_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["fit"], ["max-users"], ["sweep"], ["compare"], ["validate"], ["budget"], ["calibrate"]):
        main([*command, "--help"])
        assert "•" not in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from pagedkv.sims.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "cyclopts" in loaded
    assert not loaded & {"numba", "plotly", "torch", "simpy", "llvmlite", "pagedkv.sims.engine"}


# --- answers that go to a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("fuzz", "fuzz_command.run_fuzz"),
        ("prefix-cache t.jsonl", "prefix_study.study_prefixes"),
        ("compare a b", "run_comparison.compare_runs"),
        ("max-users", "max_users.max_users"),
        ("sweep --users 1,2 --out s", "sweep.run_sweep"),
        ("advise --users 1", "advise.advise"),
        (LOAD, "results.simulate"),
    ],
)
def test_that_it_cannot_be_written_is_said_before_the_work(
    command: str, work: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worked(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("it has begun to work")

    monkeypatch.setattr(f"pagedkv.sims.{work}", worked)
    with pytest.raises(SystemExit) as exit:
        main([*shlex.split(command), "--json", "/proc/none/x.json"])
    assert exit.value.code == 2
    assert "cannot write --json" in capsys.readouterr().err


# --- the benchmark of the kernels -----------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the benchmark, whatever is installed: its rows."""
    rows: list[dict[str, Any]] = [{"correct": True}, {"reason": "not there"}]

    def run_bench(options: Any, keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        result = {"dry_run": options.dry_run, "quick": options.quick, "rows": rows}
        keep(result)
        if "interrupted" in rows[-1]:
            raise KeyboardInterrupt
        return result

    stand_in: Any = SimpleNamespace(BenchOptions=SimpleNamespace, run_bench=run_bench)
    report: Any = SimpleNamespace(
        found_wrong=lambda rows: any(row.get("correct") is False for row in rows),
        render=lambda result: f"{len(result['rows'])} rows",
    )
    monkeypatch.setitem(sys.modules, "pagedkv.kernels.bench", stand_in)
    monkeypatch.setitem(sys.modules, "pagedkv.kernels.bench_report", report)
    return rows


def test_the_benchmark_is_shown_and_written(bench: list[dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stdout(capsys, "bench-kernels") == "2 rows\n"
    assert document(stdout(capsys, "bench-kernels --dry-run --json -")) == {"dry_run": True, "quick": False, "rows": bench}
    assert stdout(capsys, "bench-kernels --quick --time-limit-s 60 --json x.json") == ""
    assert document((folder / "x.json").read_text()) == {"dry_run": False, "quick": True, "rows": bench}
    bench.append({"interrupted": True})
    for command, said in (("--json y.json", "y.json holds what was measured"), ("", "nothing was written")):
        with pytest.raises(SystemExit) as exit:
            main(["bench-kernels", *command.split()])
        assert exit.value.code == 130
        assert said in capsys.readouterr().err
    assert len(document((folder / "y.json").read_text())["rows"]) == 3
    bench[-1] = {"correct": False}
    with pytest.raises(SystemExit) as exit:
        main(["bench-kernels"])
    assert exit.value.code == 1


def test_without_torch_the_benchmark_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "pagedkv.kernels.bench", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as exit:
        main(["bench-kernels"])
    assert exit.value.code == 2
    assert "torch, which is not installed: pip install torch" in capsys.readouterr().err


# --- interruption and closed pipes ----------------------------------------------------------------------------------


def test_ctrl_c_stops_a_long_simulation_and_leaves_no_file(folder: Path) -> None:
    argv = [*COMMAND, *shlex.split("--users 300 --duration 1000h --out result --json x.json")]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert re.match(r" *0% ", process.stderr.readline())  # progress: it has run for a second
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out == ""
    assert not any("Traceback" in line for line in said(err))
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_ctrl_c_says_that_nothing_was_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedkv.sims.results.simulate", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(LOAD))
    assert exit.value.code == 130
    assert "interrupted" in capsys.readouterr().err


SHORT_LOAD = "--users 2 --duration 1s --warmup 0"


@pytest.mark.parametrize(
    "words", [f"{SHORT_LOAD} --json -", SHORT_LOAD, f"{SHORT_LOAD} --watch", "--help", "fit --help", "models", "hardware --json -"]
)
def test_a_closed_pipe_is_no_error(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*COMMAND, *shlex.split(words)]
    done = subprocess.run(argv, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert said(done.stderr) == []
    assert done.returncode == 0


def test_head_gets_its_line() -> None:
    argv = f"{shlex.join(COMMAND)} --users 2 --duration 1s --warmup 0 | head -1"
    done = subprocess.run(argv, shell=True, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.startswith("2 users on NVIDIA DGX Spark")
    assert said(done.stderr) == []


def test_an_error_that_nobody_reads_still_has_its_status() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*COMMAND, "--users", "0"]
    done = subprocess.run(argv, env=environment(), stdout=writer, stderr=writer, text=True, check=False)
    os.close(writer)
    assert done.returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*COMMAND, *shlex.split("--users 2 --duration 1s --warmup 0 --json -")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


def test_a_configuration_is_read_and_never_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "users = 2\nduration = '1s'\nwarmup = '0'\nout = 'result'\n"
    (folder / "c.toml").write_text(text)
    stdout(capsys, "--config c.toml")
    assert (folder / "c.toml").read_text() == text
    assert tomllib.loads((folder / "result" / "config.toml").read_text("utf-8"))["users"] == 2
