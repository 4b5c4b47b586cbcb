"""Every trace format on files of the shape that its project writes: detection, arrivals and lengths."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_samples import SAMPLES, VLLM, Write, aiperf, guidellm, guidellm_request, lines

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import TRACE_FORMATS, read_lengths, read_trace
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import at

DOCS = Path(__file__).parents[2] / "docs"
TIMED = sorted(set(SAMPLES) - {"sharegpt-json"})


def claimed(text: str) -> list[str]:
    return [name for name in TRACE_FORMATS.names() if TRACE_FORMATS.load(name).matches(Head.of(text))]


def test_every_format_has_a_sample_and_a_line_in_the_docs() -> None:
    assert TRACE_FORMATS.names() == tuple(sorted(SAMPLES))
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", (DOCS / "traces.md").read_text(), re.MULTILINE)) == sorted(SAMPLES)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_is_claimed_by_its_format_alone(name: str, indent: int | None) -> None:
    text = SAMPLES[name]
    if name.endswith("-json"):
        text = json.dumps(json.loads(text), indent=indent)
    assert claimed(text) == claimed(" \n" + text) == [name]
    # Keys inside are not the file's own: no text that someone generated changes what it is.
    assert claimed(text.replace("QWJhYvA_0", '\\"benchmarks\\": [').replace("two", '{\\"metrics\\": 1}')) == [name]


@pytest.mark.parametrize("stored", ["plain", "gzip", "crlf", "bom", "blank lines"])
@pytest.mark.parametrize("name", SAMPLES)
def test_requests_come_back_however_a_file_is_stored(name: str, stored: str, write: Write) -> None:
    text = SAMPLES[name]
    path = write(
        {
            "plain": text.encode(),
            "gzip": gzip.compress(text.encode()),
            "crlf": text.replace("\n", "\r\n").encode(),
            "bom": text.encode("utf-8-sig"),
            "blank lines": (text + "\n \r\n\n").encode(),
        }[stored]
    )
    prompt, output = read_lengths(path)
    assert prompt.tolist() == [374, 396, 879]
    assert output.tolist() == [44, 109, 55]
    if name in TIMED:
        trace = read_trace(path)
        assert trace.format == name
        assert trace.arrival_s == pytest.approx([0, 4.314579, 14], abs=1e-6)
        assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([374, 396, 879], [44, 109, 55])
        assert trace.notes == ()


@pytest.mark.parametrize("wanted", SAMPLES)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_of_another_format_is_refused(name: str, wanted: str, write: Write) -> None:
    path = write(SAMPLES[name])
    if name == wanted or (name, wanted) == ("mooncake-jsonl", "generic-jsonl"):  # the same keys, in seconds
        assert len(read_lengths(path, format=wanted)[0]) == 3
    else:
        with pytest.raises(TraceFormatError, match="trace") as error:
            read_trace(path, format=wanted)
        assert len(str(error.value)) < 700


REQUESTS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 10**4)), min_size=1, max_size=20)
WRITERS: dict[str, Callable[[list[tuple[int, int, int]]], str]] = {
    "aiperf-jsonl": lambda rows: lines(*(aiperf(i, 10**6 * ms, p, o) for i, (ms, p, o) in enumerate(rows))),
    "burstgpt-csv": lambda rows: (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        + "".join(f"{ms / 1000},1722ac82,4,GPT-4,{p},{o},{p + o},API log\n" for ms, p, o in rows)
    ),
    "generic-jsonl": lambda rows: lines(*({"ISL": 1, "Arrival_MS": ms, "input": p, "completion_tokens": o} for ms, p, o in rows)),
    "guidellm-json": lambda rows: json.dumps(guidellm(*(guidellm_request(ms / 1000, p, o) for ms, p, o in rows))),
    "vllm-bench-json": lambda rows: json.dumps(
        VLLM
        | {"start_times": [r[0] / 1000 for r in rows], "input_lens": [r[1] for r in rows], "output_lens": [r[2] for r in rows]}
        | {"errors": [""] * len(rows)}
    ),
}


@given(name=st.sampled_from(sorted(WRITERS)), rows=REQUESTS, packed=st.booleans())
def test_any_requests_come_back_in_order_of_arrival(
    name: str, rows: list[tuple[int, int, int]], packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = WRITERS[name](rows).encode()
    path = tmp_path_factory.getbasetemp() / "round-trip"
    path.write_bytes(gzip.compress(content) if packed else content)
    trace = read_trace(path)
    by_time = sorted(rows, key=lambda row: row[0])
    assert trace.format == name
    assert trace.arrival_s == pytest.approx([(row[0] - by_time[0][0]) / 1000 for row in by_time], abs=1e-6)
    assert trace.prompt_tokens.tolist() == [row[1] for row in by_time]
    assert trace.output_tokens.tolist() == [row[2] for row in by_time]
    assert [rows[line - 1][1] for line in trace.line_numbers - (name == "burstgpt-csv")] == trace.prompt_tokens.tolist()


def test_a_timestamp_is_in_the_unit_of_its_format(write: Write) -> None:
    rows = [{"timestamp": 1, "input_length": 3, "output_length": 4}, {"timestamp": 3, "input_length": 5, "output_length": 6}]
    assert read_trace(write(lines(*rows))).arrival_s.tolist() == [0, 0.002]
    assert read_trace(write(lines(*rows)), format="generic-jsonl").arrival_s.tolist() == [0, 2]
    named = [{("arrived_at" if k == "timestamp" else k): v for k, v in row.items()} for row in rows]
    trace = read_trace(write(lines(*named)))
    assert (trace.format, trace.arrival_s.tolist()) == ("generic-jsonl", [0, 2])


def test_keys_are_found_only_in_the_outermost_object() -> None:
    assert Head.of('{"a": {"b": 1}, "c": ["d", {"e": 2}], "f": "\\"g\\": 1"} {"h": 1}').keys == {"a", "c", "f"}
    assert Head.of('[\n {"a": [{"b": 1}]}, {"c": 2}]').keys == {"a"}
    assert Head.of("x,y\n1,2").keys == Head.of("").keys == Head.of("[1, 2]").keys == Head.of("{").keys == frozenset()
    assert at({"a": {"b": 3}}, "a", "b") == 3
    assert at({"a": 1}, "a", "b") is at([1], "a") is None


def test_a_real_run_of_vllm_agrees_with_a_plain_reading(shared_data: Path) -> None:
    path = shared_data / "vllm_rtx4090_llama31_8b" / "requests.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trace = read_trace(path)
    assert trace.format == "generic-jsonl"
    assert len(trace) == len(rows) == 300
    assert np.array_equal(trace.arrival_s, [row["arrival_s"] for row in rows])
    assert trace.prompt_tokens.tolist() == [row["prompt_tokens"] for row in rows]
    assert trace.output_tokens.tolist() == [row["output_tokens"] for row in rows]
