"""The values that a sweep's flags give, and what is refused of them."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from small_sweep import grid

from pagedkv.sims.cli import main
from pagedkv.sims.sweep_grid import parse_grid
from pagedkv.sims.sweep_store import config_hash


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
