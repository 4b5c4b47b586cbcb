"""A model in memory: the process that serves it, who uses it, and what its loads took."""

from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.engine import Engine
from pagedkv.sims.model_serving import ModelVariant
from pagedkv.sims.recorder import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that waits for its model."""

    prompt_tokens: int
    output_tokens: int
    content: Segments | None
    user_class: int
    model: int
    arrived_s: float
    done: simpy.Event
    """What its user waits for."""


@dataclass(slots=True, kw_only=True)
class ModelLoad:
    """One load of a model, from the first byte read to the unload."""

    model: int
    context: int
    """Tokens of a slot."""
    held_bytes: int
    """What it takes of the machine, from the start on: who loads next must not count on it."""
    start_s: float
    ready_s: float | None = None
    """None: it was not, for want of memory or because the run ended."""
    end_s: float | None = None
    """When the memory was free again; None: it was there to the end."""
    why_ended: str = ""
    """`room`, `keep-alive` or `out of memory`; empty: it was there to the end."""

    def held_s(self, from_s: float, until_s: float) -> float:
        """Return for how much of that time it took its memory."""
        end_s = until_s if self.end_s is None else min(self.end_s, until_s)
        return max(end_s - max(self.start_s, from_s), 0.0)


@dataclass(slots=True, kw_only=True)
class Runner:
    """A loaded model."""

    load: ModelLoad
    name: str
    scheduler: StepScheduler
    recorder: Recorder
    engine: Engine
    keep_alive_s: float
    """How long it stays when nobody uses it; 0 once it must make room."""
    num_users: int = 0
    """Requests that run or wait in it."""
    leaves_when_idle: bool = False
    """Whether somebody waits for its memory."""
    idle_turn: int = field(default=0)
    """Counts the times that it fell idle or was used again, so that a keep-alive of before does not end it."""

    @property
    def num_waiting(self) -> int:
        """Requests that no slot is free for; negative: slots that nobody is there for."""
        slots = self.scheduler.arrays.running.size
        return self.scheduler.num_waiting + self.scheduler.num_running - slots


StartRunner = Callable[[int, ModelVariant, ModelLoad], Runner]
"""Starts the process of a model that has been read."""
