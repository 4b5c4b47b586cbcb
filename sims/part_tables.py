"""How the parts of a load, or of a fleet, fared: tables by class of users, by model, by replica, for every view."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pagedkv.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTable:
    """One table of one allocator."""

    title: str
    head: tuple[str, ...]
    """Of the columns; the first has the names."""
    rows: tuple[tuple[str, ...], ...]


def class_tables(document: dict[str, Any]) -> Iterator[PartTable]:
    """Yield a table per entry of `results` that has several classes of users."""
    goals = bool(document["config"]["goodput"])
    head = ("", "requests", "TTFT, ms", "TPOT, ms", "E2E, s", "hit rate", *(["in goals"] if goals else []))
    for result in document["results"]:
        if rows := result.get("classes"):
            cells = tuple((row["name"], *_class(row), *([_share(row["goodput_share"])] if goals else [])) for row in rows)
            yield PartTable(title=f"By class of users, {result['allocator']} (P50 and P99)", head=head, rows=cells)


def _class(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['num_injected']:,}"
    for latency, parts, scale in (("ttft_s", ("p50", "p99"), 1e3), ("tpot_s", ("p50", "p99"), 1e3), ("e2e_s", ("p50", "p99"), 1.0)):
        yield "  ".join(_number(row[latency], part, scale) for part in parts)
    yield _share(row["prefix_hit_rate"])


def model_tables(document: dict[str, Any]) -> Iterator[PartTable]:
    """Yield a table per entry of `results` in which models come and go."""
    head = ("", "requests", "TTFT, s", "E2E, s", "loads", "failed", "load, s", "there", "GiB")
    for result in document["results"]:
        if rows := result.get("models"):
            title = f"By model, {result['allocator']} (TTFT P50 and P99, E2E P50; loads over the whole run)"
            yield PartTable(title=title, head=head, rows=tuple((row["model"], *_model(row)) for row in rows))


def _model(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['num_injected']:,}"
    yield "–" if row["ttft_s"] is None else f"{row['ttft_s']['p50']:,.1f} {row['ttft_s']['p99']:,.1f}"
    yield "–" if row["e2e_s"] is None else f"{row['e2e_s']['p50']:,.1f}"
    yield f"{row['num_loads']:,}"
    yield f"{row['num_failed_loads']:,}"
    yield f"{row['load_s'] / row['num_loads']:,.1f}" if row["num_loads"] else "–"
    yield "–" if row["loaded_share"] is None else f"{100 * row['loaded_share']:.0f} %"
    yield "–" if row["held_bytes"] is None else f"{row['held_bytes'] / GIB:.1f}"


def replica_tables(document: dict[str, Any]) -> Iterator[PartTable]:
    """Yield a table per entry of `results` with several replicas, or faults."""
    head = ("replica", "finished", "failed", "output tokens/s", "tokens in KV", "hit rate", "time up, s")
    for result in document["results"]:
        if rows := result.get("replicas"):
            cells = tuple(
                (
                    f"{row['replica']}",
                    f"{row['num_finished']:,}",
                    f"{row['num_failed']:,}",
                    "–" if row["output_tokens_per_s"] is None else f"{row['output_tokens_per_s']:,.0f}",
                    _share(row["kv"] and row["kv"]["tokens"]),
                    _share(row["prefix_hit_rate"]),
                    f"{row['up_s']:,.0f}",
                )
                for row in rows
            )
            yield PartTable(title=f"By replica, {result['allocator']}", head=head, rows=cells)


def _number(latency: dict[str, float] | None, part: str, scale: float) -> str:
    return "–" if latency is None else format(scale * latency[part], ",.0f" if scale > 1 else ",.1f")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
