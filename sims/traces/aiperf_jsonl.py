"""AIPerf's record of each request, profile_export.jsonl.

Times are Unix times in nanoseconds; as float64 seconds they are exact to a quarter of a microsecond.
Source: https://github.com/ai-dynamo/aiperf (docs/tutorials/working-with-profile-exports.md).
"""

from pathlib import Path
from typing import Any, ClassVar

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import at, json_lines
from pagedkv.sims.traces._rows import Rows, left_out, shown, time_column, token_column


@TRACE_FORMATS.register("aiperf-jsonl")
class AiperfJsonl:
    """Requests by when they were sent; those that failed, were cancelled, or warmed up are left out."""

    first_line: ClassVar[str] = (
        '{"metadata": {"request_start_ns": ...}, "metrics": {"input_sequence_length": {"value": 550}, ...}}, profile_export.jsonl'
    )

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether lines are objects with metadata and metrics."""
        return head.is_object and head.keys >= {"metadata", "metrics"}

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        records: list[tuple[int, Any]] = []
        skipped = 0
        for number, line, record in json_lines(path, text):
            if not isinstance(at(record, "metadata"), dict):
                raise TraceFormatError(f"{path}, line {number}: no key metadata in {shown(line)}")
            if _counts(record):
                records.append((number, record))
            else:
                skipped += 1
        inputs, outputs = "input_sequence_length", "output_sequence_length"
        return Rows(
            line_numbers=[number for number, _ in records],
            prompt=token_column(f"metrics.{inputs}.value", [at(record, "metrics", inputs, "value") for _, record in records]),
            output=token_column(f"metrics.{outputs}.value", [at(record, "metrics", outputs, "value") for _, record in records]),
            arrival=time_column(
                "metadata.request_start_ns", [at(record, "metadata", "request_start_ns") for _, record in records], unit_s=1e-9
            ),
            notes=left_out(skipped, "failed, cancelled or warm-up request{s}"),
        )


def _counts(record: object) -> bool:
    """Return whether the request was answered, and was none to warm up."""
    warm_up = at(record, "metadata", "benchmark_phase") == "warmup"
    return not (at(record, "error") or at(record, "metadata", "was_cancelled") or warm_up)
