"""The serving engine over memory of a compiled kind: simpy carries users and arrivals, a compiled loop all that is between.

It decides, records and times exactly as `pagedkv.sims.engine.Engine` does: a law in the tests. Several on one clock do, too: a step
in flight is an event, so that none of them runs beyond the end of another's step, or beyond an arrival that reads their loads.
"""

from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.jit import fixed_types
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.content import Contents, Segments
from pagedkv.sims.clock import Clock
from pagedkv.sims.drafting import NOTHING_ACCEPTED, Acceptance
from pagedkv.sims.engine import submit_in_time
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome
from pagedkv.sims.run_steps import (
    IDLE,
    IN_FLIGHT,
    NEXT_ARRIVAL,
    NOW,
    NUM_FAILED,
    NUM_FINISHED,
    NUM_KNOWN,
    NUM_PROGRESS,
    PAUSED,
    STEP_S,
    LoopArrays,
    run_steps,
)
from pagedkv.sims.step_time import RooflineStepTime


class CompiledEngine:
    """Takes requests and runs steps over `scheduler`, whose memory must be of a compiled kind."""

    steps_at_once = 200_000
    """Steps without a word of how far things are."""

    def __init__(
        self,
        env: Clock,
        scheduler: BatchScheduler,
        step_time: RooflineStepTime,
        recorder: Recorder,
        acceptance: Acceptance = NOTHING_ACCEPTED,
    ) -> None:
        assert scheduler.compiled is not None
        self._env, self._scheduler, self._recorder = env, scheduler, recorder
        self._compiled, self._coefficients, self._acceptance = scheduler.compiled, step_time.coefficients, acceptance
        self._done: dict[int, simpy.Event] = {}
        self._arrival = env.event()
        self._idle_since_s: float | None = None
        self._stopped = False
        self._progress = np.zeros(NUM_PROGRESS, np.int64)
        self._clock = np.zeros(2)
        self._run_steps = fixed_types(run_steps)  # in one engine they are
        env.process(self._serve())

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0, model: int = 0
    ) -> simpy.Event | None:
        """Queue a request; return the event of its end, or None if it is rejected because it could never run here.

        `content` is what it shares with others: see `Scheduler.add`. `user_class` is only recorded.
        """
        del model
        if self._progress[NEXT_ARRIVAL] < self._progress[NUM_KNOWN]:
            raise ConfigError("requests of the future are known already: submit them all at once, or each when it arrives")
        request = self._scheduler.add(prompt_tokens=prompt_tokens, output_tokens=output_tokens, content=content)
        if request is None:
            self._recorder.rejection(prompt_tokens, output_tokens, self._env.now, user_class)
            return None
        self._recorder.arrival(request, self._env.now, user_class)
        self._progress[NEXT_ARRIVAL] = self._progress[NUM_KNOWN] = request + 1
        done = self._done[request] = self._env.event()
        self._wake()
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
        if not self._scheduler.takes_future_requests:
            self._env.process(submit_in_time(self._env, self, arrival_s, prompt_tokens, output_tokens, contents))
            return
        first = self._scheduler.requests.size
        accepted = self._scheduler.add_all(prompt_tokens, output_tokens, contents=contents)
        self._recorder.expect(first, arrival_s[accepted])
        for i in np.flatnonzero(~accepted):
            self._recorder.rejection(int(prompt_tokens[i]), int(output_tokens[i]), float(arrival_s[i]))
        self._progress[NUM_KNOWN] = self._scheduler.requests.size
        if arrival_s.size and not accepted[-1]:
            self._env.timeout(float(arrival_s[-1]) - self._env.now)  # time goes on until the last one has been refused
        self._wake()

    def close(self) -> None:
        """Account for the time since the last step, if the engine has nothing to do when the run ends."""
        if self._idle_since_s is not None:
            self._recorder.idle(self._idle_since_s, self._env.now)
        known = self._recorder.arrays.times["arrival_s"][: self._progress[NUM_KNOWN]]
        self._recorder.arrived(int(np.searchsorted(known, self._env.now, side="right")))

    def stop(self) -> None:
        """End now, as a process does that is killed: what runs comes to nothing, and whoever waits is told `Outcome.FAILED`."""
        self.close()
        self._stopped = True
        for done in self._done.values():
            done.succeed(Outcome.FAILED)

    def _wake(self) -> None:
        if not self._arrival.triggered:
            self._arrival.succeed()

    def _loop(self) -> LoopArrays:
        scheduler = self._scheduler
        return LoopArrays(
            self._compiled.engine,
            scheduler.arrays,
            scheduler.requests.arrays,
            self._compiled.memory.arrays,
            scheduler.requests.segments,
            *scheduler.step_arrays,
            self._acceptance,
            self._recorder.arrays,
            self._progress,
            self._clock,
        )

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        env, progress, clock = self._env, self._progress, self._clock
        while not self._stopped:
            clock[NOW] = env.now
            self._recorder.look_elsewhere()
            reason = self._run_steps(
                self._loop(),
                self._compiled.memory.rules,
                self._coefficients,
                float(env.peek()),
                self._recorder.needs_extent,
                self._acceptance is not NOTHING_ACCEPTED,
                bool(self._done),
                self.steps_at_once,
            )
            env.advance(float(clock[NOW]))
            if reason == IDLE:
                self._idle_since_s, self._arrival = env.now, env.event()
                following = self._recorder.arrays.times["arrival_s"][progress[NEXT_ARRIVAL] : progress[NUM_KNOWN]]
                yield self._arrival if not following.size else self._arrival | env.timeout(float(following[0]) - env.now)
                if self._stopped:
                    return
                self._recorder.idle(self._idle_since_s, env.now)
                self._idle_since_s = None
            elif reason == PAUSED:
                self._recorder.arrived(int(progress[NEXT_ARRIVAL]))
                yield env.timeout(0.0)
            else:
                self._end_all()
                if reason == IN_FLIGHT:
                    yield env.timeout(float(clock[STEP_S]))

    def _end_all(self) -> None:
        """Tell whoever waits for requests that have ended since the loop began, done or given up."""
        arrays, progress = self._scheduler.step_arrays, self._progress
        for request in arrays.failed[: progress[NUM_FAILED]].tolist():
            self._recorder.failure(request)
            self._end(request)
        for request in arrays.finished[: progress[NUM_FINISHED]].tolist():
            self._end(request)

    def _end(self, request: int) -> None:
        done = self._done.pop(request, None)
        if done is not None:
            done.succeed()
