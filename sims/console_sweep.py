"""A sweep in the terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

from pagedkv.sims.console_table import plain_table
from pagedkv.sims.flat_figures import SUMMED
from pagedkv.sims.sweep import Sweep, errors, value_text
from pagedkv.sims.sweep_findings import Row
from pagedkv.sims.sweep_words import anomaly_text, cliff_text

_FIGURES = {
    "output_tokens_per_s": "tokens/s",
    "goodput_share": "goodput",
    "num_preemptions": "preempted",
    "ttft_s.p99": "TTFT P99, s",
    "tpot_s.p99": "TPOT P99, s",
}
_MOST_ROWS = 200


def show_sweep(sweep: Sweep, console: Console) -> None:
    """Print a line per combination, and what was found along the flags."""
    names = [axis.name for axis in sweep.grid.axes]
    headers = (*(name.replace("_", "-") for name in names), "status", *_FIGURES.values())
    table = plain_table(*headers, left=(len(names),), no_wrap=False)
    for row in sweep.rows[:_MOST_ROWS]:
        if "result" in row.outcome:
            figures = [_number(_per_run(sweep, row, name)) for name in _FIGURES]
            table.add_row(*(str(value_text(row.values[name])) for name in names), str(row.figure("verdict.status")), *figures)
    console.print(table)
    if any(_repeats(sweep, row) > 1 for row in sweep.rows):
        console.print("Preemptions are per repeat; in results.csv, counts are sums over all repeats.")
    if len(sweep.rows) > _MOST_ROWS:
        console.print(f"and {len(sweep.rows) - _MOST_ROWS:,} more in results.csv")
    console.print()
    for cliff in sweep.cliffs:
        console.print(cliff_text(cliff), markup=False)
    for anomaly in sweep.anomalies:
        console.print(Text(anomaly_text(anomaly), "yellow"))
    for what, why in errors(sweep.rows):
        console.print(Text(f"Cannot run: {what}: {why}", "yellow"))


def _repeats(sweep: Sweep, row: Row) -> int:
    return int(row.values.get("repeats", sweep.grid.base.measurement.repeats))


def _per_run(sweep: Sweep, row: Row, name: str) -> Any:
    value, repeats = row.figure(name), _repeats(sweep, row)
    return value / repeats if name in SUMMED and repeats > 1 else value


def _number(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "–" if value is None else f"{value:,}"
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
