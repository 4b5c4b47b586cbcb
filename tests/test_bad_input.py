"""Whatever is wrong with what was asked is said in a message that helps: what, the value, why, and what would work.

Exit code 2, nothing on stdout, no traceback.
"""

import contextlib
import io
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.scenario import resolve

SHORT = "--duration 1s --warmup 0"

FILES = {
    "good.csv": "arrival_s,input_tokens,output_tokens\n0,90,9\n0.4,900,3\n",
    "bad.csv": "arrival_s,input_tokens,output_tokens\n0,90,9\n1,many,9\n",
    "late.csv": "arrival_s,input_tokens,output_tokens\n0,90,9\nsoon,90,9\n",
    "empty.csv": "",
    "other.csv": "from,to\n1,2\n",
    "long.csv": "arrival_s,input_tokens,output_tokens\n0,40000,10\n1,50000,10\n",
    "lengths.csv": "input_tokens,output_tokens\n90,9\n",
    "bad_lengths.csv": "input_tokens,output_tokens\n90,0\n",
    "good.toml": "users = 3\nduration = '1s'\nwarmup = '0'\n",
    "unknown.toml": "users = 3\nusres = 4\n",
    "type.toml": 'users = "many"\n',
    "list.toml": "users = [3]\n",
    "choice.toml": 'users = 3\nover-length = "ignore"\n',
    "broken.toml": "users = = 3\n",
    "latin1.toml": "users = 3 # \udce9\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message with which the command line refuses `arguments`."""
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(arguments))
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    return err.removeprefix("error: ")


BAD_INPUT: dict[str, tuple[str, ...]] = {
    # names, with the near ones
    "--users 5 --model llama-3.1-8": ("unknown model 'llama-3.1-8'", "did you mean llama-3.1-8b"),
    "--users 5 --model zzz": ("unknown model 'zzz'", "known: ", "deepseek-r1"),
    "--users 5 --hardware spark": ("unknown hardware 'spark'", "did you mean dgx-spark?"),
    "--users 5 --engine vlm": ("unknown engine 'vlm'", "did you mean vllm?"),
    "--users 5 --allocator paged,pagd": ("unknown allocator 'pagd'", "did you mean paged?"),
    "--users 5 --allocator ,": ("no allocator", "paged"),
    "--users 5 --contiguous-heap body": ("unknown contiguous-heap 'body'", "did you mean buddy?"),
    "--users 5 --quantization fp9": ("unknown --quantization 'fp9'", "did you mean fp8"),
    "--users 5 --kv-cache-dtype fp9": ("unknown --kv-cache-dtype 'fp9'", "did you mean fp8"),
    "--users 5 --lengths shargpt": ("unknown length distribution 'shargpt'", "did you mean sharegpt?"),
    "--trace good.csv --trace-format azure": ("unknown trace format 'azure'", "did you mean azure-csv?"),
    "--users 5 --goodput tfft:200": ("unknown goodput metric 'tfft'", "did you mean ttft", "ttft:2000"),
    "--usres 5": ("--usres", "--users"),
    "--users 5 --over-length ignore": ('"ignore"', "--over-length", "reject", "drop"),
    "--users 5 --no-model": ("--no-model", "--model"),
    "--users 5 more": ("more",),
    # values
    "--users 0": ("--users is 0", "needs"),
    "--users -5": ("--users is -5", "needs"),
    "--users five": ("--users", '"five"', "int"),
    "--users nan": ("--users", '"nan"'),
    "--users": ("--users requires an argument",),
    "--users 5 --users 6": ("--users", "multiple times"),
    "--users 5 --goodput ttft": ("goodput 'ttft'", "milliseconds above 0", "ttft:2000"),
    "--users 5 --goodput ttft:-1": ("goodput 'ttft:-1'", "'-1'", "ttft:2000"),
    "--users 5 --goodput ttft:nan": ("goodput 'ttft:nan'", "'nan'"),
    "--users 5 --goodput ttft:5 ttft:6": ("ttft twice", "give one limit"),
    "--users 5 --duration soon": ("duration 'soon' is not a time", "20s, 500ms or 10m"),
    "--users 5 --duration 0": ("duration is 0", "more than 0", "600s"),
    "--users 5 --duration nan": ("duration 'nan' is not a time", "20s"),
    "--users 5 --duration=-5s": ("duration '-5s' is not a time", "20s"),
    "--users 5 --warmup 5x": ("warmup '5x' is not a time", "20s"),
    "--users 5 --think-time inf": ("think-time 'inf' is not a time", "20s"),
    "--users 5 --kv-cache-memory-bytes 16XB": ("kv-cache-memory-bytes '16XB' is not a size", "8GiB"),
    "--users 5 --free-memory ''": ("free-memory '' is not a size", "8GiB"),
    "--users 5 --os-reserve nan": ("os-reserve 'nan' is not a size", "8GiB"),
    "--users 5 --other-programs 9TiB": ("other-programs '9TiB' is not a size", "8GiB"),
    "--users 5 --other-programs 500GiB": ("--other-programs 500GiB", "121.69 GiB"),
    "--request-rate nan": ("--request-rate is nan", "needs"),
    "--request-rate inf": ("--request-rate is inf", "needs"),
    "--request-rate 2 --burstiness 0": ("--burstiness is 0", "needs"),
    "--request-rate 2 --num-prompts 0": ("--num-prompts is 0", "needs"),
    "--trace good.csv --trace-rate -1": ("--trace-rate is -1", "needs"),
    "--users 5 --repeats 0": ("repeats is 0", "needs 1 to 10,000"),
    "--users 5 --seed -1": ("seed is -1", "0 or more"),
    "--users 5 --watermark 2": ("watermark 2", "0 or more, below 1"),
    "--users 5 --watermark nan": ("watermark nan", "0 or more, below 1"),
    "--users 5 --block-size 0": ("block-size 0", "at least 1"),
    "--users 5 --max-num-seqs 0": ("max-num-seqs is 0", "1 or more"),
    "--users 5 --max-num-batched-tokens 0": ("max-num-batched-tokens is 0", "1 or more"),
    "--users 5 --max-model-len -3": ("max-model-len is -3", "1 or more"),
    "--users 5 --gpu-memory-utilization 1.5": ("--gpu-memory-utilization 1.5", "above 0 and at most 1"),
    "--users 5 --gpu-memory-utilization nan": ("--gpu-memory-utilization nan", "above 0 and at most 1"),
    "--users 5 --gpu-memory-utilization 0.99": ("--gpu-memory-utilization 0.99", "DGX Spark", "use 0.94 or less"),
    "--users 5 --num-gpu-blocks-override 1": ("--num-gpu-blocks-override 1", "at least 2", "null block"),
    "--users 5 --random-input-len 0 --random-output-len 5": ("input_len 0", "at least 1"),
    "--users 5 --random-input-len 5 --random-output-len 5 --random-range-ratio 1": ("range_ratio 1.0", "[0, 1)"),
    "--users 5 --no-enable-chunked-prefill --max-num-batched-tokens 99": ("max-num-batched-tokens is 99", "needs 32768 or more"),
    "--users 5 --max-num-batched-tokens 16 --max-num-seqs 256": ("is 16,", "max-num-seqs 256", "--max-num-seqs 16 would do"),
    "--users 5 --max-num-seqs 5000": ("is 2,048, the default", "--max-num-batched-tokens 5000 or --max-num-seqs 2048"),
    "--users 5 --engine ollama --model llama-3.1-8b,llama-3.1-8b": ("llama-3.1-8b more than once", "--model llama-3.1-8b would do"),
    "sweep": ("a folder for what comes out", "--out sweep/"),
    "compare": ("needs two runs", "simulate compare run1/ run2/"),
    "compare run1": ("needs two runs", "simulate compare run1/ run2/"),
    # flags that contradict each other
    "": ("--users N", "--request-rate R", "--trace FILE", "none of them", "Try --users 100"),
    "--users 5 --request-rate 2": ("--users and --request-rate", "Try --users 100"),
    "--users 5 --trace good.csv": ("--users and --trace",),
    "--trace good.csv --lengths sharegpt": ("--lengths goes with --users or --request-rate, not with --trace",),
    "--trace good.csv --think-time 5s": ("--think-time goes with --users, not with --trace",),
    "--request-rate 2 --think-time 5s": ("--think-time goes with --users, not with --request-rate",),
    "--users 5 --burstiness 2": ("--burstiness goes with --request-rate, not with --users",),
    "--users 5 --num-prompts 0": ("--num-prompts is 0", "needs"),
    "--users 5 --trace-rate 2": ("--trace-rate goes with --trace, not with --users",),
    "--users 5 --trace-format azure-csv": ("--trace-format goes with --trace, not with --users",),
    "--users 5 --random-input-len 9": ("--random-input-len and --random-output-len go together", "give both"),
    "--users 5 --random-range-ratio .5": ("--random-range-ratio goes with --random-input-len and --random-output-len",),
    "--users 5 --lengths sharegpt --random-input-len 9 --random-output-len 9": ("contradict each other", "give one"),
    "--users 5 --lengths lengths.csv --lengths-in-order": ("--lengths-in-order goes with --request-rate",),
    "--request-rate 5 --lengths-in-order": ("--lengths-in-order goes with --request-rate and --lengths FILE",),
    # too long
    "--users 5 --random-input-len 40000 --random-output-len 5": (
        "40000 + 5",
        "max-model-len 32768",
        "--max-model-len 40005 would hold",
    ),
    "--users 5 --max-model-len 200000": ("max-model-len 200000", "Llama 3.1 8B", "at most 131072"),
    "--trace long.csv": ("long.csv", "line 2", "40000 + 10", "max-model-len 32768", "--max-model-len 50010 would hold all, 40010"),
    "--users 5 --over-length drop --max-model-len 9": ("azure-conv", "at most 9 tokens", "one in a hundred has at most"),
    "--request-rate 5 --lengths lengths.csv --over-length drop --max-model-len 9": (
        "'lengths.csv'",
        "9 tokens",
        "the shortest has 99",
    ),
    # files
    "--trace bad.csv": ("bad.csv, line 3, column input_tokens: 'many'", "a whole number of tokens", "1 or more"),
    "--trace late.csv": ("late.csv, line 3, column arrival_s: 'soon'", "a finite number of seconds"),
    "--trace empty.csv": ("empty.csv: no requests in it",),
    "--trace other.csv": ("other.csv: unknown format", "'from,to'", "azure-csv: TIMESTAMP", "mooncake-jsonl"),
    "--trace good.csv --trace-format mooncake-jsonl": ("good.csv, line 1: not JSON",),
    "--trace absent.csv": ("absent.csv: cannot be read (No such file or directory)",),
    "--trace lengths.csv": ("lengths.csv: no arrival column", "length distribution"),
    "--users 5 --lengths bad_lengths.csv": ("bad_lengths.csv, line 2, column output_tokens: '0'", "1 or more"),
    "--users 5 --lengths absent.csv": ("absent.csv: cannot be read",),
    "--users 5 --out good.csv": ("cannot write results to 'good.csv'", "Give --out a folder"),
    "--users 5 --out good.csv/below": ("cannot write results to 'good.csv/below': Not a directory", "Give --out a folder"),
    "--users 5 --json good.csv/x.json": ("good.csv", "cannot write"),
    "--config absent.toml": ("'absent.toml'", "No such file"),
    "--config=absent.toml": ("'absent.toml'", "No such file"),
    "--config .": ("'.'", "Is a directory"),
    "--config unknown.toml": ("usres", "unknown.toml"),
    "--config type.toml": ("users", "type.toml", '"many"', "int"),
    "--config list.toml": ("users", "list.toml"),
    "--config choice.toml": ("over-length", "choice.toml", '"ignore"', "reject", "drop"),
    "--config latin1.toml": ("'latin1.toml'", "utf-8"),
    "--config": ("--config requires an argument",),
    # memory
    "--users 5 --num-gpu-blocks-override 9": ("--num-gpu-blocks-override 9", "128 tokens", "--max-model-len 32768", "What fits: "),
    "--users 5 --kv-cache-memory-bytes 500GiB": ("--kv-cache-memory-bytes 500GiB", "121.69 GiB"),
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_a_mistake_is_explained(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(arguments, capsys)
    for part in BAD_INPUT[arguments]:
        assert part in message
    assert message.count("\n") == (10 if "other.csv" in arguments else 1)  # the 9 formats that would work are a list
    assert len(message) < 1500


NOT_YET: dict[str, tuple[str, tuple[str, ...]]] = {
    "--users 5.5": ("5.5 users are rounded to 6", ("--users", "5.5")),
    "--users 5 --max-num-seqs 2.5": ("2.5 is rounded", ("--max-num-seqs", "2.5")),
    "--users 5 --max-model-len 0": ("0 counts as not given", ("max-model-len", "0", "1 or more")),
    "--users 5 --long-prefill-token-threshold -5": (
        "a negative limit is taken for none",
        ("long-prefill-token-threshold", "-5", "0 or more"),
    ),
    "--users 5 --duration -5s": ("says that the argument is missing", ("duration", "-5s", "20s")),
    "--users 5 --free-memory 400GiB": ("says free_memory_bytes 429496729600", ("--free-memory 400GiB", "121.69 GiB")),
    "--config broken.toml": ("does not name the file", ("broken.toml", "line 1")),
    "--users 5 --json good.csv/x.json": ("blames --out", ("good.csv/x.json", "--json")),
    "--users 5 --json .": ("noticed after the simulation, without the flag", ("--json", "is a directory")),
    "--users 5 --out ''": ("writes into the current folder", ("--out", "''")),
    "--trace good.csv --lengths-in-order": ("ignored", ("--lengths-in-order goes with",)),
    "--users 5 --random-input-len 9 --random-output-len 9 --lengths-in-order": ("ignored", ("--lengths-in-order goes with",)),
    "--users 5 --kv-cache-memory-bytes 1e999": ("OverflowError", ("kv-cache-memory-bytes", "1e999")),
}


@pytest.mark.parametrize("arguments", NOT_YET)
def test_a_mistake_that_is_not_explained_yet(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(f"{arguments} {SHORT if '--duration' not in arguments else ''}", capsys)
    for part in NOT_YET[arguments][1]:
        assert part in message


ENDLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "users": ("OverflowError in numpy", {"users": 10**24}),
    "num_prompts": ("ValueError in islice", {"request_rate": 1.0, "num_prompts": 10**24}),
    "think_time": ("an infinite time: ZeroDivisionError in the verdict", {"users": 5, "think_time": "9" * 400}),
    "burstiness": ("every gap is 0: time stands still", {"request_rate": 1.0, "burstiness": 1e-300}),
    "duration": ("an infinite time: never ends", {"users": 5, "duration": "9" * 400}),
    "warmup": ("an infinite time: never ends", {"users": 5, "warmup": "9" * 400}),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_crash_or_never_end_is_refused_before_it_runs(name: str) -> None:
    changes = ENDLESS[name][1]
    load = {k: v for k, v in changes.items() if k in {f.name for f in fields(LoadConfig)}}
    measurement = {k: v for k, v in changes.items() if k not in load}
    config = SimulationConfig(load=LoadConfig(**load), measurement=MeasurementConfig(**measurement))
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        resolve(config)


# --- settings that would fit ----------------------------------------------------------------------------------------


def proposals(message: str) -> list[str]:
    listed = message.partition("What fits: ")[2].strip()
    return re.sub(r" \(at its start: [^)]*\)", "", listed).split("; or ")


def with_changes(arguments: str, changes: str) -> list[str]:
    """Return `arguments` with the flags in `changes`, which replace those that are there."""

    def flags(text: str) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for word in shlex.split(text):
            if word.startswith("--"):
                groups[word] = [word]
            else:
                groups[next(reversed(groups))].append(word)
        return groups

    return [word for group in (flags(arguments) | flags(changes)).values() for word in group]


NEGATIVE_BUDGETS: dict[str, tuple[int, tuple[str, ...]]] = {
    # how many proposals at least, and what the message says
    "--users 5 --model llama-3.1-70b --quantization bf16": (3, ("Llama 3.1 70B needs", "GiB of weights in bf16", "32768")),
    "--users 5 --model opt-175b": (3, ("OPT 175B needs", "GiB of weights in fp16")),
    "--users 5 --model llama-3.1-70b --quantization fp8 --hardware h100-80gb": (3, ("H100", "is the longest that fits")),
    "--users 5 --hardware rtx-4090 --max-model-len 131072": (
        3,
        ("for one request of --max-model-len 131072", "is the longest that fits"),
    ),
    "--users 5 --num-gpu-blocks-override 999999": (1, ("by --num-gpu-blocks-override 999999", "are free")),
    "--users 5 --kv-cache-memory-bytes 1GiB": (2, ("--kv-cache-memory-bytes 1073741824 holds 8176 tokens", "needs 4.00 GiB")),
    "--users 5 --free-memory 102.2GiB --gpu-memory-utilization 0.92": (
        1,
        ("asks for 111.95 GiB", "only 102.20 GiB of NVIDIA DGX Spark (GB10) are free", "0.83 is the highest that starts"),
    ),
}


def test_a_negative_budget_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal("--users 5 --model llama-3.1-70b --quantization bf16", capsys)
    needed, available, *parts = map(float, re.findall(r"([0-9.]+) GiB", message.partition("What fits")[0]))
    assert needed > available > 0
    assert needed == pytest.approx(sum(parts), abs=0.02)  # weights, engine and activations, KV cache
    assert len(parts) == 3
    assert available == pytest.approx(0.80 * 121.69, abs=0.01)


@pytest.mark.parametrize("arguments", NEGATIVE_BUDGETS)
def test_every_proposal_runs(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    number, parts = NEGATIVE_BUDGETS[arguments]
    message = refusal(arguments, capsys)
    for part in parts:
        assert part in message
    proposed = proposals(message)
    assert len(set(proposed)) == len(proposed) >= number
    for changes in proposed:
        main([*with_changes(arguments, changes), *shlex.split(SHORT), "--json", "-"])
        out, err = capsys.readouterr()
        assert json.loads(out)["budget"]["unassigned"] >= 0
        assert "error" not in err


def test_the_gate_opens_just_at_its_proposal(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--users 5 --free-memory 102.2GiB"
    refusal(f"{arguments} --gpu-memory-utilization 0.84", capsys)
    main(shlex.split(f"{arguments} --gpu-memory-utilization 0.83 {SHORT}"))


# --- anything -------------------------------------------------------------------------------------------------------

JUNK = st.sampled_from(
    ["", "nan", "-inf", "-1", "0", "0.5", "7", "abc", "5x", "1e3", "-", "--", "[]", "{}", "a b", "1,2", "none", "true"]
)
# No digits: a number at random is a simulation of random size. "/" and "\0" are no part of a name.
TEXT = st.text(st.characters(exclude_categories=["N", "Cs"], exclude_characters="/\0"), max_size=4)
SENSIBLE: dict[str, list[str]] = {
    "trace": ["good.csv", "bad.csv", "long.csv", "absent.csv"],
    "lengths": ["sharegpt", "azure-conv", "lengths.csv", "bad_lengths.csv"],
    "trace_format": ["generic-csv", "azure-csv"],
    "hardware": ["dgx-spark", "rtx-4090", "h100-80gb", "A100-40GB"],
    "model": ["llama-2-7b", "llama-3.1-70b", "gpt-oss-20b", "opt-175b"],
    "quantization": ["bf16", "fp8", "nvfp4", "awq"],
    "kv_cache_dtype": ["fp8", "auto"],
    "allocator": ["paged", "contiguous-max,paged", "contiguous-pow2"],
    "contiguous_heap": ["first-fit", "buddy"],
    "goodput": ["ttft:200", "tpot:50", "e2el:9"],
    "engine": ["vllm"],
    "over_length": ["drop", "reject"],
    "workload": ["mixed-office", "reasoning", "good.toml", "absent.toml"],
    "think_time": ["0", "10ms", "5s"],
    "random_input_len": ["1", "300", "40000"],
    "random_output_len": ["1", "30"],
    "random_range_ratio": ["0", "0.5"],
    "max_model_len": ["1", "100", "4096", "131072"],
    "gpu_memory_utilization": ["0.1", "0.5", "0.92", "1"],
    "watermark": ["0.05", "0.999"],
    "kv_cache_memory_bytes": ["1GiB", "8GiB", "300GB", "1"],
    "free_memory": ["100GiB", "20GiB"],
    "os_reserve": ["8GiB", "0"],
    "other_programs": ["8GiB", "100GiB"],
}
NUMBERS = {int: ["1", "2", "16", "64", "5000"], float: ["0.1", "1", "3"], bool: ["true", "false"]}


def mostly(sense: st.SearchStrategy[Any], nonsense: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda die: nonsense if die == 9 else sense)


def flag(name: str, annotation: Any) -> st.SearchStrategy[list[str]]:
    """Return strategies for one flag: mostly with a value that makes sense, now and then with any."""
    kinds = {annotation, *get_args(annotation)}
    word = f"--{name.replace('_', '-')}"
    usual = SENSIBLE.get(name) or next((values for kind, values in NUMBERS.items() if kind in kinds), ["x"])
    value = mostly(st.sampled_from(usual), JUNK | TEXT)
    if bool in kinds:
        return st.sampled_from([[word], [f"--no-{word[2:]}"]]) | value.map(lambda v: [f"{word}={v}"])
    return value.map(lambda v: [word, v]) | value.map(lambda v: [f"{word}={v}"])


LENGTHS = ["--random-input-len", "300", "--random-output-len", "30"]
LOADS = [
    ["--users", "3"],
    ["--users", "40", *LENGTHS],
    ["--request-rate", "9"],
    ["--request-rate", "50", *LENGTHS],
    ["--trace", "good.csv"],
]
BAD_LOADS = [["--users", "nan"], ["--request-rate", "-1"], ["--trace", "bad.csv"], []]
OUTPUTS = [["--json", "-"], ["--json", "x.json"], ["--out", "folder"], ["--out", "good.csv"], ["--config", "unknown.toml"]]
OTHERS = [["--repeats", "2"], ["--repeats", "0"], ["--seed", "5"], ["--seed", "nan"], ["--allocator"], ["--mox", "5"]]
FLAGS = [
    flag(f.name, f.type)
    for section in (LoadConfig, ServingConfig, MeasurementConfig)
    for f in fields(section)
    if f.name not in ("duration", "warmup", "users", "request_rate", "repeats", "seed")
]
ARGUMENTS = st.builds(
    lambda *groups: [word for group in groups for words in group for word in words] + shlex.split(SHORT),
    mostly(st.sampled_from(LOADS), st.sampled_from(BAD_LOADS)).map(lambda load: [load]),
    st.lists(st.one_of(FLAGS), max_size=4),
    st.lists(st.sampled_from(OUTPUTS), max_size=1),
    st.lists(st.sampled_from(OTHERS), max_size=1),
)


@given(arguments=ARGUMENTS)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_runs_or_is_refused_in_one_line(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
    errors = [line for line in err.getvalue().splitlines() if not re.match(" *[0-9]+% ", line)]  # the rest is progress
    if code == 0:
        assert out.getvalue() != ""
    else:
        assert code == 2
        assert out.getvalue() == ""
        assert len(errors) == 1
        assert errors[0].startswith("error: ")
