"""Traces: when requests arrived and how long they were, read from a file.

A format is one module of this folder: it recognises a first line and returns the cells of three columns. Opening,
unpacking and checking every value is done here, once, so that a bad row has the same message in all formats. Adding a
format is one new file with `@TRACE_FORMATS.register`.
"""

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.errors import ConfigError, TraceFormatError
from pagedkv.registry import Registry
from pagedkv.sims.prompt_content import PromptContent

MAX_TOKENS = 2**31 - 1
"""Longest length a row may give: sums of two stay far inside int64."""

MAX_TIME_S = 1e12
"""Latest time a row may give (seconds): 30,000 years, so that differences stay finite and exact to a millisecond."""

Parser = Callable[[object], float | None]
"""The value of one cell, or None where it has none."""

NEEDED_TOKENS = f"a whole number of tokens (needed: 1 or more, at most {MAX_TOKENS})"

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
    """The request's line in the (unpacked) file, from 1."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a file, its cells as they stand there."""

    name: str
    """The file's name for it."""
    cells: Sequence[object]
    """One per row: str in CSV, any JSON value in JSON lines."""
    parse: Parser
    """The value of one cell, or None where it has none."""
    needed: str
    """Completes "'abc' is not ..."."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a file, values not yet checked; the columns have one cell per line number."""

    line_numbers: Sequence[int]
    """Line of each row, from 1."""
    prompt: Column
    """Prompt lengths (tokens)."""
    output: Column
    """Output lengths (tokens)."""
    arrival: Column | None
    """Arrival times (seconds after any origin); None if the file has no such column."""
    content: Callable[[], PromptContent] | None = None
    """Reads what the prompts are made of, once the lengths are known to be good; None if such files do not say it."""
    says_content: bool = False
    """Whether this file says it."""


class TraceFormat(Protocol):
    """How one kind of file lays out its rows."""

    first_line: ClassVar[str]
    """What the first line of such a file looks like, for messages."""

    @staticmethod
    def matches(first_line: str) -> bool:
        """Return whether a file with this first line is meant to be of this format."""
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
        format: The format, if it should not be recognised by the first line.
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
        raise TraceFormatError(f"{path}: no arrival column, {no_trace}; {name} is {layout}")
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
        content=content and content.take(order),
    )


def read_lengths(path: Path, *, format: str | None = None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return prompt and output tokens of a file in the order of its rows; times are not looked at and may be absent.

    Raises:
        ConfigError: If `format` is unknown.
        TraceFormatError: If the file cannot be read or a length is wrong.
    """
    return _lengths(path, _read_rows(path, format)[1])


def shown(value: object) -> str:
    """Return `value` for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_tokens(cell: object) -> int | None:
    """Return the length in `cell`, or None if it is no whole number from 1 to `MAX_TOKENS`."""
    if isinstance(cell, str):
        text = cell.strip()
        # int() also takes "1_000" and other scripts' digits, and refuses thousands of digits.
        cell = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
    return cell if type(cell) is int and 1 <= cell <= MAX_TOKENS else None


def parse_seconds(cell: object, *, unit_s: float = 1.0) -> float | None:
    """Return the seconds in `cell`, a number of units of `unit_s` seconds, or None if it is not a finite number."""
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)) or (isinstance(cell, str) and "_" in cell):
        return None
    try:
        time_s = float(cell) * unit_s
    except (ValueError, OverflowError):
        return None
    return time_s if -MAX_TIME_S <= time_s <= MAX_TIME_S else None


def _read_rows(path: Path, format: str | None) -> tuple[str, Rows]:
    """Return the format's name and the rows of `path`, at least one."""
    text = _read_text(path)
    first_line = text.lstrip().partition("\n")[0]
    if format is None:
        known = {name: TRACE_FORMATS.load(name) for name in TRACE_FORMATS.names()}
        format = next((name for name, candidate in known.items() if candidate.matches(first_line)), None)
        if format is None and first_line:
            described = "".join(f"\n  {name}: {candidate.first_line}" for name, candidate in known.items())
            first = shown(first_line)
            raise TraceFormatError(f"{path}: unknown format, the first line is {first}; known are{described}")
    rows = TRACE_FORMATS.load(format).rows(path, text) if format is not None and first_line else None
    if format is None or rows is None or not rows.line_numbers:
        raise TraceFormatError(f"{path}: no requests in it")
    return format, rows


def _read_text(path: Path) -> str:
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
    for line, cell in zip(line_numbers, column.cells, strict=True):
        value = column.parse(cell)
        if value is None:
            where = f"{path}, line {line}, column {column.name}"
            raise TraceFormatError(f"{where}: {shown(cell)} is not {column.needed}{hint}")
        values.append(value)
    return values
