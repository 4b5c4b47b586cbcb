"""How each of several models fared, and what it took of the machine, in the terminal."""

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pagedkv.sims.console_table import plain_table
from pagedkv.sims.model_serving import HEADROOM, ModelServing
from pagedkv.units import GIB, gib


def model_tables(document: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield a table per entry of `results` in which models come and go."""
    for result in document["results"]:
        if rows := result.get("models"):
            table = plain_table("", "requests", "TTFT, s", "E2E, s", "loads", "failed", "load, s", "there", "GiB")
            for row in rows:
                table.add_row(row["model"], *_cells(row))
            yield Group(
                Text(f"By model, {result['allocator']} (TTFT P50 and P99, E2E P50; loads over the whole run)", "bold"), table
            )


def models_memory(serving: ModelServing) -> RenderableType:
    """Return what each model takes when it is loaded, and what there is for all of them."""
    table = plain_table("", "file, GiB", "load, s", "context", "takes, GiB", "expected", "stays, s")
    for model in serving.models:
        variant = next(variant for variant in model.variants if variant.deployment is not None)
        table.add_row(
            model.name,
            f"{model.file_bytes / GIB:.2f}",
            f"{model.load_s:,.1f}",
            f"{variant.context:,}",
            f"{variant.held_bytes / GIB:.2f}",
            f"{variant.estimate_bytes / GIB:.2f}",
            "for good" if math.isinf(model.keep_alive_s) else f"{model.keep_alive_s:,.0f}",
        )
    return Group(
        Text("Memory", "bold"),
        table,
        Text(
            f"{gib(serving.memory_bytes)} are there for all of them, {serving.max_loaded_models} at once at most. One more is "
            f"loaded beside others if what Ollama expects of it is at most {HEADROOM:.0%} of what they leave; else one is unloaded."
        ),
    )


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['num_injected']:,}"
    yield "–" if row["ttft_s"] is None else f"{row['ttft_s']['p50']:,.1f} {row['ttft_s']['p99']:,.1f}"
    yield "–" if row["e2e_s"] is None else f"{row['e2e_s']['p50']:,.1f}"
    yield f"{row['num_loads']:,}"
    yield f"{row['num_failed_loads']:,}"
    yield f"{row['load_s'] / row['num_loads']:,.1f}" if row["num_loads"] else "–"
    yield "–" if row["loaded_share"] is None else f"{100 * row['loaded_share']:.0f} %"
    yield "–" if row["held_bytes"] is None else f"{row['held_bytes'] / GIB:.1f}"
