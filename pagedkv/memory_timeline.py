"""A machine's memory from before an engine starts until it serves: phase by phase, at its end and at its worst moment.

The amounts are the ledger's (`MemoryBudget`), to which come those that only pass: page cache of the weights' files, compilers, what
a loader holds, guests. The parts of every moment sum to the visible memory, and those of `serving` are the budget's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_request import MemoryRequest
from pagedkv.start_up import StartOptions, StartUp

TIMELINE_PARTS = (
    "os_reserve",
    "other_programs",
    "guests",
    "engine_overhead",
    "weights",
    "activations",
    "cuda_graphs",
    "kv_cache",
    "host_tier",
    "loading",
    "compilers",
    "page_cache",
    "unassigned",
)
"""Parts of a moment, in the order in which they are stacked. `loading` is what loading holds besides: a layer that is laid out
anew, a loader's buffer. `host_tier` is what the engine keeps of the KV cache in the processor's memory. The last two are free: page
cache is given back when somebody needs the room."""

VerdictKind = Literal["ok", "crowded", "starved", "dangerous", "out_of_memory", "refused"]
VERDICTS: tuple[VerdictKind, ...] = get_args(VerdictKind)
"""From the mildest on. `crowded`: MemFree is below the machine's floor, and only page cache that is given back in time helps.
`starved`: the KV cache may come out smaller than planned. `dangerous`: MemAvailable is below the floor, and the host may freeze.
`out_of_memory`: more is needed than there is; a host with unified memory freezes. `refused`: the engine does not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Who has the memory at one moment. Sizes are in bytes."""

    parts: Mapping[str, int]
    """By name, all of `TIMELINE_PARTS`. They sum to the visible memory; `unassigned` is negative if there is not enough."""

    @property
    def mem_free(self) -> int:
        """What nobody has: Linux's MemFree, which CUDA calls free on unified memory."""
        return self.parts["unassigned"]

    @property
    def mem_available(self) -> int:
        """What somebody could have: Linux's MemAvailable, with the page cache."""
        return self.parts["unassigned"] + self.parts["page_cache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseVerdict:
    """What becomes of a phase at its worst moment."""

    kind: VerdictKind
    text: str = ""
    """In a sentence; empty if nothing is to be said."""

    @property
    def severity(self) -> int:
        """How bad it is, from 0."""
        return VERDICTS.index(self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPhase:
    """One phase of an engine's life."""

    name: str
    """E.g. `loading`."""
    title: str
    """What a reader calls it."""
    worst: Moment
    """When the least memory is available."""
    end: Moment
    """When it is over."""
    verdict: PhaseVerdict
    seconds: float | None = None
    """How long it takes at least; None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTimeline:
    """All phases of an engine's life on a machine."""

    request: MemoryRequest
    """What was asked for."""
    options: StartOptions
    """How it was started."""
    start: StartUp
    """What the engine does when it starts."""
    budget: MemoryBudget | None
    """What it comes to; None: it is refused."""
    phases: tuple[MemoryPhase, ...]
    """In the order in which they come."""
    least_blocks: int | None
    """Blocks of the KV cache if all that passes is still there when it gets its size; None: it is refused."""
    notes: tuple[str, ...] = ()
    """What a reader should know besides."""

    @property
    def worst(self) -> MemoryPhase:
        """The phase with the worst verdict; of several, the one with the least memory available."""
        return min(self.phases, key=lambda phase: (-phase.verdict.severity, phase.worst.mem_available))

    @property
    def tightest(self) -> MemoryPhase:
        """The phase in which the least memory is available."""
        return min(self.phases, key=lambda phase: phase.worst.mem_available)

    @property
    def danger(self) -> str | None:
        """The phase in which the host may freeze, memory runs out or the engine refuses to start, in words; None: none does."""
        worst = self.worst
        safe = worst.verdict.severity < VERDICTS.index("dangerous")
        return None if safe else f"{worst.title}: {worst.verdict.text}"

    def phase(self, name: str) -> MemoryPhase | None:
        """Return the phase of this name, None if there is none."""
        return next((phase for phase in self.phases if phase.name == name), None)
