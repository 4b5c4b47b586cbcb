"""How long the requests of a log took, as far as is known."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.sims.goodput import GOAL_METRICS, Goal
from pagedkv.sims.records import Outcome, RequestLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Of the accepted requests, in seconds. For an unfinished one: what it has at least by the end of the run."""

    ttft_s: Float64Array
    """First token − arrival."""
    tpot_s: Float64Array
    """(Last token − first token) / (output tokens − 1); NaN before the first token and for a request of one output token.

    Of an unfinished one, its pace so far at least: as if its next token came at the end of the run.
    """
    e2e_s: Float64Array
    """Last token − arrival."""

    @classmethod
    def of(cls, log: RequestLog, end_s: float) -> "Latencies":
        """Return the latencies of `log`, a run of which ended at `end_s`."""
        finished = log.outcome == Outcome.FINISHED
        first_s = np.where(np.isnan(log.first_token_s), end_s, log.first_token_s)
        last_s = np.where(finished, log.last_token_s, end_s)
        has_gaps = (log.output_tokens > 1) & ~np.isnan(log.first_token_s)
        gaps = np.where(has_gaps, np.where(finished, log.output_tokens - 1, log.num_output_tokens), np.nan)
        return cls(ttft_s=first_s - log.arrival_s, tpot_s=(last_s - first_s) / gaps, e2e_s=last_s - log.arrival_s)

    def meet(self, goals: tuple[Goal, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which requests keep every goal (one without a TPOT keeps any TPOT goal)."""
        kept = np.ones(self.ttft_s.size, bool)
        for goal in goals:
            kept &= ~(getattr(self, GOAL_METRICS[goal.metric]) > goal.limit_s)
        return kept
