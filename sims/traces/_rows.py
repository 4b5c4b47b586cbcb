"""What a trace format returns: the cells of three columns, and how a cell becomes a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pagedkv.sims.prompt_content import PromptContent

MAX_TOKENS = 2**31 - 1
"""Longest length a row may give: sums of two stay far inside int64."""

NEEDED_DATE = "a date and time such as 2023-11-16 18:15:46.68"
_ORIGIN = datetime(2020, 1, 1, tzinfo=UTC)
"""Dates count from here: near the traces, so that a float64 of seconds resolves 0.1 us."""

MAX_TIME_S = 1e12
"""Latest time a row may give (seconds): 30,000 years, so that differences stay finite and exact to a millisecond."""

Parser = Callable[[object], float | None]
"""The value of one cell, or None where it has none."""

NEEDED_TOKENS = f"a whole number of tokens (needed: 1 or more, at most {MAX_TOKENS})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a file, its cells as they stand there."""

    name: str
    """The file's name for it."""
    cells: Sequence[object]
    """One per row: str in CSV, any JSON value in JSON."""
    parse: Parser
    """The value of one cell, or None where it has none."""
    needed: str
    """Completes "'abc' is not ..."."""
    place: Callable[[int], str] | None = None
    """Says where the cell of row i is, e.g. "input_lens[3]"; None: in its row's line and its column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a file, values not yet checked; the columns have one cell per line number."""

    line_numbers: Sequence[int]
    """Line of each row, from 1; in one JSON document the number of the request, from 1."""
    prompt: Column
    """Prompt lengths (tokens)."""
    output: Column
    """Output lengths (tokens)."""
    arrival: Column | None
    """Arrival times (seconds after any origin); None if the file says none."""
    no_arrival: str = "no arrival column"
    """Why there are no arrival times, for messages."""
    notes: tuple[str, ...] = ()
    """What a reader should know of these rows, e.g. that failed requests were left out."""
    content: Callable[[], PromptContent] | None = None
    """Reads what the prompts are made of, once the lengths are known to be good; None if such files do not say it."""
    says_content: bool = False
    """Whether this file says it."""


def shown(value: object) -> str:
    """Return `value` for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def left_out(number: int, what: str) -> tuple[str, ...]:
    """Return the note that `number` rows were left out, none if none were; `what` they are has "{s}" where a plural has an s."""
    return (f"{number:,} {what.format(s='' if number == 1 else 's')} left out",) if number else ()


def token_column(name: str, cells: Sequence[object], place: Callable[[int], str] | None = None) -> Column:
    """Return a column of lengths."""
    return Column(name=name, cells=cells, parse=parse_tokens, needed=NEEDED_TOKENS, place=place)


def time_column(name: str, cells: Sequence[object], place: Callable[[int], str] | None = None, *, unit_s: float = 1.0) -> Column:
    """Return a column of times, numbers of units of `unit_s` seconds: 1, 1e-3 or 1e-9."""
    unit = {1.0: "seconds", 1e-3: "milliseconds", 1e-9: "nanoseconds"}[unit_s]

    def parse(cell: object) -> float | None:
        return parse_seconds(cell, unit_s=unit_s)

    return Column(name=name, cells=cells, parse=parse, needed=f"a finite number of {unit}", place=place)


def arrival_column(name: str, cells: Sequence[object], *, unit_s: float = 1.0) -> Column:
    """Return a column of times: dates if no cell is a number and one is a date, else numbers of units of `unit_s` seconds."""
    if not any(parse_seconds(cell) is not None for cell in cells) and any(parse_date(cell) is not None for cell in cells):
        return Column(name=name, cells=cells, parse=parse_date, needed=NEEDED_DATE)
    return time_column(name, cells, unit_s=unit_s)


def parse_date(cell: object) -> float | None:
    """Return the seconds from `_ORIGIN` to the date in `cell`, ISO 8601; without an offset it counts as UTC."""
    try:
        date = datetime.fromisoformat(str(cell).strip())
    except ValueError:
        return None
    return ((date if date.tzinfo else date.replace(tzinfo=UTC)) - _ORIGIN).total_seconds()


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
