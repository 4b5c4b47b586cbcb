"""What the file of a workload says, and must not say; what comes along has sources."""

import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.length_names import load_lengths
from pagedkv.sims.token_lengths import LognormalLengths, SameLength, UniformLengths
from pagedkv.sims.user_class import Turns
from pagedkv.sims.workload_file import load_workload, workload_names

ROOT = Path(__file__).parents[1]
GOOD = (ROOT / "tests/two_classes.toml").read_text("utf-8")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "good.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(text: str) -> Any:
    Path("w.toml").write_text(text)
    return load_workload("w.toml")


def test_a_file_says_what_it_says() -> None:
    chat, agents = load_workload("good.toml")
    assert (chat.name, chat.share, chat.think_time_s, chat.tool_time_s) == ("chat", 0.75, 2.0, None)
    assert chat.turns == Turns(mean=3, varies=True)
    assert (chat.system_prompt_tokens, chat.num_system_prompts) == (200, 2)
    assert chat.prompt == LognormalLengths(mean=100, cv=1)
    assert chat.follow_up == UniformLengths(least=10, most=90)
    assert chat.output == SameLength(tokens=40)
    assert agents.turns == Turns(mean=4)
    assert agents.tool_time_s == 0.1
    assert agents.output.name == "outputs of sharegpt"


def test_a_file_of_lengths_lies_beside_the_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/mine.csv").write_text("input_tokens,output_tokens\n77,9\n")
    (tmp_path / "deep/w.toml").write_text(GOOD.replace('"sharegpt"', '"mine.csv"'))
    drawn = load_workload("deep/w.toml")[1].output.sample(np.random.default_rng(0), 3)
    assert drawn.tolist() == [9, 9, 9]


BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    # a change to GOOD, and what the message says besides the file
    "wrong key": ('tool_time = "100ms"|tool_tme = "1s"', ("class agents", "tool_tme", "did you mean tool_time")),
    "wrong top key": ("[[class]]|clas = 1\n[[class]]", ("'clas'", "did you mean class?", "[[class]]")),
    "wrong type": (
        "prompt = 300|prompt = true",
        ("class agents, prompt", "True is not a length in tokens", "{mean = 500, cv = 1}"),
    ),
    "float": ("prompt = 300|prompt = 3.5", ("class agents, prompt", "3.5 is not a length")),
    "zero": ("prompt = 300|prompt = 0", ("class agents, prompt", "0 is not a whole number from 1")),
    "negative": ("output = 40|output = -4", ("class chat, output", "-4 is not a whole number from 1")),
    "list": ("output = 40|output = [4]", ("class chat, output", "[4] is not a length")),
    "empty range": ("{ min = 10, max = 90 }|{ min = 10, max = 9 }", ("class chat, follow_up.max", "9 is not", "from 10")),
    "half a range": ("{ min = 10, max = 90 }|{ min = 10 }", ("class chat, follow_up", "has no max", "go together")),
    "half a lognormal": ("{ mean = 100, cv = 1 }|{ mean = 100 }", ("class chat, prompt", "has no cv", "mean and cv go together")),
    "wrong part": ("{ mean = 100, cv = 1 }|{ mean = 100, sd = 1 }", ("class chat, prompt", "unknown key", "'sd'")),
    "mean": ("{ mean = 100, cv = 1 }|{ mean = 0.5, cv = 1 }", ("class chat, prompt.mean", "0.5 is not a number from 1")),
    "nan": ("{ mean = 100, cv = 1 }|{ mean = 100, cv = nan }", ("class chat, prompt.cv", "nan is not a number")),
    "unknown distribution": (
        '"sharegpt"|"shargpt"',
        ("class agents, output", "unknown length distribution 'shargpt'", "did you mean sharegpt?"),
    ),
    "no such file": ('"sharegpt"|"absent.csv"', ("class agents, output", "absent.csv: cannot be read")),
    "time": ('"2s"|"soon"', ("class chat, think_time", "'soon' is not a time", "20s")),
    "negative time": ('"2s"|-2', ("class chat, think_time", "-2 is not a number from 0")),
    "time of a wrong type": ('"2s"|[2]', ("class chat, think_time", "[2] is not a time")),
    "no think time": ('think_time = "2s"|', ("class chat, think_time", "missing", '"0s" for a batch')),
    "no prompt": ("prompt = 300|", ("class agents, prompt", "missing", "sharegpt")),
    "no follow-up": ("follow_up = 200|", ("class agents, follow_up", "missing", "what later requests add")),
    "follow-up for nobody": ("turns = 4|turns = 1", ("class agents, follow_up", "turns = 5")),
    "turns": ("turns = 4|turns = 0", ("class agents, turns", "0 is not a whole number from 1")),
    "half a turn": ("{ mean = 3 }|{ mean = 0.5 }", ("class chat, turns.mean", "0.5 is not a number from 1")),
    "turns of another kind": ("{ mean = 3 }|{ max = 3 }", ("class chat, turns", "{mean = 5}")),
    "system prompt": ("tokens = 200, number = 2|tokens = 200", ("class chat, system_prompt", "has no number")),
    "no system prompts": ("number = 2|number = 0", ("class chat, system_prompt.number", "0 is not")),
    "shares": ("share = 0.25|share = 0.35", ("chat, agents", "0.75 + 0.35 = 1.1", "must sum to 1")),
    "share": ("share = 0.25|share = 1.25", ("class agents, share", "1.25 is not a number", "to 1")),
    "two numbers": ("share = 0.25|share = 0.25\nusers = 3", ("class agents", "users and share contradict")),
    "no number": ("share = 0.25|", ("class agents", "how many are they", "users", "request_rate")),
    "users": ("share = 0.25|users = 2.5", ("class agents, users", "2.5 is not a whole number")),
    "rate": ('share = 0.25\nthink_time = "3s"|request_rate = -1', ("class agents, request_rate", "-1 is not a number")),
    "sessions at a rate": ("share = 0.25|request_rate = 1\nsessions = 3", ("class agents, sessions", "per user")),
    "thinking at a rate": ("share = 0.25|request_rate = 1", ("class agents, think_time", "says nothing here")),
    "same name": ('name = "agents"|name = "chat"', ("2 classes are named 'chat'",)),
    "no name": ('name = "agents"|', ("class 2, name", "missing")),
    "odd name": ('name = "agents"|name = 3', ("class 2, name", "3 is no name")),
    "source of nothing": ("output = 40|output = 40\nsource = { tool_time = 'x' }", ("class chat, source", "tool_time")),
    "syntax": ("output = 40|output = = 40", ("cannot be read as a workload", "line 9")),
    "no classes": (GOOD + "|", ("no classes", "[[class]]")),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_in_a_file_is_explained(mistake: str) -> None:
    change, parts = BAD[mistake]
    before, _, after = change.partition("|")
    assert before in GOOD
    try:
        loaded(GOOD.replace(before, after, 1))
    except ConfigError as error:
        message = str(error)
    else:
        raise AssertionError("it was taken")
    assert "w.toml" in message
    assert "\n" not in message
    for part in parts:
        assert part in message


BAD_FLAGS: dict[str, tuple[str, ...]] = {
    "--workload cat --users 5": ("unknown workload 'cat'", "did you mean chat", ".toml"),
    "--workload absent.toml --users 5": ("absent.toml", "cannot be read", "No such file"),
    "--workload chat": ("--workload chat", "say how many, e.g. --users 100"),
    "--workload fixed.toml --users 5": ("--users 5", "no use", "fixed.toml"),
    "--workload chat --request-rate 5": ("--workload goes with --users, not with --request-rate",),
    "--workload chat --users 5 --think-time 3s": ("--think-time", "--workload chat", "classes say that themselves"),
    "--workload chat --users 5 --lengths sharegpt": ("--lengths", "--workload chat"),
    "--workload chat --users 5 --prefix-len 9": ("--prefix-len", "--workload chat"),
    "--workload agents --users 5 --max-model-len 4096": ("class agents", "8002 tokens", "--max-model-len 8002"),
    "--workload long.toml --users 5 --over-length drop": ("class chat", "one session in a thousand", "--over-length drop"),
    "max-context --users 5 --workload chat": ("--workload contradicts max-context",),
}


@pytest.mark.parametrize("arguments", BAD_FLAGS)
def test_a_flag_that_cannot_be_is_explained(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fixed.toml").write_text(GOOD.replace("share = 0.75", "users = 3").replace("share = 0.25", "users = 1"))
    Path("long.toml").write_text(GOOD.replace("{ mean = 100, cv = 1 }", "{ mean = 900000, cv = 0.1 }"))
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(arguments))
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1)
    for part in BAD_FLAGS[arguments]:
        assert part in err


# --- what comes along -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", workload_names())
def test_every_number_that_comes_along_has_a_source(name: str) -> None:
    assert set(workload_names()) == {"chat", "agents", "reasoning", "batch", "mixed-office"}
    document = tomllib.loads((ROOT / f"sims/workloads/{name}.toml").read_text("utf-8"))
    assert document["description"]
    for table in document["class"]:
        assert set(table["source"]) == set(table) - {"name", "source"}
        assert all(table["source"].values())


def test_lengths_that_are_said_to_be_sharegpts_are(shared_data: Path) -> None:
    rows = load_lengths(str(shared_data / "sharegpt_lengths.csv.gz"))
    prompts, outputs = rows.prompt_tokens, rows.output_tokens  # type: ignore[attr-defined]
    fits = prompts + outputs <= 8192
    (chat,) = load_workload("chat")
    assert fits.sum() == 58_724
    for lengths, said in ((prompts[fits], chat.prompt), (outputs[fits], chat.output)):
        assert isinstance(said, LognormalLengths)
        assert said.mean == pytest.approx(lengths.mean(), rel=0.005)
        assert said.cv == pytest.approx(lengths.std() / lengths.mean(), rel=0.02)
