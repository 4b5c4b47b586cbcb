"""How each class of users of a workload fared, in the terminal: one small table per allocator."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pagedkv.sims.console_table import plain_table

_COLUMNS = ("requests", "TTFT, ms", "TPOT, ms", "E2E, s", "hit rate")


def class_tables(document: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield a table per entry of `results` that has several classes."""
    goals = bool(document["config"]["goodput"])
    for result in document["results"]:
        if rows := result.get("classes"):
            table = plain_table("", *_COLUMNS, *(["in goals"] if goals else []))
            for row in rows:
                table.add_row(row["name"], *_cells(row), *([_share(row["goodput_share"])] if goals else []))
            yield Group(Text(f"By class of users, {result['allocator']} (P50 and P99)", "bold"), table)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['num_injected']:,}"
    for latency, parts, scale in (("ttft_s", ("p50", "p99"), 1e3), ("tpot_s", ("p50", "p99"), 1e3), ("e2e_s", ("p50", "p99"), 1.0)):
        yield "  ".join(_number(row[latency], part, scale) for part in parts)
    yield _share(row["prefix_hit_rate"])


def _number(latency: dict[str, float] | None, part: str, scale: float) -> str:
    return "–" if latency is None else format(scale * latency[part], ",.0f" if scale > 1 else ",.1f")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
