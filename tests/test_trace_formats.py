"""Every trace format on files of the shape that its project writes: detection, arrivals, lengths, and what is refused."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.errors import TraceFormatError
from pagedkv.sims.lengths import FileLengths
from pagedkv.sims.traces import TRACE_FORMATS, read_lengths, read_noted_lengths, read_trace
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import at

DOCS = Path(__file__).parents[1] / "docs"


def lines(*objects: object) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def aiperf(number: int, start_ns: int, prompt: int, output: int, **metadata: object) -> dict[str, Any]:
    """Return a record of ai-dynamo/aiperf, docs/tutorials/working-with-profile-exports.md."""
    return {
        "metadata": {
            "session_num": number,
            "x_request_id": f"7609a2e7-aa53-4ab1-98f4-{number:012}",
            "turn_index": 0,
            "request_start_ns": start_ns,
            "request_ack_ns": start_ns + 117_830_613,
            "request_end_ns": start_ns + 305_864_241,
            "worker_id": "worker_359d423a",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
            "cancellation_time_ns": None,
            **metadata,
        },
        "metrics": {
            "input_sequence_length": {"value": prompt, "unit": "tokens"},
            "time_to_first_token": {"value": 255.88, "unit": "ms"},
            "inter_chunk_latency": {"value": [4.8, 5.3], "unit": "ms"},
            "output_sequence_length": {"value": output, "unit": "tokens"},
        },
        "error": None,
    }


T = 1_759_813_207.5329

AIPERF = [aiperf(i, round((T + t) * 1e9), p, o) for i, (t, p, o) in enumerate([(0, 374, 44), (4.314579, 396, 109), (14, 879, 55)])]

AIPERF_FAILED = {  # the same page's failed record
    "metadata": {"session_num": 80, "request_start_ns": 1, "benchmark_phase": "profiling", "was_cancelled": True},
    "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
    "error": {"code": 499, "type": "RequestCancellationError", "message": "Request was cancelled after 0.000 seconds"},
}

VLLM: dict[str, Any] = {  # vllm-project/vllm, vllm/benchmarks/serve.py: `result_json` and `result`
    "date": "20261101-120000",
    "endpoint_type": "openai",
    "label": "openai",
    "model_id": "meta-llama/Llama-3.1-8B",
    "num_prompts": 3,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 17.2,
    "completed": 3,
    "failed": 0,
    "total_input_tokens": 1649,
    "request_throughput": 0.17,
    "input_lens": [374, 396, 879],
    "output_lens": [44, 109, 55],
    "ttfts": [0.05, 0.06, 0.07],
    "itls": [[0.01] * 43, [0.01] * 108, [0.01] * 54],
    "start_times": [1234.5, 1238.814579, 1248.5],
    "generated_texts": ['{"input_length": 1}', "two", "three"],
    "errors": ["", "", ""],
}


def guidellm(*requests: dict[str, Any], **more: object) -> dict[str, Any]:
    benchmark = {
        "type_": "generative_benchmark",
        "requests": {"successful": list(requests), "errored": [], "incomplete": []},
        **more,
    }
    return {"metadata": {"version": 1}, "args": {"target": "http://localhost:8000"}, "benchmarks": [benchmark]}


def guidellm_request(start_s: float, prompt: int, output: int) -> dict[str, Any]:
    """Return a request of vllm-project/guidellm, src/guidellm/schemas/base/request_stats.py."""
    return {
        "type_": "generative_request_stats",
        "request_id": "a",
        "output": "...",
        "info": {
            "status": "completed",
            "timings": {"targeted_start": start_s - 0.1, "request_start": start_s, "token_iterations": 9},
        },
        "input_metrics": {"text_tokens": prompt, "total_tokens": prompt},
        "output_metrics": {"text_tokens": output, "total_tokens": output},
        "request_start_time": start_s,
        "prompt_tokens": prompt,
        "output_tokens": output,
    }


GUIDELLM = [guidellm_request(T, 374, 44), guidellm_request(T + 4.314579, 396, 109), guidellm_request(T + 14, 879, 55)]

GUIDELLM_BY_VERSION: dict[str, Callable[[float, int, int], dict[str, Any]]] = {
    # src/guidellm/benchmark/benchmark.py: GenerativeTextResponseStats
    "0.2": lambda t, p, o: {"prompt": "x", "prompt_tokens": p, "output_tokens": o, "start_time": t, "end_time": t + 1},
    # src/guidellm/benchmark/objects.py: GenerativeRequestStats
    "0.4 in the making": lambda t, p, o: {
        "scheduler_info": {"request_timings": {"request_start": t}},
        "prompt_tokens": p,
        "output_tokens": o,
    },
    # src/guidellm/schemas/request_stats.py at first: no request_start_time, prompt_tokens counts text only
    "0.4": lambda t, p, o: {
        "info": {"timings": {"request_start": t}},
        "input_metrics": {"text_tokens": 1, "total_tokens": p},
        "output_metrics": {"total_tokens": None},
        "prompt_tokens": 1,
        "output_tokens": o,
    },
    "now": guidellm_request,
}

SHAREGPT: list[Any] = [  # anon8231489123/ShareGPT_Vicuna_unfiltered; vllm/benchmarks/datasets/sharegpt.py
    {
        "id": "QWJhYvA_0",
        "conversations": [
            {"from": "human", "value": "x" * 374 * 4},
            {"from": "gpt", "value": "y" * 44 * 4},
            {"from": "human", "value": 'and "then"?'},
        ],
    },
    {"id": "i6IyJda_0", "conversations": [{"from": "human", "value": "ü" * 396 * 4}, {"from": "gpt", "value": "y" * 109 * 4}]},
    {"id": "A5AbcES_0", "conversations": [{"from": "gpt", "value": "x" * 879 * 4}, {"from": "human", "value": "y" * 55 * 4}]},
]

SAMPLES: dict[str, str] = {
    "aiperf-jsonl": lines(*AIPERF),
    "azure-csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n"
        "2023-11-16 18:15:50.994579,396,109\n2023-11-16 18:16:00.68,879,55\n"
    ),
    "burstgpt-csv": (  # HPMLL/BurstGPT, README, Schema
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,374,44,418,Conversation log\n9.314579,GPT-4,396,109,505,API log\n19,ChatGPT,879,55,934,Conversation log\n"
    ),
    "generic-csv": "arrival_s,prompt_tokens,output_tokens\n1.5,374,44\n5.814579,396,109\n15.5,879,55\n",
    "generic-jsonl": lines(
        {"arrival_s": 1.5, "prompt_tokens": 374, "output_tokens": 44, "hash_ids": [0]},
        {"arrival_s": 5.814579, "prompt_tokens": 396, "output_tokens": 109, "hash_ids": []},
        {"arrival_s": 15.5, "prompt_tokens": 879, "output_tokens": 55, "hash_ids": [1]},
    ),
    "guidellm-json": json.dumps(guidellm(*GUIDELLM), indent=1),
    "mooncake-jsonl": lines(
        {"timestamp": 100, "input_length": 374, "output_length": 44, "hash_ids": [0]},
        {"timestamp": 4414.579, "input_length": 396, "output_length": 109, "hash_ids": [0, 1]},
        {"timestamp": 14100, "input_length": 879, "output_length": 55, "hash_ids": [2]},
    ),
    "sharegpt-json": json.dumps(SHAREGPT, indent=2, ensure_ascii=False),
    "vllm-bench-json": json.dumps(VLLM),
}
TIMED = sorted(set(SAMPLES) - {"sharegpt-json"})


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


Write = Callable[[str | bytes], Path]


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


def test_requests_that_came_to_no_answer_are_left_out_and_that_is_said(write: Write) -> None:
    failed = {
        "aiperf-jsonl": (
            lines(AIPERF_FAILED, AIPERF[0], aiperf(9, 2, 9, 9, benchmark_phase="warmup"), *AIPERF[1:]),
            "2 failed, cancelled or warm-up requests left out",
        ),
        "burstgpt-csv": (SAMPLES["burstgpt-csv"] + "45,ChatGPT,1087,0,1087,Conversation log\n", "1 failed request left out"),
        "vllm-bench-json": (
            json.dumps(
                VLLM
                | {
                    "input_lens": [5, 374, 396, 879, 7],
                    "output_lens": [0, 44, 109, 55, 0],
                    "start_times": [0, *VLLM["start_times"], 0],
                }
                | {"errors": ["Traceback", "", "", "", ""]}
            ),
            "2 requests without an answer left out",
        ),
        "guidellm-json": (
            json.dumps(guidellm(requests={"successful": GUIDELLM, "errored": [{"prompt_tokens": 1}], "incomplete": [{}]})),
            "2 errored or incomplete requests left out",
        ),
    }
    for text, note in failed.values():
        trace = read_trace(write(text))
        assert trace.notes == trace.first(1).notes == (note,)
        assert trace.prompt_tokens.tolist() == [374, 396, 879]
        assert trace.arrival_s == pytest.approx([0, 4.314579, 14], abs=1e-6)
    with pytest.raises(TraceFormatError, match=r"no requests in it \(1 failed, cancelled or warm-up request left out\)"):
        read_trace(write(lines(AIPERF_FAILED)))


def test_sharegpt_is_an_estimate_of_first_turns_without_times(write: Write) -> None:
    more: list[Any] = [
        {"id": "1", "conversations": []},
        {"id": "2", "conversations": [{"from": "human", "value": "alone"}]},
        {"id": "3", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]},
        {"id": "4", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "yyyyyyy"}]},
    ]
    path = write(json.dumps([*more, *SHAREGPT]))
    read = read_noted_lengths(path)
    assert read.prompt_tokens.tolist() == [1, 374, 396, 879]
    assert read.output_tokens.tolist() == [2, 44, 109, 55]
    notes = ("tokens estimated, 4 characters each", "3 conversations without question and answer left out")
    assert read.notes == notes
    assert FileLengths.read(path).name == f"{path} ({'; '.join(notes)})"
    with pytest.raises(
        TraceFormatError, match=r"have no arrival times, and texts.*not as a trace \(--lengths .*trace with --users or"
    ):
        read_trace(path)


@pytest.mark.parametrize("version", GUIDELLM_BY_VERSION)
def test_guidellm_reports_of_all_versions_are_read(version: str, write: Write) -> None:
    request = GUIDELLM_BY_VERSION[version]
    report = guidellm(request(T + 3, 7, 8), request(T, 5, 6))
    report["benchmarks"] += guidellm(request(T + 60, 9, 10))["benchmarks"]
    trace = read_trace(write(json.dumps(report)))
    assert trace.arrival_s == pytest.approx([0, 3, 60], abs=1e-6)
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([5, 7, 9], [6, 8, 10])
    assert trace.notes == ("2 benchmarks, one after the other",)


def test_guidellm_0_1_has_results_and_errors(write: Write) -> None:
    # src/guidellm/core/result.py: TextGenerationBenchmark
    results = [{"prompt_token_count": 5, "output_token_count": 6, "start_time": T + i} for i in range(2)]
    benchmark = {"mode": "asynchronous", "rate": 1.0, "results": results, "errors": [{"message": "timeout"}], "concurrencies": []}
    trace = read_trace(write(json.dumps({"benchmarks": [benchmark], "args": {}})))
    assert (trace.arrival_s.tolist(), trace.prompt_tokens.tolist()) == ([0, 1], [5, 5])
    assert trace.notes == ("1 errored or incomplete request left out",)


NO_TRACE: dict[str, tuple[str, str]] = {
    "no start_times": (
        json.dumps({k: v for k, v in VLLM.items() if k != "start_times"}),
        "no start_times, which only newer versions",
    ),
    "several runs": (SAMPLES["vllm-bench-json"] + "\n" + SAMPLES["vllm-bench-json"], "2 runs, each with a clock of its own"),
    "a sample": (
        json.dumps(guidellm(*GUIDELLM, request_totals={"successful": 500})),
        "only 3 of the 500 successful requests are in",
    ),
    "a sample, later": (json.dumps(guidellm(*GUIDELLM, metrics={"request_totals": {"successful": 4}})), "only 3 of the 4 succ"),
    "no arrival": (lines({"prompt_tokens": 374, "output_tokens": 44}), "no arrival key"),
    "no start": (
        lines(*({**r, "metadata": {"session_num": 1}} for r in AIPERF)),
        "request_start_ns: None is not a finite number of nano",
    ),
}


@pytest.mark.parametrize("case", NO_TRACE)
def test_a_file_without_times_serves_as_lengths_and_is_no_trace(case: str, write: Write) -> None:
    text, message = NO_TRACE[case]
    path = write(text)
    assert read_lengths(path)[0].tolist()[:3] in ([374, 396, 879], [374])
    with pytest.raises(TraceFormatError, match=f"{message}.*so the file serves as a length distribution and not as a trace"):
        read_trace(path)


def test_a_timestamp_is_in_the_unit_of_its_format(write: Write) -> None:
    rows = [{"timestamp": 1, "input_length": 3, "output_length": 4}, {"timestamp": 3, "input_length": 5, "output_length": 6}]
    assert read_trace(write(lines(*rows))).arrival_s.tolist() == [0, 0.002]
    assert read_trace(write(lines(*rows)), format="generic-jsonl").arrival_s.tolist() == [0, 2]
    named = [{("arrived_at" if k == "timestamp" else k): v for k, v in row.items()} for row in rows]
    trace = read_trace(write(lines(*named)))
    assert (trace.format, trace.arrival_s.tolist()) == ("generic-jsonl", [0, 2])


def changed(value: object, *keys: str | int, document: Any) -> str:
    """Return `document` as JSON with `value` under `keys`."""
    copy = json.loads(json.dumps(document))
    place = copy
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return json.dumps(copy)


REPORT = guidellm(*GUIDELLM)
FIRST = ("benchmarks", 0, "requests", "successful", 1)
TOKENS = r" is not a whole number of tokens"
BAD: dict[str, tuple[str, str]] = {
    "burstgpt negative": (SAMPLES["burstgpt-csv"].replace("396", "-396"), r"line 3, column Request tokens: '-396'" + TOKENS),
    "burstgpt time": (
        SAMPLES["burstgpt-csv"].replace("19,", "noon,"),
        "line 4, column Timestamp: 'noon' is not a finite number of sec",
    ),
    "burstgpt header": ("Timestamp,Request tokens,Response tokens,Model\n", "no requests in it"),
    "aiperf negative": (lines(AIPERF[0], aiperf(1, 5, -3, 4)), r"line 2, column metrics.input_sequence_length.value: -3" + TOKENS),
    "aiperf no metrics": (
        lines(AIPERF[0], {**AIPERF[1], "metrics": None}),
        r"line 2, column metrics.input_sequence_length.value: None",
    ),
    "aiperf list": (lines(AIPERF[0], [1]), r"line 2: no key metadata in '\[1\]'"),
    "aiperf time": (
        lines(aiperf(0, True, 3, 4)),
        "line 1, column metadata.request_start_ns: True is not a finite number of nanosec",
    ),
    "generic key": (lines({"prompt_tokens": 1, "output_tokens": 2}, {"prompt_tokens": 1}), "line 2: no key output_tokens in"),
    "generic type": (
        lines({"arrival": 1, "prompt_tokens": "text", "output_tokens": 2}),
        r"line 1, column prompt_tokens: 'text'" + TOKENS,
    ),
    "generic float": (lines({"arrival": 1, "prompt": 1, "output": 2.0}), r"line 1, column output: 2.0" + TOKENS),
    "generic value": ('{"prompt_tokens": 1, "output_tokens": 2}\n3\n', "line 2: '3' is no JSON object"),
    "generic cut": ('{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt', "line 2: not JSON"),
    "vllm negative": (changed(-1, "output_lens", 1, document=VLLM), r"line 1, output_lens\[1\]: -1" + TOKENS),
    "vllm type": (
        changed("soon", "start_times", 2, document=VLLM),
        r"line 1, start_times\[2\]: 'soon' is not a finite number of sec",
    ),
    "vllm shorter": (changed([1, 2], "output_lens", document=VLLM), "output_lens has 2 entries where input_lens has 3"),
    "vllm no list": (changed(7, "output_lens", document=VLLM), "output_lens: 7 is not a list"),
    "vllm key": (json.dumps({k: v for k, v in VLLM.items() if k != "output_lens"}), "no output_lens"),
    "vllm summary": (
        json.dumps({k: v for k, v in VLLM.items() if not isinstance(v, list)}),
        "no input_lens and output_lens in .*writes them with --save-detailed",
    ),
    "vllm empty": (json.dumps(VLLM | {"input_lens": [], "output_lens": [], "start_times": [], "errors": []}), "no requests in it"),
    "vllm cut": (SAMPLES["vllm-bench-json"][:-30], r"line 1: not JSON"),
    "guidellm negative": (
        changed(-5, *FIRST, "output_metrics", "total_tokens", document=REPORT),
        r"benchmarks\[0\].requests.successful\[1\], output tokens: -5" + TOKENS,
    ),
    "guidellm time": (
        changed("soon", *FIRST, "info", "timings", "request_start", document=REPORT),
        r"benchmarks\[0\].requests.successful\[1\], start time: 'soon' is not a finite number of seconds",
    ),
    "guidellm no object": (changed(3, *FIRST, document=REPORT), r"requests.successful\[1\], prompt tokens: None" + TOKENS),
    "guidellm no requests": (changed({}, "benchmarks", 0, document=REPORT), r"no benchmarks\[0\].requests.successful"),
    "guidellm no list": (changed(3, "benchmarks", document=REPORT), "benchmarks: 3 is not a list"),
    "guidellm empty": (json.dumps(guidellm()), "no requests in it"),
    "guidellm cut": (SAMPLES["guidellm-json"][:-9], "not JSON"),
    "guidellm twice": (SAMPLES["guidellm-json"] + "\n{}", r"one JSON document is needed, and \{\} begins another"),
    "sharegpt type": (
        changed(5, 1, "conversations", 0, "value", document=SHAREGPT),
        r"\[1\].conversations\[0\].value: 5 is not a text",
    ),
    "sharegpt key": (
        changed("hi", 1, "conversations", 1, document=SHAREGPT),
        r"\[1\].conversations\[1\].value: None is not a text",
    ),
    "sharegpt entry": (changed(None, 1, document=SHAREGPT), r"no \[1\].conversations"),
    "sharegpt no list": (changed("hi", 2, "conversations", document=SHAREGPT), r"\[2\].conversations: 'hi' is not a list"),
    "sharegpt nests": ('[{"conversations": ' + "[" * 100_000, "line 1: not JSON"),
    "a list of others": ('[{"input_length": 3, "output_length": 4}]', "unknown format"),
    "an object of others": ('{"prompts": 3}', r"unknown format(?s:.*)guidellm-json: (?s:.*)sharegpt-json: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_entry_is_named_with_its_place(case: str, write: Write) -> None:
    text, message = BAD[case]
    path = write(text)
    read = read_lengths if case.startswith("sharegpt") else read_trace
    with pytest.raises(TraceFormatError, match=f"trace.*{message}") as error:
        read(path)
    assert len(str(error.value)) < 1700


@given(
    name=st.sampled_from(sorted(SAMPLES)),
    edits=st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.integers(0, 3),
            st.sampled_from([b"", b"\n", b",", b'"', b"-", b"0", b"null", b"{", b"}", b"[", b"]", b"\\", b"\xff", b"9" * 20]),
        ),
        min_size=1,
        max_size=6,
    ),
    forced=st.booleans(),
)
def test_damaged_files_are_read_or_refused(
    name: str, edits: list[tuple[float, int, bytes]], forced: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = SAMPLES[name].encode()
    for where, removed, inserted in edits:
        start = int(where * len(content))
        content = content[:start] + inserted + content[start + removed :]
    path = tmp_path_factory.getbasetemp() / "damaged-format"
    path.write_bytes(content)
    try:
        prompt, output = read_lengths(path, format=name if forced else None)
    except TraceFormatError:
        return
    assert len(prompt) == len(output) >= 1
    assert min(prompt.min(), output.min()) >= 1


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
