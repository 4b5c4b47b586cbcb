"""The serving engine as a simpy process, step by step: the only owner of the virtual clock between a step's start and its end.

`pagedkv.sims.compiled_engine` does the same for paged memory without Python between steps.
"""

from collections.abc import Generator
from typing import Any, Protocol

import simpy

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.scheduling.content import Contents, Segments
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.drafting import NOTHING_ACCEPTED, Acceptance, accept_drafts
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome
from pagedkv.sims.step_time import StepTimeModel, total_cost


class ServingEngine(Protocol):
    """What a load sends its requests to."""

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0
    ) -> simpy.Event | None:
        """Queue a request; return the event of its end, or None if it is turned away: it could never run here, or nobody is up.

        The event's value is `Outcome.FAILED` if the process that served it has died. `content` is what it shares with others: see
        `Scheduler.add`. `user_class` is only recorded: which class of a workload it comes from.
        """

    def submit_all(
        self, arrival_s: Float64Array, prompt_tokens: Int64Array, output_tokens: Int64Array, *, contents: Contents | None = None
    ) -> None:
        """Let requests arrive at these times, ascending; nobody waits for their end."""


def submit_in_time(
    env: simpy.Environment,
    engine: ServingEngine,
    arrival_s: Float64Array,
    prompt_tokens: Int64Array,
    output_tokens: Int64Array,
    contents: Contents | None,
) -> Generator[simpy.Event, Any, None]:
    """Submit requests to `engine`, each when it arrives: a process of `env`."""
    each = zip(arrival_s.tolist(), prompt_tokens.tolist(), output_tokens.tolist(), strict=True)
    for i, (at_s, prompt, output) in enumerate(each):
        if at_s > env.now:
            yield env.timeout(at_s - env.now)
        engine.submit(prompt, output, content=None if contents is None else contents.of(i))


class Engine:
    """Takes requests, runs the scheduler step after step, and lets each step last as long as the step-time model says."""

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: StepScheduler,
        step_time: StepTimeModel,
        recorder: Recorder,
        acceptance: Acceptance = NOTHING_ACCEPTED,
    ) -> None:
        self._env = env
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
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0
    ) -> simpy.Event | None:
        """Queue a request; return the event of its end, or None if it is rejected because it could never run here.

        `content` is what it shares with others: see `Scheduler.add`. `user_class` is only recorded.
        """
        request = self._scheduler.add(prompt_tokens=prompt_tokens, output_tokens=output_tokens, content=content)
        if request is None:
            self._recorder.rejection(prompt_tokens, output_tokens, self._env.now, user_class)
            return None
        self._recorder.arrival(request, self._env.now, user_class)
        done = self._done[request] = self._env.event()
        if not self._arrival.triggered:
            self._arrival.succeed()
        return done

    def submit_all(
        self, arrival_s: Float64Array, prompt_tokens: Int64Array, output_tokens: Int64Array, *, contents: Contents | None = None
    ) -> None:
        """Let requests arrive at these times, ascending; nobody waits for their end. Call it once, before anything has arrived."""
        self._env.process(submit_in_time(self._env, self, arrival_s, prompt_tokens, output_tokens, contents))

    def close(self) -> None:
        """Account for the time since the last step, if the engine has nothing to do when the run ends."""
        if self._idle_since_s is not None:
            self._recorder.idle(self._idle_since_s, self._env.now)

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
            cost = total_cost(self._step_time.cost(batch, batch.size) for batch in scheduler.forward_passes())
            recorder.look_elsewhere()
            recorder.step(step, env.now, cost)
            yield env.timeout(cost.total_s)
            if self._stopped:
                return
            accept_drafts(self._acceptance, step.batch, step.num_entries)
            scheduler.complete()
            recorder.tokens(env.now)
            for request in scheduler.finished:
                self._finish(int(request), failed=False)

    def _finish(self, request: int, *, failed: bool) -> None:
        if failed:
            self._recorder.failure(request)
        self._done.pop(request).succeed()
