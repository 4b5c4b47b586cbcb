"""Where the time of the mean request goes."""

import math
from dataclasses import dataclass

import numpy as np

from pagedkv.sims.latencies import Latencies
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run

_SAMPLED_REQUESTS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanWaits:
    """Where the mean request's time goes, in seconds."""

    queued_s: float
    """From arrival to the first step that computes any of it; to the end of the run if none did."""
    unloaded_s: float
    """What the whole request would take with the machine to itself, and with the prefix that it found in the cache."""
    e2e_s: float
    """What it takes. The rest is what sharing steps and being preempted cost."""

    @classmethod
    def of(cls, scenario: Scenario, runs: list[Run]) -> "MeanWaits":
        """Return the means over the accepted requests, at most `_SAMPLED_REQUESTS` of each run, evenly spaced.

        E2E is unloaded_s × (time that requests have spent) / (unloaded time of what they have got so far), so that requests which
        the end of the run cuts off count as slow as they are.
        """
        queued_s = spent_s = earned_s = unloaded_s = 0.0
        number = 0
        for run in runs:
            log = run.measured
            log = log.where((log.outcome == Outcome.FINISHED) | (log.outcome == Outcome.UNFINISHED))
            log = log.where(np.isin(np.arange(len(log)), np.linspace(0, len(log) - 1, _SAMPLED_REQUESTS).astype(int)))
            queued_s += float((np.where(np.isnan(log.scheduled_s), run.end_s, log.scheduled_s) - log.arrival_s).sum())
            spent_s += float(Latencies.of(log, run.end_s).e2e_s.sum())
            number += len(log)
            columns = ("prompt_tokens", "num_cached_tokens", "output_tokens", "num_output_tokens", "model")
            for prompt, cached, output, got, model in zip(*(getattr(log, name).tolist() for name in columns), strict=True):
                step_time = scenario.deployments[model].step_time
                budget = scenario.deployments[model].scheduler.max_num_batched_tokens
                unloaded = step_time.unloaded_e2e_s(prompt, output, num_cached_tokens=cached, max_num_batched_tokens=budget)
                unloaded_s += unloaded
                if got == output:
                    earned_s += unloaded
                elif got > 0:
                    earned_s += step_time.unloaded_e2e_s(prompt, got, num_cached_tokens=cached, max_num_batched_tokens=budget)
        if number == 0:
            return cls(queued_s=0.0, unloaded_s=0.0, e2e_s=0.0)
        mean_s = unloaded_s / number
        return cls(queued_s=queued_s / number, unloaded_s=mean_s, e2e_s=mean_s * spent_s / earned_s if earned_s else math.inf)

    @property
    def slowed_s(self) -> float:
        """What sharing steps and being preempted cost."""
        return max(self.e2e_s - self.queued_s - self.unloaded_s, 0.0)

    def throughput_share(self, think_time_s: float) -> float:
        """Return a closed loop's throughput as a share of what its users would get from an unloaded machine.

        By Little's law the throughput of N users is N / (think time + E2E). Counting completions says the same with more noise.
        """
        cycle_s = think_time_s + self.e2e_s
        return (think_time_s + self.unloaded_s) / cycle_s if cycle_s > 0 else 1.0
