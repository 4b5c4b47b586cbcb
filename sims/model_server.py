"""Ollama's server: models are loaded when requests name them, share the machine, and leave for each other or for want of use.

A loaded model is a process of the engine, as in `pagedkv.sims.fleet`: unloading ends it, loading begins a new one with an empty
cache. Requests for a model that is there go straight to it. All others queue at the server, which takes one after the other and
lets nobody pass until the model of the first is there, so that one load runs at a time.
Source: Ollama, August 2026 (fb30760), server/sched.go: facts only, in our words.
"""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import numpy as np
import simpy

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.scheduling.content import Contents, Segments
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.clock import Clock
from pagedkv.sims.engine import submit_in_time
from pagedkv.sims.model_runner import Asked, ModelLoad, Runner, StartRunner
from pagedkv.sims.model_serving import HEADROOM, ModelServing, ModelVariant, ServedModel
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome, RequestLog

Process = Generator[simpy.Event, Any, None]
_Row = tuple[float, int, int, int]


class ModelServer:
    """Takes requests as an engine does, and sees to it that the model that each names is in memory."""

    def __init__(self, env: Clock, serving: ModelServing, start: StartRunner) -> None:
        """Start the server on `env`, with no model in memory."""
        self._env, self._serving, self._start = env, serving, start
        self._loaded: dict[int, Runner] = {}
        self._pending: deque[Asked] = deque()
        self._placing: Asked | None = None
        self._wake, self._unloaded = env.event(), env.event()
        self._turned_away: dict[Outcome, list[tuple[int, _Row]]] = {Outcome.REJECTED: [], Outcome.FAILED: []}
        self.runners: list[Runner] = []
        """All that ever were, in the order of their loads."""
        self.loads: list[ModelLoad] = []
        """The same, and those that failed."""
        self.waits_s: list[tuple[float, float]] = []
        """From when to when requests waited for their model."""
        self.num_timers = 0
        """Events to come that are ends of keep-alives: they keep no run going."""
        env.process(self._serve())

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0, model: int = 0
    ) -> simpy.Event | None:
        """Queue a request; return the event of its end, or None if the queue is full or it is longer than its model's context."""
        now_s, runner = self._env.now, self._loaded.get(model)
        if self._is_full(runner):
            self._turned_away[Outcome.REJECTED].append((model, (now_s, prompt_tokens, output_tokens, user_class)))
            return None
        asked = Asked(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            content=content,
            user_class=user_class,
            model=model,
            arrived_s=now_s,
            done=self._env.event(),
        )
        if runner is not None:
            return self._use(runner, asked)
        self._pending.append(asked)
        if not self._wake.triggered:
            self._wake.succeed()
        return asked.done

    def submit_all(
        self,
        arrival_s: Float64Array,
        prompt_tokens: Int64Array,
        output_tokens: Int64Array,
        *,
        contents: Contents | None = None,
        models: Int64Array | None = None,
    ) -> None:
        """Let requests arrive at these times, ascending; nobody waits for their end."""
        self._env.process(submit_in_time(self._env, self, arrival_s, prompt_tokens, output_tokens, contents, models))

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """In the order of requests' `model`."""
        return self._serving.models

    def scheduler_of(self, model: int) -> StepScheduler | None:
        """Return what decides for a model that is loaded; None if it is not."""
        runner = self._loaded.get(model)
        return None if runner is None else runner.scheduler

    def close(self) -> None:
        """End the run."""
        for runner in self._loaded.values():
            runner.engine.close()
            runner.recorder.close(self._env.now)
        for asked in self._waiting():
            self.waits_s.append((asked.arrived_s, self._env.now))

    @property
    def recorders(self) -> list[Recorder]:
        """What was measured, load by load."""
        return [runner.recorder for runner in self.runners]

    @property
    def num_completed(self) -> int:
        """Requests that have finished within the window."""
        return sum(recorder.num_completed for recorder in self.recorders)

    def log(self) -> RequestLog:
        """Return what happened to every request, once the run is over."""
        logs = []
        for runner in self.runners:
            served = runner.recorder.log()
            logs.append(replace(served, model=np.full(len(served), runner.load.model)))
        waiting = [(asked.model, (asked.arrived_s, *_lengths(asked), asked.user_class)) for asked in self._waiting()]
        for outcome, rows in [*self._turned_away.items(), (Outcome.UNFINISHED, waiting)]:
            table = np.array([row for _, row in rows]).reshape(-1, 4)
            nobody_took = RequestLog.refused(table[:, 0], table[:, 1:].astype(np.int64), outcome)
            logs.append(replace(nobody_took, model=np.array([model for model, _ in rows], np.int64)))
        return RequestLog.joined(logs)

    def _waiting(self) -> list[Asked]:
        return [*([] if self._placing is None else [self._placing]), *self._pending]

    def _is_full(self, runner: Runner | None) -> bool:
        """Return whether one more, who would have to wait, is one too many. OLLAMA_MAX_QUEUE is the server's, not a model's.

        As Ollama's documentation says it, whoever waits counts, for a model or for a slot. (Its scheduler counts those who wait for
        a model, and a loaded model lets any number wait for its slots.) The one whose model is being seen to does not.
        """
        if runner is not None and runner.num_waiting < 0:
            return False
        waiting = len(self._pending) + sum(max(each.num_waiting, 0) for each in self._loaded.values())
        at_once = runner is None and self._placing is None
        return waiting >= self._serving.max_queue and not (at_once and not waiting)

    def _use(self, runner: Runner, asked: Asked) -> simpy.Event | None:
        done = runner.engine.submit(*_lengths(asked), content=asked.content, user_class=asked.user_class, arrived_s=asked.arrived_s)
        if done is None:
            return None
        runner.num_users += 1
        runner.idle_turn += 1
        done.callbacks.append(lambda _: self._leave(runner))
        return done

    def _leave(self, runner: Runner) -> None:
        runner.num_users -= 1
        if runner.num_users == 0:
            self._fall_idle(runner)

    def _fall_idle(self, runner: Runner) -> None:
        runner.idle_turn += 1
        if runner.leaves_when_idle or runner.keep_alive_s <= 0:
            self._unload(runner, "room" if runner.leaves_when_idle else "keep-alive")
        elif np.isfinite(runner.keep_alive_s):
            turn, self.num_timers = runner.idle_turn, self.num_timers + 1

            def expire(_: simpy.Event) -> None:
                self.num_timers -= 1
                if runner.idle_turn == turn and self._loaded.get(runner.load.model) is runner:
                    self._unload(runner, "keep-alive")

            self._env.timeout(runner.keep_alive_s).callbacks.append(expire)

    def _unload(self, runner: Runner, why: str) -> None:
        del self._loaded[runner.load.model]
        runner.engine.stop()
        runner.recorder.close(self._env.now)
        runner.recorder.arrays.gauges[:] = 0
        runner.load.end_s, runner.load.why_ended = self._env.now, why
        self._unloaded.succeed()
        self._unloaded = self._env.event()

    def _serve(self) -> Process:
        while True:
            while not self._pending:
                self._wake = self._env.event()
                yield self._wake
            asked = self._placing = self._pending.popleft()
            yield from self._place(asked)
            self._placing = None
            if self._env.now > asked.arrived_s:
                self.waits_s.append((asked.arrived_s, self._env.now))

    def _place(self, asked: Asked) -> Process:
        """See to it that the model of `asked` is there, and hand it over. If memory runs out twice, it fails."""
        serving, variants, tried_again = self._serving, self._serving.models[asked.model].variants, False
        variant = variants[0]
        while asked.model not in self._loaded:
            if len(self._loaded) >= serving.max_loaded_models or not self._fits_beside(variant):
                yield from self._make_room()
                continue
            fits = yield from self._load(asked.model, variant)
            if fits:
                continue
            lower = variants[1:]
            if tried_again or not (lower or self._loaded):
                self._turned_away[Outcome.FAILED].append((asked.model, (asked.arrived_s, *_lengths(asked), asked.user_class)))
                asked.done.succeed(Outcome.FAILED)
                return
            tried_again, variant = True, lower[0] if lower else variant
            yield from self._evict_all()
        runner = self._loaded[asked.model]
        done = self._use(runner, asked)
        if done is not None:
            done.callbacks.append(asked.done.trigger)
        else:  # longer than the context that there was memory for
            asked.done.succeed(Outcome.FAILED)
            if runner.num_users == 0:
                self._fall_idle(runner)

    def _free_bytes(self) -> int:
        return self._serving.memory_bytes - sum(runner.load.held_bytes for runner in self._loaded.values())

    def _fits_beside(self, variant: ModelVariant) -> bool:
        """Return whether it may be loaded beside what is there. The first model is loaded whatever is expected of it."""
        return not self._loaded or variant.estimate_bytes <= HEADROOM * self._free_bytes()

    def _load(self, model: int, variant: ModelVariant) -> Generator[simpy.Event, Any, bool]:
        """Read a model and start its process; return whether memory was enough.

        Weights that do not fit are not read. A cache that does not fit is asked for once they are there: that takes the whole load.
        """
        load = ModelLoad(model=model, context=variant.context, held_bytes=variant.held_bytes, start_s=self._env.now)
        self.loads.append(load)
        if variant.weight_bytes <= self._free_bytes():
            yield self._env.timeout(self._serving.models[model].load_s)
            if load.held_bytes <= self._free_bytes():
                load.ready_s = self._env.now
                runner = self._loaded[model] = self._start(model, variant, load)
                runner.recorder.running_elsewhere = self._running_beside(runner)
                self.runners.append(runner)
                return True
        load.held_bytes, load.end_s, load.why_ended = variant.weight_bytes, self._env.now, "out of memory"
        return False

    def _running_beside(self, runner: Runner) -> Callable[[], int]:
        return lambda: sum(other.scheduler.num_running for other in self._loaded.values() if other is not runner)

    def _make_room(self) -> Process:
        """Unload the idle model with the shortest keep-alive; if none is idle, that with the shortest as soon as it is."""
        runners = sorted(self._loaded.values(), key=lambda runner: (runner.keep_alive_s, runner.name))
        runner = next((runner for runner in runners if runner.num_users == 0), runners[0])
        if not self._let_go(runner):
            yield self._unloaded  # of any: then there may be room as well
        yield from self._recover()

    def _evict_all(self) -> Process:
        for runner in list(self._loaded.values()):
            self._let_go(runner)
        while self._loaded:  # nobody loads in the meantime
            yield self._unloaded
        yield from self._recover()

    def _let_go(self, runner: Runner) -> bool:
        """Unload `runner`, now or when it falls idle; return whether it is gone."""
        runner.leaves_when_idle, runner.keep_alive_s = True, 0.0
        if runner.num_users == 0:
            self._unload(runner, "room")
        return runner.num_users == 0

    def _recover(self) -> Process:
        if self._serving.recovery_s:
            yield self._env.timeout(self._serving.recovery_s)


def _lengths(asked: Asked) -> tuple[int, int]:
    return asked.prompt_tokens, asked.output_tokens
