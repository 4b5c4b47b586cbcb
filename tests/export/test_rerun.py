"""A result folder says what the run was, so that it runs again to the same bytes, and is not written over by another."""

import contextlib
import io
import json
import tomllib
from pathlib import Path

import pytest
from result_folders import CLOSED, FILES, REPORT, documents, one_line

from pagedkv.sims.cli import main
from pagedkv.sims.engines import ENGINES

OPEN = (
    "--request-rate 2.5 --burstiness 0.5 --duration 20s --warmup 5s --lengths sharegpt --over-length drop --seed 7 "
    "--hardware rtx-4090 --model qwen2.5-7b"
).split()
DRAINED = "--request-rate 2.5 --num-prompts 12 --random-input-len 90 --random-output-len 9 --random-range-ratio 0.3".split()
REPLAY = "--trace a\\b;[t]'é.csv --trace-rate 1.7 --num-prompts 30 --max-model-len 1000 --quantization fp8 --enforce-eager".split()
TRACE = "".join(f"{0.37 * i:.3f},{17 + 31 * i},{1 + i % 7}\n" for i in range(40))


@pytest.fixture(scope="module", params=[CLOSED, OPEN, DRAINED, REPLAY], ids=["closed", "open", "drained", "trace"])
def rerun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run, and with the run of its configuration, and what both printed."""
    here = tmp_path_factory.mktemp("rerun")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.chdir(here)
        Path("a\\b;[t]'é.csv").write_text(f"arrival_s,input_tokens,output_tokens\n{TRACE}")
        main([*request.param, "--out", "first"])
        patch.setattr(REPORT, one_line)
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
def test_the_configuration_of_every_engine_gives_the_same_bytes_again(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main(f"--users 6 --duration 3s --warmup 1s --engine {engine} --out first".split())
    monkeypatch.setattr(REPORT, one_line)
    main(["--config", "first/config.toml", "--out", "second"])
    for name in FILES:
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes(), name


@pytest.mark.parametrize(
    "times",
    ["--duration 9s --warmup 1.2345678s", "--duration 9s --think-time 2.3456789s", "--duration 1us", "--duration 1234567.5us"],
)
@pytest.mark.usefixtures("undrawn")
def test_times_are_kept_to_the_digit(times: str) -> None:
    main(["--users", "9", *times.split(), "--out", "first"])
    main(["--config", "first/config.toml", "--out", "second"])
    first, second = documents()
    assert first == second


@pytest.mark.usefixtures("undrawn")
def test_the_configuration_names_every_setting_once() -> None:
    main([*CLOSED, "--out", "r"])
    config, summary = tomllib.loads(Path("r/config.toml").read_text("utf-8")), json.loads(Path("r/summary.json").read_text("utf-8"))
    assert {name.replace("-", "_"): value for name, value in config.items()} == {
        k: v for k, v in summary["config"].items() if v is not None
    }
    assert config["goodput"] == ["ttft:150", "tpot:90"]


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
def test_engines_are_not_written_over_others(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--users 1 --engine vllm,ollama --duration 2s --warmup 0s --out r".split()
    main(words)
    main(words)
    with pytest.raises(SystemExit):
        main([*words, "--think-time", "1s"])
    assert "holds another run" in capsys.readouterr().err
    main([*words, "--think-time", "1s", "--overwrite"])
