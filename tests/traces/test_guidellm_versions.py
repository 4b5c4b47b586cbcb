"""GuideLLM's reports, whose shape its versions have changed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from trace_samples import T, Write, guidellm, guidellm_request

from pagedkv.sims.traces import read_trace

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
