"""Any file of JSON objects, one a line, that name an arrival, a prompt length and an output length in one of the usual ways."""

from pathlib import Path
from typing import ClassVar

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import json_lines
from pagedkv.sims.traces._names import ARRIVAL_MS, ARRIVAL_S, OUTPUT, PROMPT, TIME
from pagedkv.sims.traces._rows import Rows, arrival_column, shown, token_column
from pagedkv.sims.traces.mooncake_jsonl import MooncakeJsonl


@TRACE_FORMATS.register("generic-jsonl")
class GenericJsonl:
    """Keys in any case and order, the same ones in all lines; other keys are not read.

    A bare "timestamp" is in seconds here, or a date. With input_length and output_length it is a Mooncake trace, in milliseconds:
    where such a file counts seconds, say so with `--trace-format generic-jsonl`.
    """

    first_line: ClassVar[str] = (
        '{"timestamp": 0.5, "prompt_tokens": 1200, "output_tokens": 52} (seconds), other keys as in generic-csv'
    )

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether lines are objects that name both lengths, and are not Mooncake's."""
        names = {key.lower() for key in head.keys}
        lengths = not names.isdisjoint(PROMPT) and not names.isdisjoint(OUTPUT)
        return head.is_object and lengths and not MooncakeJsonl.matches(head)

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        line_numbers: list[int] = []
        cells: list[list[object]] = []
        keys: list[str] = []
        for number, line, row in json_lines(path, text):
            if not isinstance(row, dict):
                raise TraceFormatError(f"{path}, line {number}: {shown(line)} is no JSON object")
            keys = keys or _keys(path, number, line, row)
            missing = [key for key in keys if key not in row]
            if missing:
                raise TraceFormatError(f"{path}, line {number}: no key {' and '.join(missing)} in {shown(line)}")
            cells.append([row[key] for key in keys])
            line_numbers.append(number)
        columns = list(zip(*cells, strict=True))
        arrival = None
        if len(keys) == 3:
            arrival = arrival_column(keys[2], columns[2], unit_s=1e-3 if keys[2].lower() in ARRIVAL_MS else 1.0)
        return Rows(
            line_numbers=line_numbers,
            prompt=token_column(keys[0], columns[0]),
            output=token_column(keys[1], columns[1]),
            arrival=arrival,
            no_arrival="no arrival key",
        )


def _keys(path: Path, number: int, line: str, row: dict[str, object]) -> list[str]:
    """Return the keys of both lengths in this, the first, object, and of its arrival if it has one."""
    lowered = {key.lower(): key for key in row}
    prompt, output, arrival = (
        next((lowered[name] for name in names if name in lowered), None)
        for names in (PROMPT, OUTPUT, (*ARRIVAL_S, *ARRIVAL_MS, *TIME))
    )
    if prompt is None or output is None:
        wanted = " or ".join(PROMPT if prompt is None else OUTPUT)
        raise TraceFormatError(f"{path}, line {number}: no key {wanted} in {shown(line)}")
    return [prompt, output] if arrival is None else [prompt, output, arrival]
