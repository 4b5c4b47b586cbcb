"""What becomes of a phase at its worst moment, in words."""

from collections.abc import Mapping
from dataclasses import dataclass

from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import Moment, PhaseVerdict
from pagedkv.units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Starvation:
    """What the KV cache may lose to what passes while it gets its size."""

    budget: MemoryBudget
    """What it should come to."""
    least_blocks: int
    """What it comes to if all of `missing` is there then."""
    missing: Mapping[str, int]
    """Bytes that may be missing then, by what has them."""


def phase_verdict(request: MemoryRequest, name: str, worst: Moment, *, starvation: Starvation | None = None) -> PhaseVerdict:
    """Return the verdict of the phase `name`: the worst that can be said of it."""
    hardware, available, floor = request.hardware, worst.mem_available, int(request.hardware.memory_floor.value)
    beside = "" if name == "guest" else _beside(worst)  # it is in the title
    if available < 0:
        then = "the host freezes" if hardware.unified else "out of memory"
        return PhaseVerdict(kind="out_of_memory", text=f"{gib(-available)} are missing{beside}: {then}")
    if available < floor:
        text = f"MemAvailable falls to {gib(available)}{beside}, below the floor of {gib(floor)}: the host may freeze"
        return PhaseVerdict(kind="dangerous", text=text)
    if starvation is not None and starvation.least_blocks < starvation.budget.num_blocks:
        return PhaseVerdict(kind="starved", text=_starved(request, starvation))
    if name == "loading" and worst.mem_free < floor:
        text = (
            f"MemFree falls to {gib(worst.mem_free)} beside {gib(worst.parts['page_cache'])} of page cache: loads have failed or "
            "hung where Linux did not give it back in time"
        )
        return PhaseVerdict(kind="crowded", text=text)
    return PhaseVerdict(kind="ok")


def _beside(worst: Moment) -> str:
    """Return who passes by at that moment and makes it worse."""
    passing = {"compilers": "compilers", "guests": "others who come", "loading": "the loader"}
    found = [f"{gib(worst.parts[part])} of {name}" for part, name in passing.items() if worst.parts[part]]
    return f" beside {' and '.join(found)}" if found else ""


def _starved(request: MemoryRequest, starvation: Starvation) -> str:
    budget, least = starvation.budget, starvation.least_blocks
    causes = " and ".join(f"{name} ({gib(size)})" for name, size in starvation.missing.items())
    text = (
        f"as little as {gib(least * budget.block_bytes)} of KV cache instead of {gib(budget.num_blocks * budget.block_bytes)}, "
        f"{least:,} of {budget.num_blocks:,} blocks, with {causes} still there when its size is fixed"
    )
    return text + (": too few for one request, and the start fails" if least < request.blocks_for_one_request else "")
