"""Runs a scenario: one allocator at a time, every one of them with the same requests."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import simpy

from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.clock import Clock
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.drafting import NOTHING_ACCEPTED, Acceptance
from pagedkv.sims.engine import Engine
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import RequestLog
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.step_time import RooflineStepTime, StepTimeModel
from pagedkv.step_allocation import RowMemory

Progress = Callable[[str, int, float], None]
"""Told (allocator, repeat, share of its simulated time that has passed)."""

_SLICES = 50
_EVENTS_BETWEEN_REPORTS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One allocator's run with one seed."""

    allocator: RowMemory
    """In its final state."""
    recorder: Recorder
    """What was measured."""
    log: RequestLog
    """What happened to each request, the warm-up's included."""
    end_s: float
    """When the virtual clock stopped."""
    warmup_s: float
    """When measuring began."""
    drained: bool
    """Whether it ended because every request was answered, and not at a given time."""

    @property
    def measured(self) -> RequestLog:
        """The requests that count: those that arrived after the warm-up."""
        return self.log.where(self.log.arrival_s >= self.warmup_s)


def run(
    scenario: Scenario,
    allocator_name: str,
    *,
    seed: int,
    progress: Callable[[float], None] | None = None,
    step_by_step: bool = False,
) -> Run:
    """Simulate one allocator and return what happened. `progress` is told the share of simulated time that has passed.

    Paged memory has a compiled loop; `step_by_step` does without it, and comes to the same.
    """
    env = Clock(initial_time=0.0)
    scheduler = scenario.deployment.scheduler_over(allocator_name)
    end_s = math.inf if scenario.duration_s is None else scenario.warmup_s + scenario.duration_s
    recorder = Recorder(scheduler, warmup_s=scenario.warmup_s, end_s=end_s)
    drafting = scenario.deployment.drafting
    acceptance = NOTHING_ACCEPTED if drafting is None else Acceptance.of(drafting, seed)
    engine = _engine(env, scheduler, scenario.deployment.step_time, recorder, acceptance, step_by_step=step_by_step)
    scenario.load.start(env, engine, seed=seed)
    if scenario.duration_s is None:
        _drain(env, recorder, scenario.load.num_requests or 1, progress)
    else:
        for i in range(1, _SLICES + 1):
            env.run(until=end_s * i / _SLICES)
            if progress is not None:
                progress(i / _SLICES)
    engine.close()
    recorder.close(env.now)
    return Run(
        allocator=scheduler.allocator,
        recorder=recorder,
        log=recorder.log(),
        end_s=env.now,
        warmup_s=scenario.warmup_s,
        drained=math.isinf(end_s),
    )


def _engine(
    env: Clock,
    scheduler: StepScheduler,
    step_time: StepTimeModel,
    recorder: Recorder,
    acceptance: Acceptance,
    *,
    step_by_step: bool,
) -> Engine | CompiledEngine:
    compiled = isinstance(scheduler, Scheduler) and isinstance(scheduler.allocator, PagedStepAllocator) and not step_by_step
    if isinstance(scheduler, Scheduler) and compiled and isinstance(step_time, RooflineStepTime):
        return CompiledEngine(env, scheduler, step_time, recorder, acceptance)
    return Engine(env, scheduler, step_time, recorder, acceptance)


def _drain(env: simpy.Environment, recorder: Recorder, num_requests: int, progress: Callable[[float], None] | None) -> None:
    """Run until the last request is answered: then no event is left."""
    events = 0
    while env.peek() < math.inf:
        env.step()
        events += 1
        if progress is not None and events % _EVENTS_BETWEEN_REPORTS == 0:
            progress(min(recorder.num_completed / num_requests, 1.0))
    if progress is not None:
        progress(1.0)
