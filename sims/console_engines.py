"""Engines side by side in the terminal: what each has, what each does with it, what comes out, and why."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from pagedkv.sims.command import command_line
from pagedkv.sims.comparison import comparison
from pagedkv.sims.console import STATUS_STYLE, side_by_side
from pagedkv.sims.console_table import plain_table
from pagedkv.sims.deployment import memory_request
from pagedkv.sims.engine_comparison import EngineComparison
from pagedkv.sims.error_interval import calibration_lines
from pagedkv.sims.run_texts import load_facts
from pagedkv.units import GIB


def show_engines(compared: EngineComparison, console: Console) -> None:
    """Print the comparison."""
    document = compared.document()
    first = next(iter(compared.results.values())).scenario
    hardware, model = first.deployment.hardware.title, first.model_titles
    console.print(
        Text(f"{first.load.title} on {hardware}, {model}: {len(compared.results)} engines, each with its own defaults", "bold")
    )
    console.print(Text(load_facts(next(iter(compared.results.values()))), "dim"))
    console.print()
    console.print(_memory(compared, document))
    console.print()
    console.print(_columns(document, console.width))
    console.print()
    console.print(_step_times(compared))
    console.print()
    console.print(_rules(compared, document))
    console.print()
    console.print(f"This run:  {command_line(compared.config)}", soft_wrap=True, markup=False, style="dim")


def _memory(compared: EngineComparison, document: dict[str, Any]) -> RenderableType:
    """Return what each engine has: weights, KV cache, the requests and tokens that it takes at once; and what may go wrong."""
    table = plain_table("", "weights", "KV, GiB", "KV tokens", "longest", "at once", "tokens a step")
    for engine, results in compared.results.items():
        deployment, budget = results.scenario.deployment, document["budgets"][engine]
        table.add_row(
            engine,
            deployment.weight_format.name,
            f"{budget['kv_cache'] / GIB:.2f}",
            f"{memory_request(deployment.config).tokens_held(deployment.budget):,}",
            f"{deployment.scheduler.max_model_len:,}",
            f"{deployment.scheduler.max_num_seqs:,}",
            f"{deployment.scheduler.max_num_batched_tokens:,}",
        )
    warnings = [
        Text(f"{engine}: warning: {warning}", "yellow")
        for engine, results in compared.results.items()
        for warning in results.scenario.deployment.budget.warnings
    ]
    return Group(Text("Memory and limits", "bold"), table, *warnings)


def _step_times(compared: EngineComparison) -> RenderableType:
    """Say for each engine what its step times rest on, and what that makes of its figures."""
    lines: list[RenderableType] = [Text("How well step times are known", "bold")]
    for engine, results in compared.results.items():
        first, *rest = calibration_lines(results.document())
        style = "dim" if results.scenario.deployment.calibration.status == "validated" else "yellow"
        lines.append(Padding(Text(f"{engine}: {first[0].lower()}{first[1:]}", style), (0, 0, 0, 2)))
        lines += [Padding(Text(line), (0, 0, 0, 4)) for line in rest]
    return Group(*lines)


def _columns(document: dict[str, Any], width: int) -> RenderableType:
    columns = document["results"]
    alone = [sum(other["engine"] == column["engine"] for other in columns) == 1 for column in columns]
    names = [
        column["engine"] if single else f"{column['engine']} {column['allocator'].removeprefix('contiguous-')}"
        for column, single in zip(columns, alone, strict=True)
    ]
    return side_by_side(comparison(document | {"config": {"goodput": document["config"]["goodput"]}}), names, width)


def _rules(compared: EngineComparison, document: dict[str, Any]) -> RenderableType:
    """Return why each column is what it is."""
    lines: list[RenderableType] = [Text("Why", "bold")]
    for engine, results in compared.results.items():
        rules = document["rules"][engine]
        lines.append(
            Padding(
                Text.assemble((f"{engine}: ", "bold"), f"{rules['rules']} Out of memory: {rules['at_exhaustion']}."), (0, 0, 0, 2)
            )
        )
        for allocator, result in results.by_allocator.items():
            style = STATUS_STYLE[result.verdict.status]
            of = "" if len(results.by_allocator) == 1 else f"{allocator}: "
            lines.append(Padding(Text(of + result.verdict.text, style), (0, 0, 0, 4)))
    for engine, why in compared.refused.items():
        lines.append(Padding(Text.assemble((f"{engine} does not start: ", "bold"), (why, "red")), (0, 0, 0, 2)))
    return Group(*lines)
