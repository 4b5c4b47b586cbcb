"""max-users and max-context of several engines: each has the answer that it has alone, or says why it has none."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pagedkv.sims.cli import main

FLAGS = (
    "--think-time 1s --random-output-len 60 --hardware rtx-4090 --max-model-len 1024 --duration 20s --warmup 4s --goodput ttft:900"
)
USERS = f"max-users {FLAGS} --random-input-len 400 --random-range-ratio 0.5"
CONTEXT = f"max-context {FLAGS} --users 2"


def asked(capsys: pytest.CaptureFixture[str], command: str) -> Any:
    main(shlex.split(f"{command} --json -"))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("question", [USERS, CONTEXT], ids=["users", "context"])
def test_each_engine_answers_as_it_does_alone(question: str, capsys: pytest.CaptureFixture[str]) -> None:
    together = asked(capsys, f"{question} --engine vllm,ollama")
    assert [(each.pop("engine"), each.pop("weights")) for each in together["answers"]] == [
        ("vllm", "bf16"),
        ("ollama", "q4_k_m"),
    ]
    assert together["refused"] == {}
    for engine, answer in zip(("vllm", "ollama"), together["answers"], strict=True):
        alone = asked(capsys, f"{question} --engine {engine}")
        assert alone["answers"] == [answer]
        assert together["configs"][engine] == alone["config"]
        for name in ("schema_version", "question", "unit", "attain"):
            assert alone[name] == together[name]
    assert together["config"]["engine"] == "vllm,ollama"


def test_the_terminal_has_a_column_for_each_and_says_who_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"{USERS} --engine vllm,ollama,vllm --quantization fp8"))
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if line.startswith(("  ", "weights"))][:2] == [["vllm"], ["weights", "fp8"]]
    assert "ollama has no answer: --quantization fp8: ollama does not read it" in out.replace("\n", " ")
    document = asked(capsys, f"{USERS} --engine vllm,ollama --quantization fp8")
    assert list(document["refused"]) == ["ollama"]
    assert list(document["configs"]) == [each["engine"] for each in document["answers"]] == ["vllm"]


def test_an_engine_asked_about_several_allocators_has_a_column_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"{USERS} --engine orca,vllm --allocator contiguous-oracle,contiguous-max --kv-cache-memory-bytes 1GiB"))
    out = capsys.readouterr().out
    for name in ("orca contiguous-oracle", "orca contiguous-max", "vllm contiguous-oracle", "vllm contiguous-max"):
        assert name in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("max-users --engine vllm,olama", "unknown engine 'olama': did you mean ollama"),
        ("max-users --engine vllm,ollama --users 3", "--users contradicts max-users"),
        ("max-users --engine vllm,ollama --attain 2", "--attain is 2"),
        ("max-users --engine vllm,ollama --report {folder}/x.html", "--report shows the search of one engine"),
        ("max-users --engine vllm,ollama --page-size 4", "it is for --engine sglang"),
        ("max-context --engine vllm,ollama", "max-context needs a number of users"),
        ("max-users --engine vllm,ollama --model llama-3.1-405b", "no engine has an answer. vllm: "),
        ("max-users --engine , ", "no engine given"),
    ],
)
def test_mistakes(flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(flags.format(folder=tmp_path)))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert said in err
    assert not list(tmp_path.iterdir())
