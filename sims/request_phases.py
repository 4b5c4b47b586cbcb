"""What requests of a run did over time: queued, prefill, decode, and, where they were preempted, waiting to come back.

The instants between queue, prefill and decode are the recorder's. When a preempted request waits, nobody records: a second look at
the run, at many moments, shows it, and so its edges are as exact as those moments are close.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.simulation import Run, Watch

PhaseKind = Literal["queued", "prefill", "decode", "preempted", "again"]
PHASES: dict[PhaseKind, str] = {
    "queued": "queued",
    "prefill": "prefill",
    "decode": "decode",
    "preempted": "preempted, waiting",
    "again": "computing again",
}
"""What each is called."""
NUM_LOOKS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of a request's time."""

    kind: PhaseKind
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.end_s - self.start_s


class Looks:
    """What a few requests were doing at each of `NUM_LOOKS` moments, evenly spaced: filled by its `watch`."""

    def __init__(self, requests: Sequence[int], *, end_s: float) -> None:
        self.requests = list(requests)
        """Their indices in the scheduler."""
        self.every_s = end_s / (NUM_LOOKS + 1)
        self.interrupted: dict[int, list[tuple[float, PhaseKind]]] = {request: [] for request in self.requests}
        """By request: the moments at which it waited to come back, or computed again."""
        times_s = np.linspace(0, end_s, NUM_LOOKS + 1, endpoint=False)[1:].tolist()
        self.watch = Watch(times_s=times_s if self.requests else [], see=self._see)

    def _see(self, now_s: float, scheduler: StepScheduler) -> None:
        table, known = scheduler.requests.arrays, scheduler.requests.size
        running = set(scheduler.arrays.running[: scheduler.num_running].tolist())
        for request in self.requests:
            if request >= known or not table["num_preemptions"][request]:
                continue
            so_far = int(table["num_known_tokens"][request])
            if so_far >= table["prompt_tokens"][request] + table["output_tokens"][request]:
                continue  # it is done
            if request not in running:
                self.interrupted[request].append((now_s, "preempted"))
            elif so_far > table["prompt_tokens"][request] and so_far - table["num_computed_tokens"][request] > 1:
                self.interrupted[request].append((now_s, "again"))  # who generates has computed all but its newest token


def scheduler_indices(run: Run) -> Int64Array | None:
    """Return, by entry of the log, its index in the scheduler, -1 for refused ones; None if there are several schedulers."""
    if run.replicas or run.server is not None:
        return None
    accepted = run.log.outcome != Outcome.REJECTED
    return np.where(accepted, np.cumsum(accepted) - 1, -1)


def phases_of(log: RequestLog, entry: int, end_s: float, looks: Sequence[tuple[float, PhaseKind]], every_s: float) -> list[Phase]:
    """Return the phases of an accepted request, one after the other, from its arrival to its end, or to that of the run."""
    finished = log.outcome[entry] == Outcome.FINISHED
    until_s = float(log.last_token_s[entry]) if finished else end_s
    edges: list[tuple[PhaseKind, float]] = [("queued", float(log.arrival_s[entry]))]
    then: list[tuple[PhaseKind, float]] = [("prefill", float(log.scheduled_s[entry])), ("decode", float(log.first_token_s[entry]))]
    edges += [edge for edge in then if not np.isnan(edge[1])]
    ends_s = [start_s for _, start_s in edges[1:]] + [until_s]
    phases = [Phase(kind=kind, start_s=start_s, end_s=end) for (kind, start_s), end in zip(edges, ends_s, strict=True)]
    for kind, start_s, end in _stretches(looks, every_s):
        phases = [part for phase in phases for part in _cut(phase, kind, start_s, end)]
    return [phase for phase in phases if phase.seconds > 0]


def _stretches(looks: Sequence[tuple[float, PhaseKind]], every_s: float) -> list[tuple[PhaseKind, float, float]]:
    """Return moments one after the other with the same answer as one stretch, half the distance to the next on either side."""
    stretches: list[tuple[PhaseKind, float, float]] = []
    for now_s, kind in looks:
        start_s, end_s = now_s - every_s / 2, now_s + every_s / 2
        if stretches and stretches[-1][0] == kind and start_s - stretches[-1][2] < every_s / 2:
            stretches[-1] = (kind, stretches[-1][1], end_s)
        else:
            stretches.append((kind, start_s, end_s))
    return stretches


def _cut(phase: Phase, kind: PhaseKind, start_s: float, end_s: float) -> list[Phase]:
    """Return `phase` with another between `start_s` and `end_s`. Nothing interrupts waiting in the queue."""
    start_s, end_s = max(start_s, phase.start_s), min(end_s, phase.end_s)
    if phase.kind not in ("prefill", "decode") or start_s >= end_s:
        return [phase]
    return [
        Phase(kind=phase.kind, start_s=phase.start_s, end_s=start_s),
        Phase(kind=kind, start_s=start_s, end_s=end_s),
        Phase(kind=phase.kind, start_s=end_s, end_s=phase.end_s),
    ]
