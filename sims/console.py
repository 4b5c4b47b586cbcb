"""The answer in the terminal: where the memory goes, one column per allocator, and the verdict. 80 columns are enough."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pagedkv.sims.budget_parts import PARTS
from pagedkv.sims.command import command_line
from pagedkv.sims.comparison import AT_LEAST, Row, advantages, comparison, prefix_note
from pagedkv.sims.console_models import models_memory
from pagedkv.sims.console_table import plain_table
from pagedkv.sims.deployment import Deployment
from pagedkv.sims.error_interval import calibration_lines
from pagedkv.sims.part_tables import PartTable, class_tables, model_tables
from pagedkv.sims.results import Results
from pagedkv.sims.run_texts import contiguous_max_holds, kv_equation, run_facts, run_title, window_note
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.start_check import start_warnings
from pagedkv.units import gib

_BAR_WIDTH = 30
STATUS_STYLE = {"stable": "green", "saturated": "yellow", "rejecting": "red", "failed": "red", "unmeasured": "yellow"}


def show(results: Results, console: Console) -> None:
    """Print the whole answer."""
    for part in (
        _setting(results),
        _memory(results.scenario),
        *([Text(holds)] if (holds := contiguous_max_holds(results)) else []),
        _comparison(results, console.width),
        *map(_part, (*class_tables(results.document()), *model_tables(results.document()))),
        _calibration(results),
        _verdict(results),
    ):
        console.print(part)
        console.print()
    first = next(iter(results.by_allocator.values()))
    console.print(f"Try next:  {first.verdict.next_command}", soft_wrap=True, markup=False)  # whole, to be copied
    console.print(f"This run:  {command_line(results.scenario.config)}", soft_wrap=True, markup=False, style="dim")


def _setting(results: Results) -> RenderableType:
    return Group(Text(run_title(results), "bold"), Text(run_facts(results), "dim"))


def _part(table: PartTable) -> RenderableType:
    rows = plain_table(*table.head)
    for row in table.rows:
        rows.add_row(*row)
    return Group(Text(table.title, "bold"), rows)


def _memory(scenario: Scenario) -> RenderableType:
    """Return how the memory is divided: by one model that stays, or by several that come and go."""
    return waterfall(scenario.deployment) if scenario.model_serving is None else models_memory(scenario.model_serving)


def waterfall(deployment: Deployment) -> RenderableType:
    """Return the memory budget as bars, with the equation of the KV line."""
    budget = deployment.budget
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("visible memory", gib(budget.visible), Text("█" * _BAR_WIDTH, "dim"))
    before = 0
    for part, label in PARTS.items():
        size = getattr(budget, part)
        start, before = round(_BAR_WIDTH * before / budget.visible), before + size
        end = round(_BAR_WIDTH * before / budget.visible)
        bar = Text(" " * start + ("█" * (end - start) or ("▏" if size else "")), "cyan" if part == "kv_cache" else "blue")
        table.add_row(Text(f"  {label}", "bold" if part == "kv_cache" else ""), gib(size), bar)
    equation, blocks = kv_equation(deployment)
    lines: list[RenderableType] = [Text("Memory", "bold"), table, Text(f"{equation}\n         = {blocks}"), Text(budget.gate)]
    if note := window_note(deployment):
        lines.append(Text(note, "yellow"))
    lines += [Text(f"warning: {warning}", "yellow") for warning in (*budget.warnings, *start_warnings(deployment.config))]
    return Group(*lines)


def _comparison(results: Results, width: int) -> RenderableType:
    """Return the comparison of the allocators."""
    document = results.document()
    return side_by_side(comparison(document), [column["allocator"] for column in document["results"]], width)


def side_by_side(rows: list[Row], names: Sequence[str], width: int) -> RenderableType:
    """Return `rows`, whose columns have these `names`, as several tables if they are wider than `width`."""
    labels = ["  " * row.depth + row.label for row in rows]
    columns = list(zip(names, *(row.values for row in rows if row.values), strict=True))
    tables: list[RenderableType] = []
    for group in _groups([max(map(len, column)) + _GAP for column in columns], width - max(map(len, labels))):
        table = plain_table("", *(columns[i][0] for i in group))
        for label, row in zip(labels, rows, strict=True):
            values = [Text(row.values[i], STATUS_STYLE.get(row.values[i], "")) for i in group] if row.values else []
            table.add_row(Text(label, "" if values else "bold"), *values)
        tables += [table] if not tables else ["", table]
    if any(value.startswith(AT_LEAST) for row in rows for value in row.values):
        tables.append("≥: requests that the end cut off may raise it (simulate explain lower bounds)")
    return Group(*tables)


_GAP = 2
"""Blanks between columns."""


def _groups(widths: list[int], room: int) -> list[list[int]]:
    """Return the indices of columns of `widths` side by side, as many as there is `room` for, and one at least."""
    groups: list[list[int]] = []
    for i, width in enumerate(widths):
        if not groups or sum(widths[k] for k in groups[-1]) + width > room:
            groups.append([])
        groups[-1].append(i)
    return groups


def _calibration(results: Results) -> RenderableType:
    """Say how far the constants of step times may be off."""
    first, *rest = calibration_lines(results.document())
    style = "dim" if results.scenario.deployment.calibration.status == "validated" else "yellow"
    return Group(Text(first, style), *(Padding(Text(line), (0, 0, 0, 2)) for line in rest))


def _verdict(results: Results) -> RenderableType:
    lines: list[RenderableType] = [Text("Verdict", "bold")]
    for name, result in results.by_allocator.items():
        style = STATUS_STYLE[result.verdict.status]
        lines.append(Padding(Text.assemble((f"{name}: ", "bold"), (result.verdict.text, style)), (0, 0, 0, 2)))
    document = results.document()
    lines += [Padding(Text(line), (0, 0, 0, 2)) for line in advantages(document)]
    if note := prefix_note(document, results.scenario.deployment.why_no_prefix_caching):
        lines.append(Padding(Text(note, "yellow"), (0, 0, 0, 2)))
    return Group(*lines)
