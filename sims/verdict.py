"""What the figures mean: does the load fit, what binds first, and what to try next."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pagedkv.scheduling.scheduler import Blocker
from pagedkv.sims.command import command_line
from pagedkv.sims.goodput import Goal
from pagedkv.sims.load import ClosedLoop
from pagedkv.sims.metrics import Latencies
from pagedkv.sims.recorder import BLOCKERS, WAITING
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run

Status = Literal["stable", "saturated", "rejecting", "failed"]
Binding = Literal["kv_memory", "bandwidth", "prefill_compute", "max_num_seqs", "max_model_len"]

WAITING_SHARE_LIMIT = 0.05
"""Closed loop: with requests waiting for more of the time than this, the load is saturating."""
THROUGHPUT_SHARE_LIMIT = 0.9
"""Closed loop: below this share of the throughput of an unloaded machine, the load is saturating."""
_SAMPLED_REQUESTS = 500
NEARLY_FULL = 0.1
"""With less than this share of the KV pool or of the running batch free, it is the nearest limit."""
ATTAIN = 0.99
"""Share of the requests, of those whose fate is known, that must meet the goals."""

_LIMIT_NAMES = {
    "kv_memory": "KV memory",
    "bandwidth": "memory bandwidth",
    "prefill_compute": "prefill compute",
    "max_num_seqs": "max-num-seqs",
    "max_model_len": "max-model-len",
}
_OF_BLOCKER: dict[Blocker, Binding] = {
    Blocker.KV_MEMORY: "kv_memory",
    Blocker.MAX_NUM_SEQS: "max_num_seqs",
    Blocker.TOKEN_BUDGET: "prefill_compute",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of one allocator under one load."""

    status: Status
    fits: bool
    """Stable, and the goals are met if there are any."""
    binding: Binding
    """The limit that is reached, or would be reached first."""
    text: str
    """Both, in words."""
    next_command: str
    """What to try next."""


def judge(scenario: Scenario, figures: dict[str, Any], runs: list[Run]) -> Verdict:
    """Judge one allocator from its figures, combined over repeats, and its runs."""
    waits = MeanWaits.of(scenario, runs)
    waiting_share = figures["waiting_time_share"] or 0.0
    ideal_share = None
    if isinstance(scenario.load, ClosedLoop):
        queueing = waiting_share > WAITING_SHARE_LIMIT
        ideal_share = waits.throughput_share(scenario.load.think_time_s)
    else:
        queueing = any(_queue_rises(run) for run in runs)
    slow = ideal_share is not None and ideal_share < THROUGHPUT_SHARE_LIMIT
    status: Status = "stable"
    if figures["num_failed"]:
        status = "failed"
    elif figures["num_rejected"]:
        status = "rejecting"
    elif slow or queueing:
        status = "saturated"
    binding = _binding(scenario, figures, runs, waits, rejecting=status == "rejecting", queueing=queueing)
    attained = _attained(runs, scenario.goals)
    fits = status == "stable" and (attained is None or attained >= ATTAIN)
    reasons = []
    if status == "rejecting":
        reasons.append(f"{figures['num_rejected']:,} of {figures['num_injected']:,} requests can never run here")
    if status == "failed":
        reasons.append(f"{figures['num_failed']:,} of {figures['num_injected']:,} requests were given up")
    if queueing:
        reasons.append(f"requests wait {waiting_share:.0%} of the time")
    if slow:
        reasons.append(f"{ideal_share:.0%} of the throughput that these users would get from an unloaded machine")
    if attained is not None:
        reasons.append(f"{attained:.1%} of requests meet the goals")
    text = f"{scenario.load.title} {'fit' if fits else 'do not fit'}: {status}"
    text += f" ({'; '.join(reasons)})" if reasons else ""
    text += f". {'Next limit' if fits else 'Limit'}: {_LIMIT_NAMES[binding]}."
    return Verdict(status=status, fits=fits, binding=binding, text=text, next_command=_next_command(scenario, binding, fits=fits))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanWaits:
    """Where the mean request's time goes, in seconds. Unfinished requests count with what they have by the end."""

    queued_s: float
    """From arrival to the first step that computes any of it."""
    unloaded_s: float
    """What it would take with the machine to itself."""
    e2e_s: float
    """All of it. The rest is what sharing steps and being preempted cost."""

    @classmethod
    def of(cls, scenario: Scenario, runs: list[Run]) -> "MeanWaits":
        """Return the means over the accepted requests, at most `_SAMPLED_REQUESTS` of each run, evenly spaced."""
        budget = scenario.scheduler.max_num_batched_tokens
        sums, number = np.zeros(3), 0
        for run in runs:
            log = run.measured
            log = log.where((log.outcome == Outcome.FINISHED) | (log.outcome == Outcome.UNFINISHED))
            log = log.where(np.isin(np.arange(len(log)), np.linspace(0, len(log) - 1, _SAMPLED_REQUESTS).astype(int)))
            scheduled_s = np.where(np.isnan(log.scheduled_s), run.end_s, log.scheduled_s)
            lengths = zip(log.prompt_tokens.tolist(), log.output_tokens.tolist(), strict=True)
            unloaded_s = [scenario.step_time.unloaded_e2e_s(p, o, max_num_batched_tokens=budget) for p, o in lengths]
            sums += ((scheduled_s - log.arrival_s).sum(), sum(unloaded_s), Latencies.of(log, run.end_s).e2e_s.sum())
            number += len(log)
        queued_s, unloaded_s, e2e_s = (sums / max(number, 1)).tolist()
        return cls(queued_s=queued_s, unloaded_s=unloaded_s, e2e_s=e2e_s)

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


def _queue_rises(run: Run) -> bool:
    """Return whether the queue of the last third of the arrivals is more than twice that of the first third, plus one."""
    arrivals_s = run.measured.arrival_s
    starts_s, seconds, gauges = run.recorder.timeline.means()
    if arrivals_s.size == 0:
        return False
    first_s, last_s = float(arrivals_s[0]), float(arrivals_s[-1])
    third_s = (last_s - first_s) / 3

    def mean_waiting(from_s: float, to_s: float) -> float:
        inside = (starts_s >= from_s) & (starts_s < to_s)
        return float(np.average(gauges[inside, WAITING], weights=seconds[inside])) if inside.any() else 0.0

    return mean_waiting(last_s - third_s, last_s) > 2 * mean_waiting(first_s, first_s + third_s) + 1


def _attained(runs: list[Run], goals: tuple[Goal, ...]) -> float | None:
    """Return the share of requests that met the goals among those whose fate is known: not unfinished within the goals so far."""
    if not goals:
        return None
    met = missed = 0
    for run in runs:
        log = run.measured
        refused = (log.outcome == Outcome.REJECTED) | (log.outcome == Outcome.FAILED)
        within = Latencies.of(log, run.end_s).meet(goals) & ~refused
        met += int((within & (log.outcome == Outcome.FINISHED)).sum())
        missed += int((~within).sum())
    return met / (met + missed) if met + missed else None


def _binding(
    scenario: Scenario,
    figures: dict[str, Any],
    runs: list[Run],
    waits: MeanWaits,
    *,
    rejecting: bool,
    queueing: bool,
) -> Binding:
    """Name the limit that costs requests the most time, or, if none does, the one that is nearest."""
    if rejecting:
        log = runs[0].log.of(Outcome.REJECTED)
        longest = (log.prompt_tokens + log.output_tokens).max(initial=0)
        return "max_model_len" if longest > scenario.scheduler.max_model_len else "kv_memory"
    if queueing and waits.queued_s > waits.slowed_s:
        blocked_s = {_OF_BLOCKER[blocker]: 0.0 for blocker in _OF_BLOCKER}
        for run in runs:
            for blocker, seconds in zip(BLOCKERS, run.recorder.integrals.blocked_s.tolist(), strict=True):
                if blocker in _OF_BLOCKER:
                    blocked_s[_OF_BLOCKER[blocker]] += seconds
        return max(blocked_s, key=blocked_s.__getitem__)
    if figures["kv"] and figures["kv"]["free"] < NEARLY_FULL:
        return "kv_memory"
    if figures["running_max"] > (1 - NEARLY_FULL) * scenario.scheduler.max_num_seqs:
        return "max_num_seqs"
    memory_s, compute_s, _ = np.sum([run.recorder.integrals.cost_s for run in runs], axis=0)
    return "bandwidth" if memory_s >= compute_s else "prefill_compute"


def _next_command(scenario: Scenario, binding: Binding, *, fits: bool) -> str:
    config, load = scenario.config, scenario.config.load
    more = 2.0 if fits else 0.5
    if fits:
        pass
    elif binding == "max_model_len":
        return command_line(config, max_model_len=scenario.model.max_context)
    elif binding == "kv_memory" and scenario.model.kv_spec(config.serving.kv_cache_dtype).bytes_per_element > 1:
        return command_line(config, kv_cache_dtype="fp8")
    elif binding == "bandwidth" and (narrower := _narrower_format(scenario)):
        return command_line(config, quantization=narrower)
    elif binding == "max_num_seqs":
        return command_line(config, max_num_seqs=2 * scenario.scheduler.max_num_seqs)
    if load.users is not None:
        return command_line(config, users=max(1, round(load.users * more)))
    if load.request_rate is not None:
        return command_line(config, request_rate=load.request_rate * more)
    return command_line(config, trace_rate=(load.trace_rate or 1.0) * more)


def _narrower_format(scenario: Scenario) -> str | None:
    bits = scenario.weight_format.bits_per_weight
    return "fp8" if bits > 8 else "nvfp4" if bits > 4.5 and "fp4" in scenario.hardware.reached_flops else None
