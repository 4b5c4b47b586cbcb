"""What each of several models takes of the machine, in the terminal."""

import math

from rich.console import Group, RenderableType
from rich.text import Text

from pagedkv.sims.console_table import plain_table
from pagedkv.sims.model_serving import HEADROOM, ModelServing
from pagedkv.units import GIB, gib


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
