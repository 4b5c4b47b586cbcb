"""Any CSV whose header names an arrival, a prompt length and an output length in one of the usual ways."""

from functools import partial
from pathlib import Path
from typing import ClassVar

from pagedkv.sims.traces import TRACE_FORMATS, Rows, parse_seconds
from pagedkv.sims.traces._csv_table import CsvTable

_ARRIVAL_S = ("arrival_s", "timestamp_s", "arrival_time", "arrived_at", "arrival")
_ARRIVAL_MS = ("arrival_ms", "timestamp_ms")
_PROMPT = ("prompt_tokens", "input_tokens", "input_len", "input_length", "prompt_len", "num_prefill_tokens", "input", "prompt")
_OUTPUT = ("output_tokens", "output_len", "output_length", "num_decode_tokens", "generated_tokens", "output")


@TRACE_FORMATS.register("generic-csv")
class GenericCsv:
    """Column names in any case and order; of several that fit, the earliest listed. Other columns are not read."""

    first_line: ClassVar[str] = (
        f"a CSV header with a column {' | '.join(_ARRIVAL_S)} (seconds) or {' | '.join(_ARRIVAL_MS)} (milliseconds), "
        f"one of {' | '.join(_PROMPT)}, and one of {' | '.join(_OUTPUT)}"
    )

    @staticmethod
    def matches(first_line: str) -> bool:
        """Return whether the header names both lengths; a file of lengths has no arrival column."""
        names = {name.strip().strip('"').lower() for name in first_line.split(",")}
        return not names.isdisjoint(_PROMPT) and not names.isdisjoint(_OUTPUT)

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        table = CsvTable.parse(path, text)
        arrival = None
        if table.find(_ARRIVAL_S) is not None:
            arrival = table.column(_ARRIVAL_S, parse=parse_seconds, needed="a finite number of seconds")
        elif table.find(_ARRIVAL_MS) is not None:
            parse_ms = partial(parse_seconds, unit_s=1e-3)
            arrival = table.column(_ARRIVAL_MS, parse=parse_ms, needed="a finite number of milliseconds")
        return Rows(line_numbers=table.line_numbers, prompt=table.column(_PROMPT), output=table.column(_OUTPUT), arrival=arrival)
