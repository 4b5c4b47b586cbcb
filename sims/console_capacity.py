"""The answers of max-users and max-context in the terminal."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagedkv.sims.attainment import share_words
from pagedkv.sims.capacity_answer import CapacityAnswer, calibrated, run_at
from pagedkv.sims.comparison import Row
from pagedkv.sims.console import side_by_side
from pagedkv.sims.console_table import plain_table
from pagedkv.sims.engine_capacity import EngineAnswer, EngineAnswers
from pagedkv.sims.limits import LIMIT_NAMES
from pagedkv.sims.max_context import ContextAnswer

_LESS_NEEDED = ("preemptions", "within goals")
"""Columns that a narrow terminal goes without, in this order."""
_GAP = 2
"""Columns of the terminal that rich pads each of the table with, those at its edges too."""


def show_max_users(answers: Sequence[CapacityAnswer], console: Console, *, attain: float) -> None:
    """Print the largest number of users, one answer per allocator."""
    for found in answers:
        users = f"{found.value:,} user{'' if found.value == 1 else 's'}"
        console.print(Text(f"{found.allocator}: {users if found.value else 'not even one user fits'}", "bold"))
        _show(found, console, unit="users", attain=attain)


def show_max_context(answers: Sequence[ContextAnswer], console: Console, *, attain: float) -> None:
    """Print the longest context, one answer per allocator."""
    for answer in answers:
        found, users = answer.found, f"{answer.users:,} user{'' if answer.users == 1 else 's'}"
        text = f"{found.value:,} tokens for {users}: prompts of {answer.prompt_len:,} and outputs of {answer.output_len:,}"
        none = f"{users} do not fit even with the shortest prompts and outputs of {answer.output_len:,}"
        console.print(Text(f"{found.allocator}: {text if found.value else none}", "bold"))
        _show(found, console, unit="tokens", attain=attain)


def show_engine_answers(answers: EngineAnswers, console: Console, *, unit: str, attain: float) -> None:
    """Print a column per engine (and allocator, if it is asked about several), then what stops each, and who has no answer."""
    found = [each.found for each in answers.answers]
    console.print(f"to fit means: {found[0].criterion}\n", markup=False)
    rows = [
        Row(label="weights", values=tuple(each.weights for each in answers.answers)),
        Row(label="tokens of context" if unit == "tokens" else unit, values=tuple(f"{each.value:,}" for each in found)),
        Row(label="interval", values=tuple(f"{each.interval[0]:,} to {_or_none(each.interval[1])}" for each in found)),
        Row(label="if steps are off", values=tuple(map(calibrated, found))),
        Row(label="within goals", values=tuple(share_words(each.attained, attain) for each in found)),
        Row(label="output tokens/s", values=tuple(map(_tokens_per_s, found))),
        Row(label="preemptions from", values=tuple(_or_none(each.preemption_from) for each in found)),
    ]
    console.print(side_by_side(rows, [_name(each, answers) for each in answers.answers], console.width))
    console.print()
    for each in answers.answers:
        lines = [*_misses(each.found, attain=attain), _stop(each.found, unit=unit)]
        console.print(Text.assemble((f"{_name(each, answers)}: ", "bold"), "; ".join(filter(None, lines))))
    for engine, why in answers.refused.items():
        console.print(Text.assemble((f"{engine} has no answer: ", "bold"), (why, "red")))
    intervals = dict.fromkeys(each.found.interval_means for each in answers.answers)
    console.print("\ninterval: " + "; or ".join(intervals), markup=False)
    console.print("if steps are off: all take as long, or as short, as their constants may be off", markup=False)


def _or_none(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _tokens_per_s(found: CapacityAnswer) -> str:
    """Return those of the run at the answer."""
    at = run_at(found)
    return "–" if at is None or at.output_tokens_per_s is None else f"{at.output_tokens_per_s:,.0f}"


def _name(each: EngineAnswer, answers: EngineAnswers) -> str:
    alone = sum(other.engine == each.engine for other in answers.answers) == 1
    return each.engine if alone else f"{each.engine} {each.found.allocator}"


def _one(unit: str, number: int) -> str:
    return unit.removesuffix("s") if number == 1 else unit


def _show(found: CapacityAnswer, console: Console, *, unit: str, attain: float) -> None:
    low, high = found.interval
    lines = [f"{calibrated(found)} {unit} if all steps take as long, or as short, as their constants may be off"]
    lines += [f"to fit means: {found.criterion}"]
    lines += [f"interval {low:,} to {'–' if high is None else f'{high:,}'}: {found.interval_means}"]
    at = run_at(found)
    if at is not None and at.ttft_s is not None and at.tpot_s is not None:
        name = f"{found.value:,} {_one(unit, found.value)}"
        lines.append(f"at {name}: TTFT mean {1e3 * at.ttft_s:,.0f} ms, TPOT mean {1e3 * at.tpot_s:,.0f} ms")
    if found.attained is not None:
        lines.append(f"{share_words(found.attained, attain)} of the requests meet the goals ({100 * attain:g} % wanted)")
    lines += _misses(found, attain=attain)
    lines += filter(None, [_stop(found, unit=unit)])
    if found.preemption_from is None:
        lines.append(f"no preemptions up to {found.preemption_tried:,} {unit}")
    else:
        lines.append(f"preemptions set in at {found.preemption_from:,} {_one(unit, found.preemption_from)}")
    if found.anomalies:
        more = ", ".join(f"{value:,}" for value in found.anomalies)
        lines.append(f"anomaly: {more} {unit} fit again; near its limit the figure is noisy, --repeats 5 says how much")
    for line in lines:
        console.print(f"  {line}", markup=False)
    console.print(_table(found, unit, attain, console.width), "\n")


def _table(found: CapacityAnswer, unit: str, attain: float, width: int) -> Table:
    """Return what was tried; headers wrap, and columns are left out where the terminal is narrower than the rest."""
    columns = {
        unit: [f"{row.value:,}" for row in found.tried],
        "fits": ["yes" if row.fits else "no" for row in found.tried],
        "status": [row.status for row in found.tried],
        "within goals": [share_words(row.attained, attain) for row in found.tried],
        "preemptions": ["–" if row.num_preemptions is None else f"{row.num_preemptions:,}" for row in found.tried],
        "output tokens/s": ["–" if row.output_tokens_per_s is None else f"{row.output_tokens_per_s:,.0f}" for row in found.tried],
    }
    least = {header: max(map(len, (*header.split(), *cells))) for header, cells in columns.items()}
    for header in _LESS_NEEDED:
        if sum(least.values()) + _GAP * len(least) > width:
            del columns[header], least[header]
    table = plain_table(*columns, left=(1, 2), no_wrap=False)
    for column, at_least in zip(table.columns, least.values(), strict=True):
        column.min_width = at_least
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _misses(found: CapacityAnswer, *, attain: float) -> Iterator[str]:
    """Say which goals the smallest value misses, if nothing fits."""
    for term in found.failing:
        needed = (
            "no request finished" if term.reached_s is None else f"{100 * attain:g} % stay within {1e3 * term.reached_s:,.0f} ms"
        )
        share = share_words(term.attained, attain)
        yield f"{term.metric} fails: {share} within {1e3 * term.limit_s:,.0f} ms; {needed}"


def _stop(found: CapacityAnswer, *, unit: str) -> str:
    """Say what stops the next value; empty if every value fits and no limit is known."""
    limit = "" if found.binding is None else f"; limit: {LIMIT_NAMES[found.binding]}"
    smallest = min((each.value for each in found.tried if not each.fits and each.value > found.value), default=None)
    if smallest is not None:
        return f"at {smallest:,} {_one(unit, smallest)}: {found.stops.rstrip('.')}{limit}"
    return "" if found.binding is None else f"as many as are tried fit; next limit: {LIMIT_NAMES[found.binding]}"
