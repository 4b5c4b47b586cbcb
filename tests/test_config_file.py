"""--config: a file that --out wrote answers other questions too, from any folder; flags win, and what is not used is refused."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pagedkv.sims.cli import main
from pagedkv.sims.config_file import ASKED_FOR, file_text, read_settings, with_files, without_other_loads
from pagedkv.sims.config_words import parse_config
from pagedkv.sims.sweep_grid import parse_grid

SMALL = "--hardware rtx-4090 --max-model-len 1024 --num-gpu-blocks-override 300 --duration 8s --warmup 2s --think-time 1s"
RUN = f"--users 3 {SMALL} --goodput ttft:900 tpot:60"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("input_tokens,output_tokens\n300,40\n500,60\n")
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    main([*shlex.split(words), "--json", "-"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def refused(capsys: pytest.CaptureFixture[str], words: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(words))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    return err


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["run", "deep/er/run", "."])
def test_a_file_is_found_from_any_folder(
    out: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "trace.csv").write_text("arrival,input,output\n0,90,9\n1.5,80,8\n")
    main(shlex.split(f"--trace trace.csv --allocator paged --hardware rtx-4090 --out {out}"))
    here = answer(capsys, f"--config {out}/config.toml") if not capsys.readouterr().err.startswith("error") else {}
    assert here["config"]["trace"] == "trace.csv"
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    there = answer(capsys, f"--config ../{out}/config.toml")
    assert there["results"][0]["num_finished"] == here["results"][0]["num_finished"] == 2
    assert there["config"]["trace"] == "../trace.csv"


def test_names_and_absolute_paths_stay(folder: Path) -> None:
    absolute = str(folder / "rows.csv")
    settings = {"model": "llama-3.1-8b", "lengths": absolute, "hardware": "rtx-4090", "trace": None}
    (folder / "c.toml").write_text(file_text(settings, folder / "x"))
    assert read_settings("c.toml") == {name: value for name, value in settings.items() if value is not None}


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("config", 'think-time = "1s"\n'),
        (
            "workload",
            '[[class]]\nname = "a"\nusers = 2\nthink_time = "1s"\nprompt = { mean = 90, cv = 1 }\noutput = { mean = 9, cv = 1 }\n',
        ),
        ("hardware", 'like = "rtx-4090"\n'),
    ],
)
def test_the_mark_that_windows_puts_before_a_file_is_no_error(
    flag: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{SMALL.replace('--hardware rtx-4090', '') if flag == 'hardware' else SMALL} --allocator paged --{flag} f.toml"
    words = words.replace("--think-time 1s", "") if flag != "hardware" else words
    words += "" if flag == "workload" else " --users 2"
    (folder / "f.toml").write_text(text, encoding="utf-8")
    plain = answer(capsys, words)
    (folder / "f.toml").write_text(text, encoding="utf-8-sig")
    assert answer(capsys, words)["results"] == plain["results"]


# --- questions ------------------------------------------------------------------------------------------------------


def test_a_run_answers_how_many_users(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"{RUN} --lengths rows.csv --out run"))
    capsys.readouterr()
    main(shlex.split("max-users --config run/config.toml --json -"))
    out, err = capsys.readouterr()
    assert err.startswith("'run/config.toml': users 3 is left aside: max-users looks for it")
    asked = answer(capsys, f"max-users {SMALL} --lengths rows.csv --goodput ttft:900 tpot:60")
    assert json.loads(out)["answers"] == asked["answers"]


def test_a_run_answers_how_long_a_context(capsys: pytest.CaptureFixture[str]) -> None:
    small = SMALL.replace("--max-model-len 1024 ", "").replace(" 300", " 2500")
    main(shlex.split(f"--users 3 {small} --lengths rows.csv --out run"))
    capsys.readouterr()
    asked = answer(capsys, f"max-context --users 3 {small} --random-output-len 20")
    assert answer(capsys, "max-context --config run/config.toml --random-output-len 20")["answers"] == asked["answers"]


def test_flags_override_a_file_in_every_question(folder: Path) -> None:
    (folder / "c.toml").write_text("users = 9\nthink-time = '2s'\nseed = 3\nenforce_eager = true\ngoodput = ['ttft:9', 'tpot:8']\n")
    words, notes = with_files("advise", ["--seed", "4", "--no-enforce-eager"], ["c.toml"])
    assert not notes
    config = parse_config(words)
    assert (config.load.users, config.load.think_time, config.measurement.seed) == (9, "2s", 4)
    assert not config.serving.enforce_eager
    assert config.measurement.goodput == ("ttft:9", "tpot:8")


def test_a_sweep_takes_what_it_does_not_sweep_from_a_file(folder: Path) -> None:
    (folder / "a,b.csv").write_text("input_tokens,output_tokens\n300,40\n")
    (folder / "c.toml").write_text("users = 9\nlengths = 'a,b.csv'\nallocator = ['paged']\ngoodput = ['ttft:9', 'tpot:8']\n")
    words, _ = with_files("sweep", ["--users", "1,2"], ["c.toml"])
    grid = parse_grid(words)
    assert [(axis.name, axis.values) for axis in grid.axes] == [("users", (1, 2))]
    assert grid.base.load.lengths == "a,b.csv"
    assert grid.base.measurement.goodput == ("ttft:9", "tpot:8")


def test_defaults_that_a_file_spells_out_are_nobodys_wish(capsys: pytest.CaptureFixture[str]) -> None:
    """`--out` writes every setting; what it writes without being asked does not keep `advise` from trying others."""
    main(shlex.split("--users 2 --hardware rtx-4090 --duration 2s --warmup 0 --max-num-seqs 9 --out run"))
    capsys.readouterr()
    words, _ = with_files("advise", [], ["run/config.toml"])
    config = parse_config(words)
    assert config.serving.max_num_seqs == 9
    assert config.serving.max_num_batched_tokens is config.serving.gpu_memory_utilization is config.serving.max_model_len is None
    assert config.measurement.allocator is None


@pytest.mark.parametrize("command", list(ASKED_FOR))
def test_what_a_file_may_not_say(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "usres = 3\n": ("unknown key of 'c.toml' 'usres'", "did you mean users"),
        "users = 'many'\n": ("'c.toml'", "users"),
        "config = 'd.toml'\n": ("names another configuration",),
        "users = ": ("cannot read the configuration 'c.toml'",),
    }
    if command != "sweep":
        cases["request-rate = 2.0\n"] = ("'c.toml' has request-rate = 2.0", f"which {command} does not use: its load is users")
        cases["trace-rate = 2.0\n"] = ("'c.toml' has trace-rate = 2.0",)
    out = " --users 1,2 --out x" if command == "sweep" else ""
    for text, parts in cases.items():
        (folder / "c.toml").write_text(text)
        err = refused(capsys, f"{command} --config c.toml{out}")
        assert all(part in err for part in parts), err
    assert "cannot read the configuration 'absent.toml'" in refused(capsys, f"{command} --config=absent.toml{out}")


@pytest.mark.parametrize("command", list(ASKED_FOR))
def test_help_says_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    assert "--config" in capsys.readouterr().out


# --- another load ---------------------------------------------------------------------------------------------------


def test_a_window_that_was_the_other_loads_default_does_not_survive_it(folder: Path) -> None:
    def kept(text: str, given: set[str]) -> dict[str, Any]:
        (folder / "c.toml").write_text(text)
        return without_other_loads(read_settings("c.toml"), given)

    users = 'users = 10\nduration = "600s"\nwarmup = "1m"\n'
    assert kept(users, {"trace"}) == kept(users, {"request_rate", "num_prompts"}) == {}
    assert kept(users, {"num_prompts"}) == {"users": 10}
    assert kept(users, {"seed"}) == {"users": 10, "duration": "600s", "warmup": "1m"}
    wished = 'users = 10\nduration = "30s"\nwarmup = "5s"\n'
    assert kept(wished, {"trace"}) == {"duration": "30s", "warmup": "5s"}
    trace = 'trace = "t.csv"\nwarmup = "0s"\n'
    assert kept(trace, {"users"}) == {}
    assert kept(trace.replace("0s", "60s"), {"users"}) == {"warmup": "60s"}
    assert kept('users = 1\nwarmup = "soon"\n', {"trace"}) == {"warmup": "soon"}  # is refused where it is read


def test_a_trace_in_the_place_of_users_is_measured_from_its_first_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.csv").write_text("arrival,input,output\n0,90,9\n1.5,80,8\n")
    (folder / "c.toml").write_text('users = 10\nduration = "600s"\nwarmup = "60s"\nhardware = "rtx-4090"\nmax-model-len = 1024\n')
    found = answer(capsys, "--config c.toml --trace t.csv --allocator paged")
    assert found["results"][0]["num_finished"] == 2
    assert found["config"]["warmup"] == "0s"
