"""`serve` from the command line: it says where it is, ends cleanly on a signal, and refuses what cannot be."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagedkv.sims.cli import main

ROOT = Path(__file__).parents[2]


def failing(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(command))
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert "pip install 'pagedkv[serve]'" in failing("serve --simulated", capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "give one of --simulated, --model FOLDER and --random-weights CONFIG"),
        ("--simulated --engine sglang", "--engine sglang cannot be served yet: use --engine vllm"),
        ("--simulated --engine vllm,sglang", "cannot be served yet"),
        ("--simulated --replicas 2", "--replicas and --fault are for simulate"),
        ("--simulated --model nonsense", "unknown model"),
        ("--simulated --lengths nonsense", "unknown length distribution"),
        ("--simulated --dtype float32", "--dtype float32 goes without --simulated"),
        ("--simulated --speed 0", "--speed is 0.0: needs more than 0"),
        ("--simulated --port 70000", "--port is 70000"),
        ("--simulated --seed -3", "--seed is -3: needs 0 to"),
        ("--model . --seed 99999999999999999999", "needs 0 to 9223372036854775807"),
        ("--simulated --max-queue 0", "--max-queue is 0"),
        ("--simulated --shutdown-timeout soon", "shutdown-timeout 'soon' is not a time"),
        ("--model . --speed 2", "--speed 2.0 needs --simulated"),
        ("--model . --hardware h100", "--hardware h100 says nothing to a model that really runs"),
        ("--model . --random-weights .", "give one of"),
        ("--model . --speculative-model .", "needs --speculative-model and --num-speculative-tokens"),
        ("--model . --speculative-method ngram", "--speculative-method ngram says nothing to a model that really runs"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
    pytest.importorskip("uvicorn", reason="and of uvicorn")
    assert says in failing(f"serve {flags}", capsys)


@contextmanager
def serving(flags: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
    pytest.importorskip("uvicorn", reason="and of uvicorn")
    code = "from pagedkv.sims.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--simulated", "--port", "0", *shlex.split(flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "it ended before it listened"
            found = re.search(r"as '(.+)' on (http://\S+);", line)
        yield process, found[2]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("number", "timeout", "reason"),
    [(signal.SIGINT, "0s", "abort"), (signal.SIGTERM, "0s", "abort"), (signal.SIGTERM, "50s", "length")],
)
def test_a_signal_ends_it_and_streams_end_in_their_format(number: signal.Signals, timeout: str, reason: str) -> None:
    httpx = pytest.importorskip("httpx", reason="the tests' client is httpx")
    with serving(f"--speed 20 --shutdown-timeout {timeout}") as (process, url):
        body = {"prompt": "Tell me", "max_tokens": 300, "stream": True, "stream_options": {"include_usage": True}}
        lines = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not lines:
                    process.send_signal(number)
                lines += [line] * bool(line)
        *chunks, usage = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert lines[-1] == "data: [DONE]"
        assert chunks[-1]["choices"][0]["finish_reason"] == reason
        tokens = usage["usage"]["completion_tokens"]
        assert tokens == 300 if reason == "length" else 0 < tokens < 300
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_second_signal_ends_answers_that_the_first_let_go_on() -> None:
    httpx = pytest.importorskip("httpx", reason="the tests' client is httpx")
    with serving("--speed 20 --shutdown-timeout 1h --max-model-len 100000") as (process, url):
        body = {"prompt": "Tell me", "max_tokens": 90_000, "stream": True}
        lines: list[str] = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines += [line] * bool(line)
                if len(lines) in (1, 30):
                    process.send_signal(signal.SIGTERM)
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert process.wait(60) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "no such host", "192.0.2.1"])  # the last is for documentation: nobody has it
def test_an_address_that_cannot_be_had_is_an_error_in_words(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
    pytest.importorskip("uvicorn", reason="and of uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says = failing(f"serve --simulated --host '{host}' --port {port}", capsys)
    assert f"cannot listen on --host {host} --port {port}" in says
