"""The real clock: tells a recorder how the steps of a running engine go, as the simulated engine does with the virtual one."""

import math
from collections.abc import Callable

import numpy as np

from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import Step
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import NUM_OUTPUT_TOKENS
from pagedkv.sims.records import RequestLog
from pagedkv.sims.simulation import Run
from pagedkv.sims.step_time import StepCost


class RealClock:
    """Watches an engine's steps by a clock, from now on.

    A step lasts from the end of the one before, or the last arrival since, to its last token: deciding is part of it. What it takes
    until it is launched counts as overhead, all else as compute: a clock cannot tell memory from arithmetic.
    """

    def __init__(self, scheduler: Scheduler, now: Callable[[], float]) -> None:
        self._scheduler, self._now = scheduler, now
        self.recorder = Recorder(scheduler, warmup_s=0.0, end_s=math.inf)
        self._since_s = self._launched_s = now()
        self._idle = True

    def arrival(self, request: int, at_s: float | None = None) -> None:
        """Note that `request` arrived now, or `at_s`, while a step ran that has ended since."""
        at_s = self._now() if at_s is None else at_s
        if self._idle:
            self.recorder.idle(self._since_s, at_s)
        self._since_s, self._idle = max(self._since_s, at_s), False
        self.recorder.arrival(request, at_s)

    def rejection(self, prompt_tokens: int, output_tokens: int) -> None:
        """Note that a request is refused now."""
        self.recorder.rejection(prompt_tokens, output_tokens, self._now())

    def launched(self, step: Step) -> None:
        """Note that a step is decided and about to be computed."""
        self._launched_s = self._now()

    def computed(self, step: Step) -> None:
        """Note that it is computed, before the scheduler knows."""
        end_s = self._now()
        cost = StepCost(memory_s=0.0, compute_s=end_s - self._launched_s, overhead_s=self._launched_s - self._since_s)
        self.recorder.step(step, self._since_s, cost)
        self._since_s = end_s

    def completed(self) -> None:
        """Note the tokens that came out, at the end of the step."""
        self.recorder.tokens(self._since_s)
        self._idle = self._scheduler.num_running == self._scheduler.num_waiting == 0

    def forked(self, parent: int, child: int) -> None:
        """Note that `child` goes on from what `parent` has computed, and has its first tokens from it: it came when that did.

        A beam that takes the place of another is not new, and keeps what is known of it.
        """
        times = self.recorder.arrays.times
        if child < times.size and not np.isnan(times["arrival_s"][child]):
            return
        self.recorder.arrival(child, float(times["arrival_s"][parent]))
        times = self.recorder.arrays.times
        times[child] = times[parent]
        self.recorder.arrays.counters[NUM_OUTPUT_TOKENS] += 1

    def close(self) -> Run:
        """End now and return the run."""
        end_s = self._now()
        if self._idle:
            self.recorder.idle(self._since_s, end_s)
        self.recorder.close(end_s)
        return Run(
            allocator=self._scheduler.allocator,
            recorder=self.recorder,
            log=self._log(),
            end_s=end_s,
            warmup_s=0.0,
            drained=self._idle,
        )

    def _log(self) -> RequestLog:
        """Return what happened to the requests that arrived while the clock ran."""
        log = self.recorder.log()
        return log.where(log.arrival_s >= 0.0)
