"""A run in which no request counts: why that is, and which window of measurement would have some."""

import math
from dataclasses import dataclass
from typing import Any

from pagedkv.sims.closed_loop import people
from pagedkv.sims.config import MAX_S, time_text
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import DEFAULT_DURATION_S, Scenario
from pagedkv.sims.simulation import Run

_REQUESTS = 20
"""A window is proposed in which so many are to be expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmeasured:
    """Why nothing was measured."""

    text: str
    """In words, with what would help."""
    remedy: dict[str, Any]
    """Settings by field name under which some requests count."""


def unmeasured(scenario: Scenario, runs: list[Run]) -> Unmeasured:
    """Return why no request of `runs`, one or more, counts: those do that arrive after the warm-up, before the end."""
    log, end_s = runs[0].log, runs[0].end_s
    if scenario.load.num_requests is not None:
        if len(log) == 0 and scenario.duration_s is not None:
            why = f"the run ends after {end_s:g} s, before the first request"
        else:
            last = f", the last after {log.arrival_s[-1]:g} s" if len(log) else ""
            why = f"all {len(log):,} requests arrive in the warm-up of {scenario.warmup_s:g} s{last}"
        given = {name for name in ("warmup", "duration") if getattr(scenario.config.measurement, name) is not None}
        flags = " and ".join(f"--{name}" for name in ("warmup", "duration") if name in given)
        return Unmeasured(text=f"{why}; without {flags} all of them count", remedy=dict.fromkeys(given))
    assert scenario.duration_s is not None
    why = f"no request arrived in the {scenario.duration_s:g} s after the warm-up of {scenario.warmup_s:g} s"
    users = people(scenario.load, runs)
    if users is not None and len(log.of(Outcome.UNFINISHED)) >= users.users:
        busy = "everybody still waits for an earlier answer; --warmup 0s counts those"
        return Unmeasured(text=f"{why}, for {busy}", remedy={"warmup": "0s"})
    longer_s = max(2 * scenario.duration_s, _REQUESTS * _gap_s(scenario, runs))
    duration = None if longer_s <= DEFAULT_DURATION_S else time_text(float(min(math.ceil(longer_s), MAX_S)))
    return Unmeasured(text=f"{why}; a longer --duration has some", remedy={"duration": duration})


def _gap_s(scenario: Scenario, runs: list[Run]) -> float:
    """Return the least mean time between requests that can be said beforehand."""
    if (users := people(scenario.load, runs)) is not None:
        return users.pause_s / users.users
    rate_per_s = scenario.config.load.request_rate
    return 0.0 if rate_per_s is None else 1 / rate_per_s
