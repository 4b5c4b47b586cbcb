"""Files that lack something: answers, arrival times, token counts."""

import json
from typing import Any

import pytest
from trace_samples import AIPERF, AIPERF_FAILED, GUIDELLM, SAMPLES, SHAREGPT, VLLM, Write, aiperf, guidellm, lines

from pagedkv.errors import TraceFormatError
from pagedkv.sims.lengths import FileLengths
from pagedkv.sims.traces import read_lengths, read_noted_lengths, read_trace


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
