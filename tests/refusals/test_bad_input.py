"""Whatever is wrong with what was asked is said in a message that helps: what, the value, why, and what would work.

Exit code 2, nothing on stdout, no traceback.
"""

from dataclasses import fields
from typing import Any

import pytest
from refused_commands import SHORT, refusal

from pagedkv.errors import ConfigError
from pagedkv.sims.config import LoadConfig, MeasurementConfig, SimulationConfig
from pagedkv.sims.scenario import resolve

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
    "--users 5 --other-programs 9PiB": ("other-programs '9PiB' is not a size", "8GiB"),
    "--users 5 --kv-cache-memory-bytes 1TiB": ("--kv-cache-memory-bytes 1024GiB", "121.69 GiB"),
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
    "--users 5 --max-concurrency 2": ("--max-concurrency goes with --request-rate or --trace, not with --users",),
    "--request-rate 2 --max-concurrency 0": ("--max-concurrency is 0", "needs 1 to"),
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
    "--users 5 --random-input-len 100000000 --random-output-len 5": (
        "100000000 + 5",
        "max-model-len 32768",
        "Llama 3.1 8B was made for 131072 tokens at most",
    ),
    "--trace far_too_long.csv": ("--max-model-len 40010 would hold the shortest", "was made for 131072 tokens at most"),
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
