"""A sweep loses nothing: killed at any moment, on a full disk, after a torn line, it ends in the bytes of an undisturbed one."""

import csv
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims import sweep_store
from pagedkv.sims.cli import main
from pagedkv.sims.command import command_line
from pagedkv.sims.flat_figures import DRAFT_FIGURES, FIGURES, figure
from pagedkv.sims.sweep import run_sweep
from pagedkv.sims.sweep_findings import Row, anomalies, cliffs
from pagedkv.sims.sweep_grid import Axis, Grid, parse_grid
from pagedkv.sims.sweep_store import config_hash, open_store

KILLS = int(os.environ.get("PAGEDKV_SWEEP_KILLS", "4"))
"""How often the sweep of the kill test is killed."""
BASE = (
    "--think-time 1s --random-input-len 400 --random-output-len 60 --hardware rtx-4090 --max-model-len 1024 "
    "--duration 8s --warmup 2s --goodput ttft:400 tpot:40"
)
FLAGS = f"{BASE} --users 2..10:2 --num-gpu-blocks-override 100,200"
COMMAND = [sys.executable, "-c", "from pagedkv.sims.cli import main; main()"]
FINAL = ("results.csv", "results.json", "sweep.html")


def grid(text: str) -> Grid:
    return parse_grid(shlex.split(text))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "undisturbed"
    run_sweep(grid(FLAGS), folder, workers=1)
    return folder


def same(folder: Path, other: Path) -> None:
    for name in FINAL:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


# --- syntax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("--users 10,20,50..100:10", "users", (10, 20, 50, 60, 70, 80, 90, 100)),
        ("--users 3..5", "users", (3, 4, 5)),
        ("--users 1..10:4", "users", (1, 5, 9)),
        ("--users 5,3,4..5,3", "users", (3, 4, 5)),
        ("--users 1, 2", "users", (1, 2)),
        ("--users=7,8", "users", (7, 8)),
        ("--max-model-len 1k..3k:1k", "max_model_len", (1000, 2000, 3000)),
        ("--gpu-memory-utilization 0.5..0.8:0.1", "gpu_memory_utilization", (0.5, 0.6, 0.7, 0.8)),
        ("--think-time 20s,5s..10s:5s", "think_time", ("5s", "10s", "20s")),
        ("--kv-cache-memory-bytes 8GiB,1.5GiB..2.5GiB:0.5GiB", "kv_cache_memory_bytes", ("1.5GiB", "2.0GiB", "2.5GiB", "8GiB")),
        ("--kv-cache-dtype auto,fp8", "kv_cache_dtype", ("auto", "fp8")),
        ("--goodput ttft:2000 tpot:100,ttft:500", "goodput", (("ttft:2000", "tpot:100"), ("ttft:500",))),
        ("--allocator paged,contiguous-max", "allocator", (("paged",), ("contiguous-max",))),
        ("--enforce-eager true,false", "enforce_eager", (True, False)),
        (r"--trace a\,b.csv,c..d.csv", "trace", ("a,b.csv", "c..d.csv")),
        ("--seed 0..2", "seed", (0, 1, 2)),
    ],
)
def test_lists_and_ranges(text: str, name: str, values: tuple[Any, ...]) -> None:
    (axis,) = parse_grid(text.split()).axes
    assert (axis.name, axis.values) == (name, values)


def test_all_combinations_sorted_and_switches_as_ever() -> None:
    points = list(grid("--block-size 16,8 --users 2,1 --no-enable-chunked-prefill --enforce-eager"))
    assert [tuple(point.values.values()) for point in points] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    for point in points:
        assert point.config.load.users == point.values["users"]
        assert not point.config.serving.enable_chunked_prefill
        assert point.config.serving.enforce_eager
        assert point.config.measurement.allocator == ("paged",)
    assert len({config_hash(point.config) for point in points}) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--users 3", "nothing is swept"),
        ("--users 9..3", "is empty"),
        ("--users 3..9:0", "is empty"),
        ("--users 1,,2", "empty value"),
        ("--users 1,", "empty value"),
        ("--users 1..x", "no range"),
        ("--users 1....5", "no range"),
        ("--users 1..1000000000", "1,000,000,000 values"),
        ("--users 1..1000 --seed 0..999", "1,000,000 combinations"),
        ("--gpu-memory-utilization 0.1..0.5", "no step"),
        ("--think-time 5s..1m:5s", "mixes units"),
        ("--users 1 2", "separate values by commas"),
        ("--users 1,2 --users 3", "given twice"),
        ("--enforce-eager --no-enforce-eager --users 1,2", "given twice"),
        ("--enforce-eager yes,no", "is a switch"),
        ("--usres 1,2", "did you mean users"),
        ("9 --users 1,2", "belongs to no flag"),
        ("--users --seed 1,2", "has no value"),
        ("--users 1,2.5", "users"),
        ("--users 1,2 --metric ttft", "ttft_s.p99"),
        ("--users 1,2 --workers 0", "workers is 0"),
        ("--users 1,2 --model lama", "unknown model"),
        ("--model qwen2.5-0.5b,lama --users 1", "unknown model 'lama'"),
        ("--hardware h100,h99 --users 1", "unknown hardware 'h99'"),
        ("--engine vllm,vllm@0.18 --users 1", "unknown version '0.18'"),
        ("--allocator paged,pagd --users 1", "unknown allocator 'pagd'"),
        ("--quantization fp8,fp9 --users 1", "unknown --quantization 'fp9'"),
        ("--kv-cache-dtype auto,fp9 --users 1", "unknown --kv-cache-dtype 'fp9'"),
        ("--contiguous-heap buddy,heap --users 1", "unknown contiguous-heap 'heap'"),
        ("--lengths azure-conv,absent.csv --users 1", "absent.csv"),
        ("--goodput ttft:1,tfft:2 --users 1", "tfft"),
        ("--users 1,2 --request-rate 3", "--users and --request-rate were given"),
        ("--users 1,2 --out /proc/none", "cannot write"),
    ],
)
def test_what_cannot_work_is_refused(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = "" if "--out" in flags else f" --out {tmp_path}/x"
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"sweep {flags}{out}"))
    stdout, err = capsys.readouterr()
    assert (exit.value.code, stdout) == (2, "")
    assert message in err
    assert not list(tmp_path.rglob("results.*"))


# --- results --------------------------------------------------------------------------------------------------------


def test_every_run_is_what_simulate_answers(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points, document = list(grid(FLAGS)), json.loads((undisturbed / "results.json").read_text())
    assert len(document["runs"]) == len(points) == 10
    rows = list(csv.DictReader((undisturbed / "results.csv").open()))
    for point, run, row in zip(points, document["runs"], rows, strict=True):
        assert run["values"] == point.values
        assert {name: int(row[name]) for name in point.values} == point.values
        for name in FIGURES:
            value = figure(run["result"], name)
            assert row[name] == ("" if value is None else str(value))
    one = points[7]
    main([*shlex.split(command_line(one.config))[1:], "--json", "-"])
    assert json.loads(capsys.readouterr().out)["results"][0] == document["runs"][7]["result"]


def test_every_number_of_a_result_is_a_column(undisturbed: Path) -> None:
    def numbers(value: Any, name: str) -> set[str]:
        if isinstance(value, dict):
            return {each for key, inner in value.items() if key != "ci95" for each in numbers(inner, f"{name}.{key}".strip("."))}
        return {name} if isinstance(value, int | float) and not isinstance(value, bool) else set()

    runs = json.loads((undisturbed / "results.json").read_text())["runs"]
    assert set().union(*(numbers(run["result"], "") for run in runs)) == set(FIGURES) - set(DRAFT_FIGURES)


def test_more_workers_give_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    run_sweep(grid(FLAGS), tmp_path, workers=2)
    same(tmp_path, undisturbed)


def test_a_combination_that_cannot_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"sweep {BASE} --users 2 --num-gpu-blocks-override 2,200 --workers 1 --out {tmp_path}"))
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [bool(row["error"]) for row in rows] == [True, False]
    assert "Cannot run: num-gpu-blocks-override 2:" in capsys.readouterr().out.replace("\n", " ")


def test_the_page_is_offline_and_has_a_line_per_combination(undisturbed: Path) -> None:
    page = (undisturbed / "sweep.html").read_text()
    assert "num-gpu-blocks-override 100" in page
    assert "num-gpu-blocks-override 200" in page
    assert "<script src" not in page
    assert '<meta name="viewport" content="width=device-width' in page
    assert "responsive: true" in page
    assert "goodput_share" in page


def test_json_is_the_document(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"sweep {FLAGS} --workers 1 --out {undisturbed} --json -"))
    assert capsys.readouterr().out == (undisturbed / "results.json").read_text()


# --- findings -------------------------------------------------------------------------------------------------------


def row(axis: str, value: int, **figures: Any) -> Row:
    result = {"num_preemptions": 0, "num_injected": 10**6, "num_finished": 10**6, "ci95": None} | figures
    return Row(values={axis: value}, outcome={"result": result})


def test_the_cliff_is_where_preemption_begins(undisturbed: Path) -> None:
    document = json.loads((undisturbed / "results.json").read_text())
    preemptions = {tuple(run["values"].values()): run["result"]["num_preemptions"] for run in document["runs"]}
    assert document["cliffs"]
    for cliff in document["cliffs"]:
        blocks = cliff["others"]["num_gpu_blocks_override"]
        assert cliff["axis"] == "users"
        assert preemptions[cliff["calm"], blocks] == 0 < preemptions[cliff["preempting"], blocks] == cliff["num_preemptions"]
    crossings = sum(
        (preemptions[users, blocks] > 0) != (preemptions[users + 2, blocks] > 0) for users in (2, 4, 6, 8) for blocks in (100, 200)
    )
    assert len(document["cliffs"]) == crossings
    falling = [row("num_gpu_blocks_override", blocks, num_preemptions=9 * (blocks < 3)) for blocks in (1, 2, 3)]
    (cliff,) = cliffs([Axis(name="num_gpu_blocks_override", values=(1, 2, 3))], falling)
    assert (cliff.calm, cliff.preempting) == (3, 2)


@pytest.mark.parametrize(
    ("axis", "figure", "values", "expected"),
    [
        ("num_gpu_blocks_override", "output_tokens_per_s", (10.0, 12.0, 11.0, 13.0), [(2, 3)]),
        ("num_gpu_blocks_override", "output_tokens_per_s", (10.0, 12.0, 11.99, 13.0), []),
        ("num_gpu_blocks_override", "goodput_share", (0.5, 0.4, 0.9, 1.0), [(1, 2)]),
        ("users", "output_tokens_per_s", (10.0, 12.0, 11.0, 10.0), []),  # past its best, a machine may do less and less
        ("users", "output_tokens_per_s", (10.0, 12.0, 11.0, 13.0), [(2, 3)]),
        ("users", "goodput_share", (1.0, 0.8, 0.9, 0.5), [(2, 3)]),
        ("block_size", "output_tokens_per_s", (10.0, 12.0, 11.0, 13.0), []),
    ],
)
def test_anomalies(axis: str, figure: str, values: tuple[float, ...], expected: list[tuple[int, int]]) -> None:
    rows = [row(axis, i, **{figure: value}) for i, value in enumerate(values, start=1)]
    found = anomalies([Axis(name=axis, values=(1, 2, 3, 4))], rows)
    assert [(each.before, each.after) for each in found] == expected
    assert all(each.sure is None for each in found)


def test_an_anomaly_is_sure_if_the_intervals_are_apart() -> None:
    for half, sure in ((0.1, True), (2.0, False)):
        rows = [
            row("num_gpu_blocks_override", i, output_tokens_per_s=v, ci95={"output_tokens_per_s": [v - half, v + half]})
            for i, v in ((1, 12.0), (2, 10.0))
        ]
        (found,) = anomalies([Axis(name="num_gpu_blocks_override", values=(1, 2))], rows)
        assert found.sure is sure


# --- interruption ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return the flags of a sweep that has more runs than the kills let it finish, and the folder of one that nobody disturbed."""
    flags = f"{BASE} --users 2,6 --num-gpu-blocks-override 100 --seed 0..{16 * KILLS - 1}"
    folder = tmp_path_factory.mktemp("sweep") / "long"
    run_sweep(grid(flags), folder, workers=1)
    return flags, folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_killed_at_any_moment_ends_in_the_same_bytes(workers: int, long_sweep: tuple[str, Path], tmp_path: Path) -> None:
    """Most kills come a moment after a run is done, when the next is written or computed; some in the first two seconds."""
    flags, whole = long_sweep
    argv = [*COMMAND, "sweep", *shlex.split(flags), "--out", str(tmp_path), "--workers", str(workers)]
    dice, kept, kills = random.Random(workers), 0, 0
    lines = tmp_path / "results.jsonl"
    for i in range(KILLS):
        with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + (dice.uniform(0, 2) if i % 4 == 3 else 120)  # the first compilation takes its time
            while process.poll() is None and time.monotonic() < until and lines_of(lines) <= kept:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.1))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        assert lines_of(lines) >= kept  # nothing that was there is lost
        kept = lines_of(lines)
    assert kills >= 0.9 * KILLS  # or it is done too soon
    run_sweep(grid(flags), tmp_path, workers=1)
    same(tmp_path, whole)
    hashes = [json.loads(line)["hash"] for line in lines.read_text().splitlines()]
    assert len(hashes) == len(set(hashes)) == len(grid(flags))  # nothing was done twice


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    argv = [*COMMAND, "sweep", *shlex.split(FLAGS.replace("8s", "90000s")), "--out", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        children = wait_for(lambda: workers_of(process.pid))
        process.kill()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def workers_of(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return workers if len(workers) == 2 else []


def wait_for(what: Any) -> Any:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if value := what():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen within two minutes")


def test_ctrl_c_keeps_what_is_done_and_says_so(undisturbed: Path, tmp_path: Path) -> None:
    argv = [*COMMAND, "sweep", *shlex.split(FLAGS.replace("2..10:2", "2..400:2")), "--out", str(tmp_path), "--workers", "1"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: lines_of(tmp_path / "results.jsonl") >= 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert f"of 400 runs are kept in {tmp_path}" in err
    assert "Traceback" not in err
    before = lines_of(tmp_path / "results.jsonl")
    run_sweep(grid(FLAGS), tmp_path, workers=1)  # fewer values of the same flags: what is there is used
    same(tmp_path, undisturbed)
    assert lines_of(tmp_path / "results.jsonl") < before + 10


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_torn_last_line_is_done_again(cut: int, undisturbed: Path, tmp_path: Path) -> None:
    for name in ("sweep.json", "results.jsonl"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    lines = tmp_path / "results.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-cut])
    run_sweep(grid(FLAGS), tmp_path, workers=1)
    same(tmp_path, undisturbed)
    assert sorted(lines.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_line_that_is_none_is_done_again(undisturbed: Path, tmp_path: Path) -> None:
    for name in ("sweep.json", "results.jsonl"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = b"\0" * len(lines[3][:-1]) + b"\n"
    lines[5] = json.dumps({"hash": json.loads(lines[5])["hash"]}).encode() + b"\n"
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines))
    run_sweep(grid(FLAGS), tmp_path, workers=1)
    same(tmp_path, undisturbed)


def test_a_sweep_that_is_done_runs_nothing(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(config: Any) -> Any:
        raise AssertionError(config)

    monkeypatch.setattr("pagedkv.sims.workers.outcome", never)
    told: list[tuple[int, int]] = []
    run_sweep(grid(FLAGS), undisturbed, workers=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(10, 10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("8s", "9s"), "--duration is 8s there, 9s here"),
        (("tpot:40", "tpot:50"), "--goodput is ttft:400 tpot:40 there, ttft:400 tpot:50 here"),
        (("8s", "8s --seed 3"), "--seed is 0 there, 3 here"),
        (
            ("--num-gpu-blocks-override 100,200", "--num-gpu-blocks-override 100"),
            "--users --num-gpu-blocks-override there, --users here",
        ),
    ],
)
def test_the_folder_of_another_sweep_is_refused(change: tuple[str, str], message: str, undisturbed: Path) -> None:
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    with pytest.raises(ConfigError, match="holds another sweep") as error:
        run_sweep(grid(FLAGS.replace(*change)), undisturbed, workers=1)
    assert message in str(error.value)
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before


def test_another_version_or_a_changed_file_is_another_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("input_tokens,output_tokens\n90,9\n")
    swept = grid(f"--users 1,2 --lengths {lengths} --duration 1s --warmup 0")
    with open_store(tmp_path / "x", swept):
        pass
    lengths.write_text("input_tokens,output_tokens\n90,8\n")
    with pytest.raises(ConfigError, match="has changed since"), open_store(tmp_path / "x", swept):
        pass
    monkeypatch.setattr(sweep_store, "__version__", "9.9")
    with pytest.raises(ConfigError, match=r"pagedkv is .* there, 9\.9 here"), open_store(tmp_path / "x", swept):
        pass


def test_two_sweeps_at_once_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path, grid(FLAGS)), pytest.raises(ConfigError, match="another sweep is writing"):
        run_sweep(grid(FLAGS), tmp_path, workers=1)


@pytest.mark.parametrize("damage", ["{", "[]", '{"base": 3}'])
def test_a_damaged_header_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(damage)
    with pytest.raises(ConfigError, match="cannot read"), open_store(tmp_path, grid(FLAGS)):
        pass


@pytest.mark.parametrize("name", FINAL)
def test_a_file_of_somebody_else_is_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"has a {name} that is no sweep's"), open_store(tmp_path, grid(FLAGS)):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_lines_without_a_header_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"without its sweep\.json"), open_store(tmp_path, grid(FLAGS)):
        pass


def test_a_full_disk_is_said_and_nothing_is_lost(undisturbed: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: a write is cut short, then refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, total: int) -> None:
        if done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "results.jsonl").stat().st_size + 99, hard))

    try:
        with pytest.raises(ConfigError, match="2 finished runs are kept: make room and repeat the command"):
            run_sweep(grid(FLAGS), tmp_path, workers=1, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines()
    assert (len(lines), len(lines[-1])) == (3, 99)  # the last line is torn
    assert not list(tmp_path.glob("results.csv"))
    run_sweep(grid(FLAGS), tmp_path, workers=1)
    same(tmp_path, undisturbed)


def test_a_worker_that_is_killed_is_said(tmp_path: Path) -> None:
    argv = [*COMMAND, "sweep", *shlex.split(FLAGS.replace("8s", "90000s")), "--out", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        os.kill(wait_for(lambda: workers_of(process.pid))[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process was killed" in err
    assert "Traceback" not in err
