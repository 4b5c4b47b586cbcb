"""The slowest requests of a run, and why each was slow: where its own time went, next to what it would take alone."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.limits import LIMIT_NAMES, queue_blocker
from pagedkv.sims.records import Outcome
from pagedkv.sims.request_phases import Looks, Phase, PhaseKind, phases_of, scheduler_indices
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run

SLOWEST = 20

Part = Literal["queued", "preempted", "own prompt", "others in prefill", "own answer", "others in decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRequest:
    """A request and its time."""

    entry: int
    """Its place in the log, and in requests.csv."""
    arrival_s: float
    e2e_s: float
    """From its arrival to its last token, or, unfinished, to the end of the run: at least that long."""
    finished: bool
    prompt_tokens: int
    num_cached_tokens: int
    """Of the prompt, found in the prefix cache."""
    output_tokens: int
    """What it asks for."""
    num_output_tokens: int
    """What it has got."""
    num_preemptions: int
    phases: tuple[Phase, ...]
    """From its arrival on, without gaps."""
    prefill_alone_s: float
    """What its prompt would take with the machine to itself."""
    decode_alone_s: float
    """What the output that it has got would take so."""
    blocked_by: str
    """What held up the head of the queue for the longest time of this run; empty if nothing did."""

    def seconds(self, *kinds: PhaseKind) -> float:
        """Return its time in phases of these kinds."""
        return sum(phase.seconds for phase in self.phases if phase.kind in kinds)

    @property
    def parts(self) -> dict[Part, float]:
        """Where its time went, in seconds, which sum to `e2e_s`: what it would take alone, and what others cost it."""
        prefill_s, decode_s = self.seconds("prefill"), self.seconds("decode")
        own_prompt_s, own_answer_s = min(self.prefill_alone_s, prefill_s), min(self.decode_alone_s, decode_s)
        return {
            "queued": self.seconds("queued"),
            "preempted": self.seconds("preempted", "again"),
            "own prompt": own_prompt_s,
            "others in prefill": prefill_s - own_prompt_s,
            "own answer": own_answer_s,
            "others in decode": decode_s - own_answer_s,
        }

    @property
    def why(self) -> str:
        """The part that takes the most, in words with its numbers."""
        parts = self.parts
        part = max(parts, key=parts.__getitem__)
        share = f"{parts[part] / self.e2e_s:.0%} of its time" if self.e2e_s > 0 else "all of its time"
        match part:
            case "queued":
                held_up = f"; what holds up the queue most is {self.blocked_by}" if self.blocked_by else ""
                return f"queued for {parts[part]:.1f} s, {share}{held_up}"
            case "preempted":
                return f"preempted {self.num_preemptions} ×: {parts[part]:.1f} s waiting to come back and computing again, {share}"
            case "own prompt":
                return f"its prompt of {self.prompt_tokens:,} tokens takes {self.prefill_alone_s:.1f} s even alone, {share}"
            case "others in prefill":
                tokens, alone_s = f"its prompt of {self.prompt_tokens:,} tokens", self.prefill_alone_s
                return f"{tokens} takes {alone_s:.1f} s alone and {self.seconds('prefill'):.1f} s in steps shared with others"
            case "own answer":
                return f"its {self.num_output_tokens:,} output tokens take {self.decode_alone_s:.1f} s even alone, {share}"
            case "others in decode":
                tokens, alone_s = f"its {self.num_output_tokens:,} output tokens", self.decode_alone_s
                return f"{tokens} take {alone_s:.1f} s alone and {self.seconds('decode'):.1f} s in steps shared with others"


def slowest_entries(run: Run, number: int = SLOWEST) -> Int64Array:
    """Return the places in the log of the measured requests that took the longest, unfinished ones by what they took at least."""
    log = run.log
    accepted = (log.outcome == Outcome.FINISHED) | (log.outcome == Outcome.UNFINISHED)
    entries = np.flatnonzero(accepted & (log.arrival_s >= run.warmup_s))
    order = np.argsort(-Latencies.of(log, run.end_s).e2e_s[entries], kind="stable")
    slowest: Int64Array = entries[order[:number]]
    return slowest


def looks_at(run: Run, entries: Int64Array) -> Looks | None:
    """Return who looks at those of `entries` that were preempted, when the run is done again; None if nobody need look, or can."""
    indices, preempted = scheduler_indices(run), entries[run.log.num_preemptions[entries] > 0]
    return None if indices is None or not preempted.size else Looks(indices[preempted].tolist(), end_s=run.end_s)


def slow_requests(scenario: Scenario, run: Run, entries: Int64Array, looks: Looks | None) -> list[SlowRequest]:
    """Return the requests at `entries`, with what `looks` has seen of them."""
    log, indices = run.log, scheduler_indices(run)
    e2e_s, blocker = Latencies.of(log, run.end_s).e2e_s, queue_blocker([run])
    found = []
    for entry in entries.tolist():
        deployment = scenario.deployments[int(log.model[entry])]
        step_time, budget = deployment.step_time, deployment.scheduler.max_num_batched_tokens
        prompt, cached, got = (int(x[entry]) for x in (log.prompt_tokens, log.num_cached_tokens, log.num_output_tokens))
        prefill_s = step_time.prefill_cost(prompt, num_cached_tokens=cached, max_num_batched_tokens=budget).total_s
        whole_s = step_time.unloaded_e2e_s(prompt, max(got, 1), num_cached_tokens=cached, max_num_batched_tokens=budget)
        seen = [] if looks is None or indices is None else looks.interrupted.get(int(indices[entry]), [])
        found.append(
            SlowRequest(
                entry=entry,
                arrival_s=float(log.arrival_s[entry]),
                e2e_s=float(e2e_s[entry]),
                finished=bool(log.outcome[entry] == Outcome.FINISHED),
                prompt_tokens=prompt,
                num_cached_tokens=cached,
                output_tokens=int(log.output_tokens[entry]),
                num_output_tokens=got,
                num_preemptions=int(log.num_preemptions[entry]),
                phases=tuple(phases_of(log, entry, run.end_s, seen, 0.0 if looks is None else looks.every_s)),
                prefill_alone_s=prefill_s,
                decode_alone_s=max(whole_s - prefill_s, 0.0),
                blocked_by="" if blocker is None else LIMIT_NAMES[blocker],
            )
        )
    return found
