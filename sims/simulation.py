"""Runs a scenario: one allocator at a time, every one of them with the same requests."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.clock import Clock
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.drafting import NOTHING_ACCEPTED, Acceptance
from pagedkv.sims.engine import Engine
from pagedkv.sims.fleet import Fleet, Replica, ServingProcess, StartProcess
from pagedkv.sims.fleet_record import fleet_record
from pagedkv.sims.model_record import model_record
from pagedkv.sims.model_runner import ModelLoad, Runner
from pagedkv.sims.model_server import ModelServer
from pagedkv.sims.model_serving import ModelServing, ModelVariant
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import RequestLog
from pagedkv.sims.routing import ROUTING
from pagedkv.sims.run_record import RunRecord
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.shared_machine import SharedMachine
from pagedkv.sims.step_time import RooflineStepTime, StepTimeModel
from pagedkv.sims.workload import class_names
from pagedkv.step_allocation import RowMemory

Progress = Callable[[str, int, float], None]
"""Told (allocator, repeat, share of its simulated time that has passed)."""

_SLICES = 200
_EVENTS_BETWEEN_REPORTS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Somebody who looks at a run while it goes on."""

    times_s: Sequence[float]
    """When, ascending: events on the virtual clock, so that a load which ends runs at least until the last of them."""
    see: Callable[[float, StepScheduler], None]
    """Told the time, and shown the scheduler, a step of which may be in flight."""

    def beside(self, other: "Watch") -> "Watch":
        """Return one who looks for both, each at its times."""
        whose = sorted([(at_s, 0) for at_s in self.times_s] + [(at_s, 1) for at_s in other.times_s])
        turns = iter(whose)

        def see(now_s: float, scheduler: StepScheduler) -> None:
            (self, other)[next(turns)[1]].see(now_s, scheduler)

        return Watch(times_s=[at_s for at_s, _ in whose], see=see)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One allocator's run with one seed."""

    allocator: RowMemory
    """In its final state; of several replicas, the first one's."""
    recorder: RunRecord
    """What was measured, over all replicas."""
    log: RequestLog
    """What happened to each request, the warm-up's included."""
    end_s: float
    """When the virtual clock stopped."""
    warmup_s: float
    """When measuring began."""
    drained: bool
    """Whether it ended because every request was answered, and not at a given time."""
    replicas: tuple[Replica, ...] = ()
    """Each replica by itself, if there are several, or faults."""
    class_names: tuple[str, ...] = ()
    """What the log's `user_class` counts, if the load is a workload."""
    server: ModelServer | None = None
    """What loaded several models, if they come and go."""

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
    watch: Watch | None = None,
) -> Run:
    """Simulate one allocator and return what happened. `progress` is told the share of simulated time that has passed.

    Over memory of a compiled kind there is a compiled loop; `step_by_step` does without it, and comes to the same. `watch` looks
    on, which changes nothing; of several replicas, or models, it sees the first.
    """
    env = Clock(initial_time=0.0)
    end_s = math.inf if scenario.duration_s is None else scenario.warmup_s + scenario.duration_s
    drafting = scenario.deployment.drafting
    acceptance = NOTHING_ACCEPTED if drafting is None else Acceptance.of(drafting, seed)

    def start(until_s: float) -> ServingProcess:
        scheduler = scenario.deployment.scheduler_over(allocator_name)
        recorder = Recorder(scheduler, warmup_s=scenario.warmup_s, end_s=until_s)
        engine = _engine(env, scheduler, scenario.deployment.step_time, recorder, acceptance, step_by_step=step_by_step)
        return ServingProcess(scheduler=scheduler, recorder=recorder, engine=engine)

    if scenario.model_serving is not None:
        return _run_models(scenario, scenario.model_serving, env, allocator_name, end_s, seed, progress, watch)
    if scenario.replication.is_fleet:
        return _run_fleet(scenario, env, start, end_s, seed, progress, watch)
    process = start(end_s)
    if watch is not None:
        env.process(_looks(env, watch, lambda: process.scheduler))
    scenario.load.start(env, process.engine, seed=seed)
    _let_time_pass(scenario, env, process.recorder, end_s, progress)
    process.engine.close()
    process.recorder.close(env.now)
    return Run(
        allocator=process.scheduler.allocator,
        recorder=process.recorder,
        log=process.recorder.log(),
        end_s=env.now,
        warmup_s=scenario.warmup_s,
        drained=math.isinf(end_s),
        class_names=class_names(scenario.load),
    )


def _run_fleet(
    scenario: Scenario,
    env: Clock,
    start: StartProcess,
    end_s: float,
    seed: int,
    progress: Callable[[float], None] | None,
    watch: Watch | None,
) -> Run:
    asked = scenario.replication
    routing = ROUTING.load(asked.routing)(asked.num_replicas)
    fleet = Fleet(env, start, routing, asked.faults, num_replicas=asked.num_replicas, end_s=end_s)
    if watch is not None:
        env.process(_looks(env, watch, lambda: fleet.replicas[0].now.scheduler))
    scenario.load.start(env, fleet, seed=seed)
    _let_time_pass(scenario, env, fleet, end_s, progress)
    fleet.close()
    return Run(
        allocator=fleet.replicas[0].now.scheduler.allocator,
        recorder=fleet_record(fleet.recorders, warmup_s=scenario.warmup_s, end_s=env.now),
        log=fleet.log(),
        end_s=env.now,
        warmup_s=scenario.warmup_s,
        drained=math.isinf(end_s),
        replicas=tuple(fleet.replicas),
        class_names=class_names(scenario.load),
    )


def _run_models(
    scenario: Scenario,
    serving: ModelServing,
    env: Clock,
    allocator_name: str,
    end_s: float,
    seed: int,
    progress: Callable[[float], None] | None,
    watch: Watch | None,
) -> Run:
    machine = SharedMachine(env, from_s=scenario.warmup_s)

    def start(model: int, variant: ModelVariant, load: ModelLoad) -> Runner:
        assert variant.deployment is not None  # it has been read, so it fits
        scheduler = variant.deployment.scheduler_over(allocator_name)
        recorder = Recorder(scheduler, warmup_s=scenario.warmup_s, end_s=end_s)
        engine = Engine(env, scheduler, variant.deployment.step_time, recorder, machine=machine)
        served = serving.models[model]
        return Runner(
            load=load, name=served.name, scheduler=scheduler, recorder=recorder, engine=engine, keep_alive_s=served.keep_alive_s
        )

    server, first = ModelServer(env, serving, start), scenario.deployment.scheduler_over(allocator_name)
    if watch is not None:
        env.process(_looks(env, watch, lambda: server.scheduler_of(0) or first))
    scenario.load.start(env, server, seed=seed)
    _let_time_pass(scenario, env, server, end_s, progress)
    server.close()
    return Run(
        allocator=first.allocator,
        recorder=model_record(server, first, warmup_s=scenario.warmup_s, end_s=env.now),
        log=server.log(),
        end_s=env.now,
        warmup_s=scenario.warmup_s,
        drained=math.isinf(end_s),
        class_names=class_names(scenario.load),
        server=server,
    )


def _looks(env: Clock, watch: Watch, scheduler: Callable[[], StepScheduler]) -> Generator[simpy.Event, Any, None]:
    for at_s in watch.times_s:
        yield env.timeout(at_s - env.now)
        watch.see(env.now, scheduler())


def _engine(
    env: Clock,
    scheduler: StepScheduler,
    step_time: StepTimeModel,
    recorder: Recorder,
    acceptance: Acceptance,
    *,
    step_by_step: bool,
) -> Engine | CompiledEngine:
    compiled = isinstance(scheduler, BatchScheduler) and scheduler.compiled is not None and not step_by_step
    if isinstance(scheduler, BatchScheduler) and compiled and isinstance(step_time, RooflineStepTime):
        return CompiledEngine(env, scheduler, step_time, recorder, acceptance)
    return Engine(env, scheduler, step_time, recorder, acceptance)


def _let_time_pass(
    scenario: Scenario, env: Clock, served: Recorder | Fleet | ModelServer, end_s: float, progress: Callable[[float], None] | None
) -> None:
    """Run until `end_s`, or until every request is answered."""
    if scenario.duration_s is None:
        _drain(env, served, scenario.load.num_requests or 1, progress)
        return
    if progress is not None:
        progress(0.0)
    for i in range(1, _SLICES + 1):
        env.run(until=end_s * i / _SLICES)
        if progress is not None:
            progress(i / _SLICES)


def _drain(env: Clock, served: Recorder | Fleet | ModelServer, num_requests: int, progress: Callable[[float], None] | None) -> None:
    """Run until the last request is answered: then no event is left but faults, or ends of keep-alives, that are to come."""
    events = 0
    if progress is not None:
        progress(0.0)
    while env.num_events > (0 if isinstance(served, Recorder) else served.num_timers):
        env.step()
        events += 1
        if progress is not None and events % _EVENTS_BETWEEN_REPORTS == 0:
            progress(min(served.num_completed / num_requests, 1.0))
    if progress is not None:
        progress(1.0)
