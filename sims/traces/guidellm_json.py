"""GuideLLM's benchmark report, benchmarks.json, of versions 0.1 to 0.8.

Times are Unix times in seconds, so that the benchmarks of a sweep follow each other as the server saw them.
Source: https://github.com/vllm-project/guidellm (0.1: core/result.py; 0.2: benchmark/benchmark.py; then benchmark/objects.py,
schemas/request_stats.py and schemas/base/request_stats.py).
"""

from pathlib import Path
from typing import ClassVar

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import at, json_document, list_at
from pagedkv.sims.traces._rows import Rows, left_out, time_column, token_column

# By version, the latest first: the first that is there counts, what is computed in the file after what was measured.
_PROMPT = (("input_metrics", "total_tokens"), ("prompt_tokens",), ("prompt_token_count",))
_OUTPUT = (("output_metrics", "total_tokens"), ("output_tokens",), ("output_token_count",))
_START = (
    ("info", "timings", "request_start"),
    ("request_start_time",),
    ("scheduler_info", "request_timings", "request_start"),
    ("start_time",),
)
_TOTALS = (("request_totals",), ("metrics", "request_totals"))


@TRACE_FORMATS.register("guidellm-json")
class GuidellmJson:
    """The successful requests of all benchmarks of a report, by when they were sent."""

    first_line: ClassVar[str] = '{"args": ..., "benchmarks": [{"requests": {"successful": [...], ...}, ...}]}'

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether the object has benchmarks."""
        return head.is_object and "benchmarks" in head.keys

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        benchmarks = list_at(path, "benchmarks", at(json_document(path, text), "benchmarks"))
        requests: list[object] = []
        places: list[str] = []
        failed = total = 0
        for number, benchmark in enumerate(benchmarks):
            where, successful = _successful(path, number, benchmark)
            requests += successful
            places += (f"{where}[{i}]" for i in range(len(successful)))
            failed += _failed(benchmark)
            total += max(len(successful), _total(benchmark))
        starts = [_first(request, _START) for request in requests]
        several = (f"{len(benchmarks)} benchmarks, one after the other",) if len(benchmarks) > 1 else ()
        sampled = total > len(requests)
        return Rows(
            line_numbers=range(1, len(requests) + 1),
            prompt=token_column("prompt", [_first(r, _PROMPT) for r in requests], lambda row: f"{places[row]}, prompt tokens"),
            output=token_column("output", [_first(r, _OUTPUT) for r in requests], lambda row: f"{places[row]}, output tokens"),
            arrival=None if sampled else time_column("start", starts, lambda row: f"{places[row]}, start time"),
            no_arrival=f"only {len(requests)} of the {total} successful requests are in it",
            notes=(*several, *left_out(failed, "errored or incomplete request{s}")),
        )


def _successful(path: Path, number: int, benchmark: object) -> tuple[str, list[object]]:
    """Return where the answered requests of a benchmark are, and these."""
    where = f"benchmarks[{number}].results"  # 0.1
    found = at(benchmark, "results")
    if found is None:
        where = f"benchmarks[{number}].requests.successful"
        found = at(benchmark, "requests", "successful")
    if found is None:
        raise TraceFormatError(f"{path}: no {where} and no results beside requests, so it is no report with its requests")
    return where, list_at(path, where, found)


def _failed(benchmark: object) -> int:
    """Return how many requests of a benchmark came to no answer."""
    lists = (at(benchmark, "errors"), at(benchmark, "requests", "errored"), at(benchmark, "requests", "incomplete"))
    return sum(len(found) for found in lists if isinstance(found, list))


def _total(benchmark: object) -> int:
    """Return how many requests were answered, those that the report does not hold included; 0 where it does not say."""
    totals = [at(benchmark, *keys, "successful") for keys in _TOTALS]
    return max((total for total in totals if type(total) is int), default=0)


def _first(request: object, paths: tuple[tuple[str, ...], ...]) -> object:
    """Return the first of `paths` that is there, or None."""
    return next((value for keys in paths if (value := at(request, *keys)) is not None), None)
