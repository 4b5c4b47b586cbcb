"""The Mooncake traces: one JSON object per line, times in milliseconds. AIPerf takes such files as its input, too.

Source: https://github.com/kvcache-ai/Mooncake (FAST 2025 release); AIPerf, docs/benchmark-modes/trace-replay.md.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pagedkv.errors import TraceFormatError
from pagedkv.sims.prompt_content import PromptContent
from pagedkv.sims.traces import CONTENT_LINE, TRACE_FORMATS
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import json_lines
from pagedkv.sims.traces._names import ARRIVAL_MS, ARRIVAL_S
from pagedkv.sims.traces._rows import Rows, parse_tokens, shown, time_column, token_column

TOKENS_PER_ID = 512
"""Tokens behind one of hash_ids; the last one of a prompt stands for what is left. Source: the traces' README."""
_LENGTHS = ("input_length", "output_length")


@TRACE_FORMATS.register("mooncake-jsonl")
class MooncakeJsonl:
    """Objects with timestamp, input_length and output_length, and perhaps hash_ids; other keys are not read."""

    first_line: ClassVar[str] = '{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1, 2]} (milliseconds)'

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether lines are objects that name one of the lengths, and no other arrival than a timestamp."""
        return head.is_object and not head.keys.isdisjoint(_LENGTHS) and head.keys.isdisjoint((*ARRIVAL_S, *ARRIVAL_MS))

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        line_numbers: list[int] = []
        cells: list[tuple[object, ...]] = []
        for number, line, row in json_lines(path, text):
            cells.append(_cells(path, number, line, row))
            line_numbers.append(number)
        times, hash_ids, prompts, outputs = zip(*cells, strict=True)
        return Rows(
            line_numbers=line_numbers,
            prompt=token_column("input_length", prompts),
            output=token_column("output_length", outputs),
            arrival=time_column("timestamp", times, unit_s=1e-3),
            content=partial(_content, path, line_numbers, prompts, hash_ids),
            says_content=any(hash_ids),
        )


def _cells(path: Path, number: int, line: str, row: Any) -> tuple[object, ...]:
    """Return timestamp (None if absent, as in a file of lengths), hash_ids (None if absent) and `_LENGTHS` of one line."""
    missing = [key for key in _LENGTHS if not isinstance(row, dict) or key not in row]
    if missing:
        raise TraceFormatError(f"{path}, line {number}: no key {' and '.join(missing)} in {shown(line)}")
    return (row.get("timestamp"), row.get("hash_ids"), *(row[key] for key in _LENGTHS))


def _content(path: Path, line_numbers: Sequence[int], lengths: Sequence[object], cells: Sequence[object]) -> PromptContent:
    """Return the prompts of these lengths, which are good, as the ids in `cells`."""
    if not any(cells):
        raise TraceFormatError(f"{path}: no hash_ids in it, so nothing says which prompts begin alike; needs {CONTENT_LINE}")
    rows = list[list[int]]()
    follows: dict[int, tuple[int | None, int]] = {}  # by id: the one before it, and the first line that says so
    for line, length, ids in zip(line_numbers, lengths, cells, strict=True):
        needed = -(-(parse_tokens(length) or 0) // TOKENS_PER_ID)
        where = f"{path}, line {line}, key hash_ids:"
        if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < 2**63 for i in ids):
            raise TraceFormatError(f"{where} {shown(ids)} is not a list of whole numbers of 0 or more, below 2**63")
        if len(ids) != needed:
            raise TraceFormatError(
                f"{where} {len(ids)} ids for {length} tokens; needed are {needed}, one per {TOKENS_PER_ID} tokens and a partial one"
            )
        before = None
        for i in ids:
            known, first = follows.setdefault(i, (before, line))
            if known != before:
                raise TraceFormatError(
                    f"{where} {i} follows {before}, but {known} in line {first}; an id stands for all tokens before it as well"
                )
            before = i
        rows.append(ids)
    offsets = np.concatenate(([0], np.cumsum([len(ids) for ids in rows])))
    return PromptContent(ids=np.concatenate(rows).astype(np.int64), offsets=offsets, tokens_per_id=TOKENS_PER_ID)
