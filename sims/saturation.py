"""Whether more is asked for than can be served."""

import math
from typing import Any

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.sims.closed_loop import is_batch, people
from pagedkv.sims.mean_waits import MeanWaits
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run

WAITING_SHARE_LIMIT = 0.05
"""Closed loop: with requests waiting for more of the time than this, the load is saturating."""
THROUGHPUT_SHARE_LIMIT = 0.9
"""Closed loop: below this share of the throughput of an unloaded machine, the load is saturating."""


def saturation(scenario: Scenario, figures: dict[str, Any], runs: list[Run], waits: MeanWaits) -> tuple[bool, float | None]:
    """Return whether too many requests wait, and a closed loop's throughput as a share of what an unloaded machine would give."""
    if is_batch(scenario.load):
        return False, None
    users = people(scenario.load, runs)
    if users is None:
        return any(_load_rises(run) for run in runs), None
    ideal_share = waits.throughput_share(users.pause_s)
    if math.isinf(waits.e2e_s):  # no measured request has got a token: count what others got done
        ideal_per_s = users.users / (users.pause_s + waits.unloaded_s)
        ideal_share = (figures["request_throughput_per_s"] or 0.0) / ideal_per_s
    return (figures["waiting_time_share"] or 0.0) > WAITING_SHARE_LIMIT, ideal_share


def _load_rises(run: Run) -> bool:
    """Return whether more and more requests are there: waiting ones, or measured ones that are not done.

    That is: over the last third of the time in which measured requests arrive, more than twice as many as over the first, plus one,
    plus what chance alone may add (twice the root, as for Poisson counts).
    """
    log, measured = run.log, run.measured
    if len(measured) == 0:
        return False
    last_s = float(measured.arrival_s[-1]) if run.drained else run.end_s

    def rises(log: RequestLog, until_s: Float64Array) -> bool:
        third_s = (last_s - run.warmup_s) / 3
        thirds = []
        for from_s in (run.warmup_s, last_s - third_s):
            inside_s = np.minimum(until_s, from_s + third_s) - np.maximum(log.arrival_s, from_s)
            thirds.append(float(np.maximum(inside_s, 0.0).sum()) / third_s if third_s > 0 else 0.0)
        return thirds[1] > 2 * thirds[0] + 1 + 2 * math.sqrt(thirds[1])

    waiting = log.where((log.outcome != Outcome.REJECTED) & (log.outcome != Outcome.FAILED))
    accepted = measured.where((measured.outcome != Outcome.REJECTED) & (measured.outcome != Outcome.FAILED))
    done_s = np.where(accepted.outcome == Outcome.FINISHED, accepted.last_token_s, run.end_s)
    return rises(waiting, np.where(np.isnan(waiting.scheduled_s), run.end_s, waiting.scheduled_s)) or rises(accepted, done_s)
