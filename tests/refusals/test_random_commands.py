"""Whatever is asked runs, or is refused in one line."""

import contextlib
import io
import re
import shlex
from dataclasses import fields
from typing import Any, get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refused_commands import SHORT

from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig

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
