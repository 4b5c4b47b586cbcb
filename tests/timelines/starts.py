"""Timelines of a start, asked for by the settings of an engine."""

from typing import Any

from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import MemoryPhase, MemoryTimeline
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import memory_request
from pagedkv.start_timeline import memory_timeline
from pagedkv.start_up import StartOptions

WARM = StartOptions(warm_compile_caches=True)


def request(**serving: Any) -> MemoryRequest:
    return memory_request(ServingConfig(**serving))


def timeline(options: StartOptions = StartOptions(), **serving: Any) -> MemoryTimeline:  # noqa: B008
    return memory_timeline(request(**serving), options)


def phase(of: MemoryTimeline, name: str) -> MemoryPhase:
    found = of.phase(name)
    assert found is not None, name
    return found


def kinds(of: MemoryTimeline) -> dict[str, str]:
    return {phase.name: phase.verdict.kind for phase in of.phases}
