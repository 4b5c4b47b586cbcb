"""The Mooncake traces: one JSON object per line, times in milliseconds.

Source: https://github.com/kvcache-ai/Mooncake (FAST 2025 release).
"""

import json
from functools import partial
from pathlib import Path
from typing import ClassVar

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import NEEDED_TOKENS, TRACE_FORMATS, Column, Rows, parse_seconds, parse_tokens, shown

_LENGTHS = ("input_length", "output_length")


@TRACE_FORMATS.register("mooncake-jsonl")
class MooncakeJsonl:
    """Objects with timestamp, input_length and output_length; other keys, such as hash_ids, are not read."""

    first_line: ClassVar[str] = '{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1, 2]} (milliseconds)'

    @staticmethod
    def matches(first_line: str) -> bool:
        """Return whether the line begins an object that names one of the lengths."""
        return first_line.startswith("{") and ('"input_length"' in first_line or '"output_length"' in first_line)

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        line_numbers: list[int] = []
        cells: list[tuple[object, ...]] = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                cells.append(_cells(path, number, line))
                line_numbers.append(number)
        times, prompts, outputs = zip(*cells, strict=True)
        return Rows(
            line_numbers=line_numbers,
            prompt=Column(name="input_length", cells=prompts, parse=parse_tokens, needed=NEEDED_TOKENS),
            output=Column(name="output_length", cells=outputs, parse=parse_tokens, needed=NEEDED_TOKENS),
            arrival=Column(
                name="timestamp",
                cells=times,
                parse=partial(parse_seconds, unit_s=1e-3),
                needed="a finite number of milliseconds",
            ),
        )


def _cells(path: Path, number: int, line: str) -> tuple[object, ...]:
    """Return timestamp (None if absent, as in a file of lengths) and `_LENGTHS` of one line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise TraceFormatError(f"{path}, line {number}: not JSON ({error})") from error
    missing = [key for key in _LENGTHS if not isinstance(row, dict) or key not in row]
    if missing:
        raise TraceFormatError(f"{path}, line {number}: no key {' and '.join(missing)} in {shown(line.strip())}")
    return (row.get("timestamp"), *(row[key] for key in _LENGTHS))
