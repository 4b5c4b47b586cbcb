"""Traces: when requests arrived and how long they were, read from a file.

A format is one module of this folder: it recognises a file by its head and returns the cells of three columns. Opening,
unpacking and checking every value is done here, once, so that a bad row has the same message in all formats. Adding a
format is one new file with `@TRACE_FORMATS.register`.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.errors import ConfigError, TraceFormatError
from pagedkv.registry import Registry
from pagedkv.sims.prompt_content import PromptContent
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._rows import Column, Rows, shown

CONTENT_LINE = 'lines such as {"timestamp": 0, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 2353]}'
"""What a file with prompt content looks like, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """The requests of a file in order of arrival; all arrays have one entry per request."""

    path: Path
    """The file."""
    format: str
    """Name of its format, e.g. "azure-csv"."""
    arrival_s: npt.NDArray[np.float64]
    """Arrival, seconds after the first request; ascending."""
    prompt_tokens: npt.NDArray[np.int64]
    """Prompt length, at least 1."""
    output_tokens: npt.NDArray[np.int64]
    """Output length, at least 1."""
    line_numbers: npt.NDArray[np.int64]
    """The request's line in the (unpacked) file, from 1; in one JSON document the number of the request."""
    notes: tuple[str, ...] = ()
    """What a reader should know of these requests, e.g. that failed ones were left out."""
    content: PromptContent | None = None
    """What the prompts are made of, if that was asked for."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    def first(self, n: int) -> "Trace":
        """Return the first `n` requests, or all where there are fewer."""
        if n < 1:
            raise ConfigError(f"cannot take {n} requests of {self.path}: take 1 or more")
        return self.where(np.arange(len(self)) < n)

    def where(self, mask: npt.NDArray[np.bool_]) -> "Trace":
        """Return the requests that `mask`, shape (requests,), selects; their times stay as they are."""
        return replace(
            self,
            arrival_s=self.arrival_s[mask],
            prompt_tokens=self.prompt_tokens[mask],
            output_tokens=self.output_tokens[mask],
            line_numbers=self.line_numbers[mask],
            content=self.content and self.content.take(np.flatnonzero(mask)),
        )

    def scaled(self, rate: float) -> "Trace":
        """Return the same requests at `rate` times their request rate: 2 halves the time between arrivals."""
        if not (0 < rate < math.inf and float(self.arrival_s[-1]) / rate < math.inf):
            raise ConfigError(f"cannot scale the request rate by {rate}: needed is a positive number, such as 2 or 0.5")
        return replace(self, arrival_s=self.arrival_s / rate)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceLengths:
    """The lengths of a file in the order of its rows."""

    prompt_tokens: npt.NDArray[np.int64]
    """Prompt length, at least 1, shape (rows,)."""
    output_tokens: npt.NDArray[np.int64]
    """Output length, at least 1, shape (rows,)."""
    notes: tuple[str, ...]
    """What a reader should know of them, e.g. that they are estimates."""


class TraceFormat(Protocol):
    """How one kind of file lays out its rows."""

    first_line: ClassVar[str]
    """What such a file begins with, for messages."""

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether a file that begins like this is meant to be of this format; no two formats may claim one file."""
        ...

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the whole `text` of the file; raises TraceFormatError where it has not this format's shape."""
        ...


TRACE_FORMATS: Registry[type[TraceFormat]] = Registry("pagedkv.sims.traces", kind="trace format")


def read_trace(path: Path, *, format: str | None = None, with_content: bool | None = False) -> Trace:
    """Read a trace; rows out of order are sorted by time, equal times keep the file's order.

    Args:
        path: A file in one of `TRACE_FORMATS`, plain or gzip (recognised by content, like the format).
        format: The format, if it should not be recognised by how the file begins.
        with_content: Read also what the prompts are made of; None: if the file says so. It is not looked at otherwise.

    Raises:
        ConfigError: If `format` is unknown.
        TraceFormatError: If the file cannot be read, a value is wrong, or there are no arrival times or no content that is needed.
    """
    name, rows = _read_rows(path, format)
    if with_content and rows.content is None:
        raise TraceFormatError(f"{path}: {name} does not say what prompts are made of; a file that does has {CONTENT_LINE}")
    arrival, no_trace = rows.arrival, "so the file serves as a length distribution and not as a trace"
    if arrival is None:
        layout = TRACE_FORMATS.load(name).first_line
        raise TraceFormatError(
            f"{path}: {rows.no_arrival}, {no_trace} (--lengths {path} with --users or --request-rate); {name} is {layout}"
        )
    has_times = any(arrival.parse(cell) is not None for cell in arrival.cells)
    prompt_tokens, output_tokens = _lengths(path, rows)
    hint = "" if has_times else f", nor is any other row's, {no_trace}"
    arrival_s = np.array(_values(path, rows.line_numbers, arrival, hint=hint), dtype=np.float64)
    wanted = rows.says_content if with_content is None else with_content
    content = rows.content() if wanted and rows.content is not None else None
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        path=path,
        format=name,
        arrival_s=arrival_s[order] - arrival_s[order[0]],
        prompt_tokens=prompt_tokens[order],
        output_tokens=output_tokens[order],
        line_numbers=np.array(rows.line_numbers, dtype=np.int64)[order],
        notes=rows.notes,
        content=content and content.take(order),
    )


def read_lengths(path: Path, *, format: str | None = None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return prompt and output tokens of a file in the order of its rows; times are not looked at and may be absent.

    Raises:
        ConfigError: If `format` is unknown.
        TraceFormatError: If the file cannot be read or a length is wrong.
    """
    lengths = read_noted_lengths(path, format=format)
    return lengths.prompt_tokens, lengths.output_tokens


def read_noted_lengths(path: Path, *, format: str | None = None) -> TraceLengths:
    """Return what `read_lengths` does, with what there is to say of it; raises the same."""
    rows = _read_rows(path, format)[1]
    prompt_tokens, output_tokens = _lengths(path, rows)
    return TraceLengths(prompt_tokens=prompt_tokens, output_tokens=output_tokens, notes=rows.notes)


def _read_rows(path: Path, format: str | None) -> tuple[str, Rows]:
    """Return the format's name and the rows of `path`, at least one."""
    text = read_text(path)
    head = Head.of(text)
    if format is None:
        known = {name: TRACE_FORMATS.load(name) for name in TRACE_FORMATS.names()}
        format = next((name for name, candidate in known.items() if candidate.matches(head)), None)
        if format is None and head.first_line:
            described = "".join(f"\n  {name}: {candidate.first_line}" for name, candidate in known.items())
            raise TraceFormatError(f"{path}: unknown format, the first line is {shown(head.first_line)}; known are{described}")
    rows = TRACE_FORMATS.load(format).rows(path, text) if format is not None and head.first_line else None
    if format is None or rows is None or not rows.line_numbers:
        notes = f" ({'; '.join(rows.notes)})" if rows and rows.notes else ""
        raise TraceFormatError(f"{path}: no requests in it{notes}")
    return format, rows


def read_text(path: Path) -> str:
    """Return the content of `path`, unpacked and decoded."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceFormatError(f"{path}: cannot be read ({reason})") from error
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise TraceFormatError(f"{path}: a broken or incomplete gzip file ({error})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TraceFormatError(f"{path}, line {line}: not UTF-8 text (byte {content[error.start]:#04x})") from error


def _lengths(path: Path, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    prompt, output = (np.array(_values(path, rows.line_numbers, c), dtype=np.int64) for c in (rows.prompt, rows.output))
    return prompt, output


def _values(path: Path, line_numbers: Sequence[int], column: Column, *, hint: str = "") -> list[float]:
    """Return the value of every cell; raises TraceFormatError, which ends with `hint`, for the first that has none."""
    values: list[float] = []
    for row, (line, cell) in enumerate(zip(line_numbers, column.cells, strict=True)):
        value = column.parse(cell)
        if value is None:
            where = column.place(row) if column.place else f"line {line}, column {column.name}"
            raise TraceFormatError(f"{path}, {where}: {shown(cell)} is not {column.needed}{hint}")
        values.append(value)
    return values
