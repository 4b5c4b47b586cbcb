"""How far requests meet their latency goals: the share of them, goal by goal, and the latency that the wanted share keeps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.sims.goodput import GOAL_METRICS, Goal
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.records import Outcome
from pagedkv.sims.simulation import Run


def share_words(share: float | None, attain: float | None) -> str:
    """Return `share` in percent, with as many digits as it takes to see on which side of `attain` it is; "–" if it is not known."""
    if share is None:
        return "–"
    digits = range(1, 7)
    texts = [f"{share:.{number}%}" for number in digits]
    if attain is None or share >= attain:
        return texts[0]
    return next((text for text, number in zip(texts, digits, strict=True) if round(share, number + 2) < attain), texts[-1])


def attained(runs: Sequence[Run], goals: tuple[Goal, ...]) -> float | None:
    """Return the share of requests of `runs` that met all `goals`, of those whose fate is known; None if none is known.

    What the verdict says, too. A request that the end of the run cuts off while it is within the goals is left out; one that is
    already beyond them has missed them (a TPOT goal, by its pace so far), and so has one that was rejected or failed.
    `goodput_share` counts those that are cut off as missed, so that it stays below 1 even on an idle machine.
    """
    met = missed = 0
    for run in runs:
        log = run.measured
        refused = (log.outcome == Outcome.REJECTED) | (log.outcome == Outcome.FAILED)
        within = Latencies.of(log, run.end_s).meet(goals) & ~refused
        met += int((within & (log.outcome == Outcome.FINISHED)).sum())
        missed += int((~within).sum())
    return met / (met + missed) if met + missed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One goal, and what became of it."""

    metric: str
    """ttft, tpot or e2el."""
    limit_s: float
    """The goal."""
    attained: float | None
    """Share of the requests that keep this goal, whatever the others; None if no request's fate is known."""
    reached_s: float | None
    """The limit that the wanted share of the finished requests would keep; None if none finished or has this latency."""


def terms(runs: Sequence[Run], goals: tuple[Goal, ...], *, attain: float) -> tuple[Term, ...]:
    """Return every goal with the share that keeps it and with the limit that a share `attain` would keep."""
    return tuple(
        Term(
            metric=goal.metric,
            limit_s=goal.limit_s,
            attained=attained(runs, (goal,)),
            reached_s=_reached_s(runs, goal, attain),
        )
        for goal in goals
    )


def _reached_s(runs: Sequence[Run], goal: Goal, attain: float) -> float | None:
    samples = []
    for run in runs:
        log = run.measured.of(Outcome.FINISHED)
        samples.append(getattr(Latencies.of(log, run.end_s), GOAL_METRICS[goal.metric]))
    seconds = np.concatenate(samples)
    seconds = seconds[~np.isnan(seconds)]
    return float(np.quantile(seconds, attain, method="inverted_cdf")) if seconds.size else None
