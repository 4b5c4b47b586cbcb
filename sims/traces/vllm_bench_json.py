"""The result of `vllm bench serve --save-result --save-detailed`: lists with one entry per request.

A request arrives when it is sent, after any wait for --max-concurrency: its start_times, seconds of a clock that begins anywhere.
Source: vLLM, vllm/benchmarks/serve.py.
"""

from pathlib import Path
from typing import Any, ClassVar

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import at, json_documents, list_at
from pagedkv.sims.traces._rows import Rows, left_out, shown, time_column, token_column

_LENGTHS = ("input_lens", "output_lens")
_TIMES = "start_times"
_SUMMARY = frozenset(("request_throughput", "total_input_tokens"))


@TRACE_FORMATS.register("vllm-bench-json")
class VllmBenchJson:
    """One result, or several that --append-result wrote one behind the other; requests without an answer are left out."""

    first_line: ClassVar[str] = (
        '{"date": ..., "input_lens": [...], "output_lens": [...], "start_times": [...], ...}, with --save-detailed'
    )

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether the object has lists of lengths, or is such a result without details."""
        return head.is_object and (not head.keys.isdisjoint(_LENGTHS) or head.keys >= _SUMMARY)

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        runs = json_documents(path, text)
        names = (*_LENGTHS, _TIMES) if all(at(run, _TIMES) is not None for _, run in runs) else _LENGTHS
        cells: list[tuple[object, ...]] = []
        places: list[tuple[int, int]] = []
        requests = 0
        for line, run in runs:
            lists = _lists(path, line, run, names)
            errors = at(run, "errors")
            failed = errors if isinstance(errors, list) and len(errors) == len(lists[0]) else [""] * len(lists[0])
            kept = [i for i, error in enumerate(failed) if not error and lists[1][i] != 0]
            cells.extend(tuple(values[i] for values in lists) for i in kept)
            places.extend((line, i) for i in kept)
            requests += len(lists[0])
        columns = [[row[column] for row in cells] for column in range(len(names))]

        def place(name: str, row: int) -> str:
            line, i = places[row]
            return f"line {line}, {name}[{i}]"

        one = len(runs) == 1
        return Rows(
            line_numbers=[i + 1 for _, i in places] if one else [line for line, _ in places],
            prompt=token_column(names[0], columns[0], lambda row: place(names[0], row)),
            output=token_column(names[1], columns[1], lambda row: place(names[1], row)),
            arrival=time_column(_TIMES, columns[2], lambda row: place(_TIMES, row)) if one and len(names) > 2 else None,
            no_arrival="no start_times, which only newer versions of vllm bench serve save"
            if one
            else f"{len(runs)} runs, each with a clock of its own",
            notes=left_out(requests - len(cells), "request{s} without an answer"),
        )


def _lists(path: Path, line: int, run: object, names: tuple[str, ...]) -> list[list[Any]]:
    """Return the lists `names` of one result, all of one length."""
    if all(at(run, name) is None for name in _LENGTHS):
        needed = "vllm bench serve --save-result writes them with --save-detailed"
        raise TraceFormatError(f"{path}, line {line}: no input_lens and output_lens in {shown(run)}; {needed}")
    lists = [list_at(path, name, at(run, name)) for name in names]
    for name, values in zip(names, lists, strict=True):
        if len(values) != len(lists[0]):
            raise TraceFormatError(f"{path}, line {line}: {name} has {len(values)} entries where {names[0]} has {len(lists[0])}")
    return lists
