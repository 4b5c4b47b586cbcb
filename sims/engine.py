"""The serving engine as a simpy process, step by step: the only owner of the virtual clock between a step's start and its end.

`pagedkv.sims.compiled_engine` does the same for paged memory without Python between steps.
"""

from collections.abc import Generator
from typing import Any, Protocol

import simpy

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.scheduling.content import Contents, Segments
from pagedkv.scheduling.step import Step, StepScheduler
from pagedkv.sims.drafting import NOTHING_ACCEPTED, Acceptance, accept_drafts
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome
from pagedkv.sims.shared_machine import SharedMachine
from pagedkv.sims.step_time import StepCost, StepTimeModel, total_cost


class ServingEngine(Protocol):
    """What a load sends its requests to."""

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0, model: int = 0
    ) -> simpy.Event | None:
        """Queue a request; return the event of its end, or None if it is turned away: it could never run here, or nobody is up.

        The event's value is `Outcome.FAILED` if the process that served it has died. `content` is what it shares with others: see
        `Scheduler.add`. `user_class` is only recorded: which class of a workload it comes from. `model` is the one that it names,
        by its place among those of the server; an engine has one, and does not look.
        """

    def submit_all(
        self,
        arrival_s: Float64Array,
        prompt_tokens: Int64Array,
        output_tokens: Int64Array,
        *,
        contents: Contents | None = None,
        models: Int64Array | None = None,
    ) -> None:
        """Let requests arrive at these times, ascending; nobody waits for their end. `models` are as in `submit`; None: 0."""


def submit_in_time(
    env: simpy.Environment,
    engine: ServingEngine,
    arrival_s: Float64Array,
    prompt_tokens: Int64Array,
    output_tokens: Int64Array,
    contents: Contents | None,
    models: Int64Array | None = None,
) -> Generator[simpy.Event, Any, None]:
    """Submit requests to `engine`, each when it arrives: a process of `env`."""
    each = zip(arrival_s.tolist(), prompt_tokens.tolist(), output_tokens.tolist(), strict=True)
    for i, (at_s, prompt, output) in enumerate(each):
        if at_s > env.now:
            yield env.timeout(at_s - env.now)
        content = None if contents is None else contents.of(i)
        engine.submit(prompt, output, content=content, model=0 if models is None else int(models[i]))


class Engine:
    """Takes requests, runs the scheduler step after step, and lets each step last as long as the step-time model says."""

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: StepScheduler,
        step_time: StepTimeModel,
        recorder: Recorder,
        acceptance: Acceptance = NOTHING_ACCEPTED,
        machine: SharedMachine | None = None,
    ) -> None:
        """Start the process on `env`. `machine` is what it shares with others; None: it has one to itself."""
        self._env = env
        self._machine = machine
        self._step_end_s = env.now
        self._work: simpy.Event | None = None
        """Of the step in flight, or the last one, on a machine that is shared."""
        self._cost = StepCost(0.0, 0.0, 0.0)
        """Of that step."""
        self._scheduler = scheduler
        self._step_time = step_time
        self._acceptance = acceptance
        self._recorder = recorder
        self._done: dict[int, simpy.Event] = {}
        self._arrival = env.event()
        self._idle_since_s: float | None = None
        self._stopped = False
        env.process(self._serve())

    def submit(
        self,
        prompt_tokens: int,
        output_tokens: int,
        *,
        content: Segments | None = None,
        user_class: int = 0,
        model: int = 0,
        arrived_s: float | None = None,
    ) -> simpy.Event | None:
        """Queue a request; return the event of its end, or None if it is rejected because it could never run here.

        `content` is what it shares with others: see `Scheduler.add`. `user_class` is only recorded. `arrived_s` is when it came,
        if it has waited elsewhere; None: now.
        """
        del model
        came_s = self._env.now if arrived_s is None else arrived_s
        request = self._scheduler.add(prompt_tokens=prompt_tokens, output_tokens=output_tokens, content=content)
        if request is None:
            self._recorder.rejection(prompt_tokens, output_tokens, came_s, user_class)
            return None
        self._recorder.arrival(request, came_s, user_class)
        done = self._done[request] = self._env.event()
        if not self._arrival.triggered:
            self._arrival.succeed()
        return done

    def submit_all(
        self,
        arrival_s: Float64Array,
        prompt_tokens: Int64Array,
        output_tokens: Int64Array,
        *,
        contents: Contents | None = None,
        models: Int64Array | None = None,
    ) -> None:
        """Let requests arrive at these times, ascending; nobody waits for their end. Call it once, before anything has arrived."""
        del models
        self._env.process(submit_in_time(self._env, self, arrival_s, prompt_tokens, output_tokens, contents))

    def close(self) -> None:
        """Account for time that is not recorded when the run ends: with nothing to do, or in a step that others slow down."""
        if self._idle_since_s is not None:
            self._recorder.idle(self._idle_since_s, self._env.now)
        else:
            self._slowed()

    def stop(self) -> None:
        """End now, as a process does that is killed: what runs comes to nothing, and whoever waits is told `Outcome.FAILED`."""
        self.close()
        self._stopped = True
        for done in self._done.values():
            done.succeed(Outcome.FAILED)

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        env, scheduler, recorder = self._env, self._scheduler, self._recorder
        while True:
            if scheduler.num_running == scheduler.num_waiting == 0:
                self._idle_since_s, self._arrival = env.now, env.event()
                yield self._arrival
                if self._stopped:
                    return
                recorder.idle(self._idle_since_s, env.now)
                self._idle_since_s = None
            step = scheduler.schedule()
            failed = scheduler.failed.tolist()
            for request in failed:
                self._finish(request, failed=True)
            if step.num_entries == 0:
                if not failed and scheduler.num_waiting:  # nothing runs and the head does not fit: waiting longer cannot help it
                    self._finish(scheduler.drop_head(), failed=True)
                continue
            step_s = self._launch(step)
            self._step_end_s = env.now + step_s
            if self._machine is None:
                yield env.timeout(step_s)
            else:
                self._work = self._machine.work(step_s)
                yield self._work
            if self._stopped:
                return
            self._slowed()
            accept_drafts(self._acceptance, step.batch, step.num_entries)
            scheduler.complete()
            recorder.tokens(env.now)
            for request in scheduler.finished:
                self._finish(int(request), failed=False)

    def _slowed(self) -> None:
        """Record what others did to the step in flight, up to now."""
        self._recorder.linger(self._step_end_s, self._env.now)
        if self._machine is not None and self._work is not None:
            self._recorder.worked(self._step_end_s, self._cost, self._machine.measured_s(self._work))

    def _launch(self, step: Step) -> float:
        """Record that `step` begins; return how long it takes."""
        recorder = self._recorder
        recorder.look_elsewhere()
        cost = total_cost(self._step_time.cost(batch, batch.size) for batch in self._scheduler.forward_passes())
        if (moved := self._scheduler.moved_blocks) != (0, 0):
            cost = self._step_time.beside_copies(cost, *moved)
        recorder.step(step, self._env.now, cost)
        self._cost = cost
        return cost.total_s

    def _finish(self, request: int, *, failed: bool) -> None:
        if failed:
            self._recorder.failure(request)
        self._done.pop(request).succeed()
