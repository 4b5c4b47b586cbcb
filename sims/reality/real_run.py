"""A timed load before a running engine, on the real clock: what happened, and how long each step took."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import Step
from pagedkv.sims.real_clock import RealClock
from pagedkv.sims.real_load import TextEngine
from pagedkv.sims.reality.timed_load import TimedLoad
from pagedkv.sims.simulation import Run
from pagedkv.step_batch import StepBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLog:
    """The steps of a run."""

    batches: tuple[StepBatch, ...]
    """What each computed."""
    seconds: Float64Array
    """What each took, deciding and handing out its tokens included."""


class LoggingClock(RealClock):
    """A real clock that remembers every step."""

    def __init__(self, scheduler: Scheduler, now: Callable[[], float]) -> None:
        super().__init__(scheduler, now)
        self._batches: list[StepBatch] = []
        self._seconds: list[float] = []

    def computed(self, step: Step) -> None:
        """Note that it is computed, and what it was."""
        began_s = self._since_s
        super().computed(step)
        self._batches.append(step.batch[: step.num_entries].copy())
        self._seconds.append(self._since_s - began_s)

    def log(self) -> StepLog:
        """Return the steps so far."""
        return StepLog(batches=tuple(self._batches), seconds=np.array(self._seconds))


def serve_timed(
    engine: TextEngine,
    load: TimedLoad,
    submit: Callable[[int], int | None],
    *,
    now: Callable[[], float],
    sleep: Callable[[float], None],
    told: Callable[[int], None],
) -> tuple[Run, StepLog]:
    """Serve `load` from now on until all is answered; return what was measured.

    Args:
        engine: Serves; nobody else uses it, and nothing has run in it.
        load: Who comes when.
        submit: Gives the engine the request of that number; None if it is refused.
        now: The clock, in seconds.
        sleep: Waits for so many seconds.
        told: Is told how many are answered, whenever that changes.
    """
    clock_zero_s = now()

    def since() -> float:
        return now() - clock_zero_s

    engine.observer = clock = LoggingClock(engine.scheduler, since)
    arrived = done = 0
    while done < load.size:
        if arrived == done and load.arrival_s[arrived] > since():  # nobody is there
            sleep(float(load.arrival_s[arrived]) - since())
        while arrived < load.size and load.arrival_s[arrived] <= since():
            request, at_s = submit(arrived), float(load.arrival_s[arrived])
            arrived += 1
            if request is None:
                clock.rejection(int(load.prompt_tokens[arrived - 1]), int(load.output_tokens[arrived - 1]))
                done += 1
            else:
                clock.arrival(request, at_s)
        if arrived > done:
            ended = sum(new.finish_reason is not None for new in engine.step())
            done += ended
            if ended:
                told(done)
    run = clock.close()
    engine.observer = None
    return run, clock.log()
