"""The answers of max-users and max-context in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pagedkv.sims.capacity_answer import CapacityAnswer
from pagedkv.sims.console_table import plain_table
from pagedkv.sims.limits import LIMIT_NAMES
from pagedkv.sims.max_context import ContextAnswer


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


def _one(unit: str, number: int) -> str:
    return unit.removesuffix("s") if number == 1 else unit


def _show(found: CapacityAnswer, console: Console, *, unit: str, attain: float) -> None:
    low, high = found.interval
    lines = [f"to fit means: {found.criterion}"]
    lines += [f"interval {low:,} to {'–' if high is None else f'{high:,}'}: {found.interval_means}"]
    if found.attained is not None:
        lines.append(f"{found.attained:.1%} of the requests meet the goals ({100 * attain:g} % wanted)")
    for term in found.failing:
        needed = (
            "no request finished" if term.reached_s is None else f"{100 * attain:g} % stay within {1e3 * term.reached_s:,.0f} ms"
        )
        share = "–" if term.attained is None else f"{term.attained:.1%}"
        lines.append(f"{term.metric} fails: {share} within {1e3 * term.limit_s:,.0f} ms; {needed}")
    limit = "" if found.binding is None else f"; limit: {LIMIT_NAMES[found.binding]}"
    smallest = min((each.value for each in found.tried if not each.fits and each.value > found.value), default=None)
    if smallest is not None:
        lines.append(f"at {smallest:,} {_one(unit, smallest)}: {found.stops.rstrip('.')}{limit}")
    elif found.binding is not None:
        lines.append(f"as many as are tried fit; next limit: {LIMIT_NAMES[found.binding]}")
    if found.preemption_from is None:
        lines.append(f"no preemptions up to {found.preemption_tried:,} {unit}")
    else:
        lines.append(f"preemptions set in at {found.preemption_from:,} {_one(unit, found.preemption_from)}")
    if found.anomalies:
        more = ", ".join(f"{value:,}" for value in found.anomalies)
        lines.append(f"anomaly: {more} {unit} fit again; near its limit the figure is noisy, --repeats 5 says how much")
    for line in lines:
        console.print(f"  {line}", markup=False)
    table = plain_table(unit, "fits", "status", "within goals", "preemptions", "output tokens/s", left=(1, 2))
    for row in found.tried:
        table.add_row(
            f"{row.value:,}",
            "yes" if row.fits else "no",
            row.status,
            "–" if row.attained is None else f"{row.attained:.1%}",
            "–" if row.num_preemptions is None else f"{row.num_preemptions:,}",
            "–" if row.output_tokens_per_s is None else f"{row.output_tokens_per_s:,.0f}",
        )
    console.print(table, "\n")
