"""The result folder: files that say what the run was, whole or not at all, and that run again to the same bytes."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.config_file import file_text
from pagedkv.sims.engines import ENGINES
from pagedkv.sims.export import REQUEST_COLUMNS, prepare_folder, to_json, write_atomically
from pagedkv.sims.recording import KV_KINDS
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import rerun_settings
from pagedkv.sims.scenario import Scenario, resolve

FILES = {"config.toml", "summary.json", "requests.csv", "timeline.csv", "metrics.prom", "trace.json"}
CLOSED = "--users 9 --think-time 2s --duration 20s --warmup 5s --repeats 2 --goodput ttft:150 tpot:90 --watermark 0.01".split()
OPEN = (
    "--request-rate 2.5 --burstiness 0.5 --duration 20s --warmup 5s --lengths sharegpt --over-length drop --seed 7 "
    "--hardware rtx-4090 --model qwen2.5-7b"
).split()
DRAINED = "--request-rate 2.5 --num-prompts 12 --random-input-len 90 --random-output-len 9 --random-range-ratio 0.3".split()
REPLAY = "--trace a\\b;[t]'é.csv --trace-rate 1.7 --num-prompts 30 --max-model-len 1000 --quantization fp8 --enforce-eager".split()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents() -> list[dict[str, Any]]:
    """Return both summaries without the proposals, which are not results."""
    both = [json.loads(Path(folder, "summary.json").read_text("utf-8")) for folder in ("first", "second")]
    for document in both:
        for result in document["results"]:
            del result["verdict"]["next_command"]
    return both


TRACE = "".join(f"{0.37 * i:.3f},{17 + 31 * i},{1 + i % 7}\n" for i in range(40))


@pytest.fixture(scope="module", params=[CLOSED, OPEN, DRAINED, REPLAY], ids=["closed", "open", "drained", "trace"])
def rerun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run, and with the run of its configuration, and what both printed."""
    here = tmp_path_factory.mktemp("rerun")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.chdir(here)
        Path("a\\b;[t]'é.csv").write_text(f"arrival_s,input_tokens,output_tokens\n{TRACE}")
        main([*request.param, "--out", "first"])
        main(["--config", "first/config.toml", "--out", "second"])
    return here, shown.getvalue()


def test_the_configuration_gives_the_run_again(rerun: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    here, shown = rerun
    monkeypatch.chdir(here)
    assert {path.name for path in Path("first").iterdir()} >= FILES
    for name in FILES - {"summary.json"}:
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()
    first, second = documents()
    assert first == second
    first_shown, second_shown = (f"{title}{half}" for title in [shown.split("\n")[0]] for half in shown.split(title)[1:])
    assert first_shown.split() == second_shown.split() != []


def test_the_configuration_gives_the_same_bytes_again(rerun: tuple[Path, str]) -> None:
    here, _ = rerun
    assert (here / "first" / "summary.json").read_bytes() == (here / "second" / "summary.json").read_bytes()


@pytest.mark.parametrize("engine", ENGINES.names())
def test_the_configuration_of_every_engine_gives_the_same_bytes_again(engine: str) -> None:
    main(f"--users 6 --duration 3s --warmup 1s --engine {engine} --out first".split())
    main(["--config", "first/config.toml", "--out", "second"])
    for name in FILES:
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes(), name


def resolved(argv: list[str]) -> Scenario:
    """Return the scenario that the command line `argv` runs."""
    with mock.patch("pagedkv.sims.scenario.resolve", side_effect=ConfigError("seen")) as asked, pytest.raises(SystemExit):
        main(argv)
    return resolve(asked.call_args[0][0])


@pytest.mark.parametrize(
    "flags",
    [
        "--engine vllm --max-model-len 2000 --no-enable-chunked-prefill",
        "--engine vllm --max-model-len 2000 --no-enable-chunked-prefill --max-num-batched-tokens 2100",
        "--engine naive --max-model-len 2000",
        "--engine naive --max-num-seqs 3",
        "--engine orca --max-model-len 50000 --max-num-seqs 7",
        "--engine vattention --no-enable-chunked-prefill",
        "--engine llama-cpp",
        "--engine llama-cpp --max-num-seqs 4",
        "--engine llama-cpp --max-num-seqs 4 --no-kv-unified",
        "--engine llama-cpp --max-num-seqs 6 --kv-unified",
        "--engine llama-cpp --max-num-seqs 3000 --kv-unified --max-num-batched-tokens 3000",
        "--engine llama-cpp --parallel 3",
        "--engine llama-cpp --parallel 3 --kv-unified",
        "--engine llama-cpp --kv-unified",
        "--engine llama-cpp --no-kv-unified",
        "--engine llama-cpp --parallel 4 --ctx-size 20000 --max-model-len 4000",
        "--engine ollama --parallel 2",
        "--engine ollama --max-num-seqs 2 --ctx-size 8192",
    ],
)
def test_what_an_engine_decides_is_written_down_so_that_it_is_decided_again(flags: str) -> None:
    """Filled-in limits may read as another wish: llama-server's slots share their cells only if nobody says how many there are."""
    first = resolved(["--users", "6", *flags.split()])
    Path("config.toml").write_text(file_text(rerun_settings(first), Path()), encoding="utf-8")
    second = resolved(["--config", "config.toml"])
    assert second.deployment.scheduler == first.deployment.scheduler
    assert second.deployment.budget == first.deployment.budget
    assert second.allocators == first.allocators
    assert second.config == first.config, "the proposals of both are worded alike"
    for allocator in first.allocators:
        first.deployment.scheduler_over(allocator)  # which an engine refuses on memory that is not its own
    assert rerun_settings(resolve(first.config)) == rerun_settings(first), "what is left out says nothing"


@pytest.mark.parametrize(
    "times",
    ["--duration 9s --warmup 1.2345678s", "--duration 9s --think-time 2.3456789s", "--duration 1us", "--duration 1234567.5us"],
)
def test_times_are_kept_to_the_digit(times: str) -> None:
    main(["--users", "9", *times.split(), "--out", "first"])
    main(["--config", "first/config.toml", "--out", "second"])
    first, second = documents()
    assert first == second


def test_the_configuration_names_every_setting_once() -> None:
    main([*CLOSED, "--out", "r"])
    config, summary = tomllib.loads(Path("r/config.toml").read_text("utf-8")), json.loads(Path("r/summary.json").read_text("utf-8"))
    assert {name.replace("-", "_"): value for name, value in config.items()} == {
        k: v for k, v in summary["config"].items() if v is not None
    }
    assert config["goodput"] == ["ttft:150", "tpot:90"]


def test_a_run_is_not_written_over_another(capsys: pytest.CaptureFixture[str]) -> None:
    """The same again is the same run; another is refused before it runs, and --overwrite replaces the first."""
    short = "--duration 2s --warmup 0s --out r"
    main(f"--users 2 {short}".split())
    kept = Path("r/summary.json").read_bytes()
    main(f"--users 2 {short}".split())
    main(["--config", "r/config.toml", "--out", "r"])
    with pytest.raises(SystemExit) as refused:
        main(f"--users 3 {short}".split())
    assert refused.value.code == 2
    assert "'r' holds another run" in capsys.readouterr().err
    assert json.loads(kept)["config"] == json.loads(Path("r/summary.json").read_bytes())["config"]
    main(f"--users 3 {short} --overwrite".split())
    assert json.loads(Path("r/summary.json").read_bytes())["config"]["users"] == 3


def test_engines_are_not_written_over_others(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--users 1 --engine vllm,ollama --duration 2s --warmup 0s --out r".split()
    main(words)
    main(words)
    with pytest.raises(SystemExit):
        main([*words, "--think-time", "1s"])
    assert "holds another run" in capsys.readouterr().err
    main([*words, "--think-time", "1s", "--overwrite"])


def rows(name: str) -> list[dict[str, str]]:
    with Path(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_requests_are_one_row_each_and_add_up_to_the_summary() -> None:
    main([*CLOSED, "--out", "r"])
    summary = json.loads(Path("r/summary.json").read_text("utf-8"))
    requests = rows("r/requests.csv")
    assert list(requests[0]) == REQUEST_COLUMNS
    for result in summary["results"]:
        mine = [r for r in requests if r["allocator"] == result["allocator"]]
        for repeat in ("0", "1"):
            numbers = [int(r["request"]) for r in mine if r["repeat"] == repeat]
            assert numbers == list(range(len(numbers)))
        measured = [r for r in mine if r["measured"] == "1"]
        assert [r["measured"] == "1" for r in mine] == [float(r["arrival_s"]) >= 5.0 for r in mine]
        assert len(measured) == result["num_injected"]
        for outcome in Outcome:
            assert sum(r["outcome"] == outcome.name.lower() for r in measured) == result[f"num_{outcome.name.lower()}"]
    for r in requests:
        instants = [r["arrival_s"], r["scheduled_s"], r["first_token_s"], r["last_token_s"]]
        known = [float(t) for t in instants if t]
        assert known == sorted(known)
        assert [bool(t) for t in instants] == sorted((bool(t) for t in instants), reverse=True)
        assert bool(r["first_token_s"]) == (int(r["num_output_tokens"]) > 0)
        assert (r["outcome"] == "finished") == (r["num_output_tokens"] == r["output_tokens"])


def test_the_timeline_tiles_the_run_and_means_the_same() -> None:
    main("--users 9 --think-time 2s --duration 20s --warmup 0 --out r".split())
    summary = json.loads(Path("r/summary.json").read_text("utf-8"))
    for result in summary["results"]:
        mine = [r for r in rows("r/timeline.csv") if r["allocator"] == result["allocator"]]
        seconds = [float(r["observed_s"]) for r in mine]
        assert math.fsum(seconds) == pytest.approx(20.0)
        assert [float(r["start_s"]) for r in mine] == list(range(20))
        for r in mine:
            assert math.fsum(float(r[f"kv_{kind}"]) for kind in KV_KINDS) == pytest.approx(1.0, abs=1e-6)
        for column, expected in (
            ("running", result["running_mean"]),
            ("waiting", result["waiting_mean"]),
            ("kv_tokens", result["kv"]["tokens"]),
        ):
            assert math.fsum(s * float(r[column]) for s, r in zip(seconds, mine, strict=True)) / 20 == pytest.approx(
                expected, abs=1e-8
            )


def test_no_number_that_json_does_not_know() -> None:
    assert json.loads(to_json({"a": [1.5, None, "é"]})) == {"a": [1.5, None, "é"]}
    assert "é" in to_json({"a": "é"})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json({"a": value})
    assert json.loads(to_json({"a": 0.1 + 0.2}))["a"] == 0.1 + 0.2


# --- whole or not at all --------------------------------------------------------------------------------------------

SMALL = "--users 3 --think-time 1s --duration 3s --warmup 0 --out r".split()


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def on_call(number: int, original: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Return `original`, except that its call `number` (from 0) raises."""
    calls = iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return original(*args, **kwargs)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The result folder of one run, and what another would leave there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        main([*SMALL, "--seed", "2"])
        other = contents("r")
        shutil.rmtree("r")
        main([*SMALL, "--seed", "1"])
        return Path("r").absolute(), other


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(
    ("owner", "name", "error", "code"),
    [
        (Path, "replace", KeyboardInterrupt(), 130),
        (os, "fsync", KeyboardInterrupt(), 130),
        (os, "fsync", OSError(28, "No space left"), 2),
    ],
    ids=["interrupted at the end", "interrupted while writing", "disk full"],
)
def test_whatever_stops_writing_leaves_whole_files(
    owner: Any,
    name: str,
    error: BaseException,
    code: int,
    number: int,
    whole: tuple[Path, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, new = whole
    shutil.copytree(written, "r")
    old = contents("r")
    monkeypatch.setattr(owner, name, on_call(number, getattr(owner, name), error))
    with pytest.raises(SystemExit) as exit:
        main([*SMALL, "--seed", "2", "--overwrite"])
    assert exit.value.code == code
    after = contents("r")
    assert after.keys() == old.keys()  # nothing half-written lies about
    assert sum(after[file] == new[file] for file in FILES) == number
    assert all(after[file] in (old[file], new[file]) for file in FILES)


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit):
        main(SMALL)
    assert contents("r") == {}
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"error: cannot write {os.path.join('r', 'config.toml')!r}: No space left on device"  # noqa: PTH118


def test_a_new_file_has_the_permissions_of_any_other(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(folder / "x", "text")
    finally:
        os.umask(before)
    assert (folder / "x").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_made_or_refused(folder: Path) -> None:
    prepare_folder(folder / "a" / "b")
    assert list((folder / "a" / "b").iterdir()) == []
    (folder / "file").write_text("")
    for bad in (folder / "file", folder / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"cannot write results to '{bad}': .*Give --out a folder that you may write to"):
            prepare_folder(bad)


def test_a_pipe_stays_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(folder / "pipe", "text")
    except ConfigError:
        pass
    finally:
        os.close(reader)
    assert (folder / "pipe").is_fifo()
