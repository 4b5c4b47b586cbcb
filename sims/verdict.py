"""What the figures mean: does the load fit, what binds first, and what to try next."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.errors import ConfigError
from pagedkv.sims.attainment import attained, terms
from pagedkv.sims.closed_loop import is_batch, people
from pagedkv.sims.command import changed, command_line
from pagedkv.sims.config import ATTAIN, SimulationConfig
from pagedkv.sims.engines.ollama import lower_context
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.limits import LIMIT_NAMES, Binding, queue_blocker, step_limit
from pagedkv.sims.missed_goal import MissedGoal, missed_goal
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run
from pagedkv.weight_format import load_weight_format

Status = Literal["stable", "saturated", "rejecting", "failed"]

WAITING_SHARE_LIMIT = 0.05
"""Closed loop: with requests waiting for more of the time than this, the load is saturating."""
THROUGHPUT_SHARE_LIMIT = 0.9
"""Closed loop: below this share of the throughput of an unloaded machine, the load is saturating."""
_SAMPLED_REQUESTS = 500
NEARLY_FULL = 0.1
"""With less than this share of the KV pool or of the running batch free, it is the nearest limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of one allocator under one load."""

    status: Status
    fits: bool
    """With goals: they are met, nobody is turned away, and an open loop's queue does not rise. Without: stable."""
    binding: Binding
    """The limit that is reached, or would be reached first."""
    missed: str | None
    """Which goal is missed most, and why; None if the goals are met, or for want of goals."""
    text: str
    """Both, in words."""
    next_command: str
    """What to try next."""


def judge(scenario: Scenario, figures: dict[str, Any], runs: list[Run], *, attain: float = ATTAIN) -> Verdict:
    """Judge one allocator from its figures, combined over repeats, and its runs; `attain` is the share that must meet the goals."""
    waits = MeanWaits.of(scenario, runs)
    waiting_share = figures["waiting_time_share"] or 0.0
    closed = people(scenario.load, runs) is not None
    queueing, ideal_share = _saturation(scenario, figures, runs, waits)
    rising = queueing and not closed
    slow = ideal_share is not None and ideal_share < THROUGHPUT_SHARE_LIMIT
    status: Status = "stable"
    if figures["num_failed"]:
        status = "failed"
    elif figures["num_rejected"]:
        status = "rejecting"
    elif slow or queueing:
        status = "saturated"
    share = attained(runs, scenario.goals) if scenario.goals else None
    missed = share is not None and share < attain
    why = missed_goal(scenario, runs) if missed and status != "rejecting" else None
    binding = why.binding if why else _binding(scenario, figures, runs, waits, rejecting=status == "rejecting", queueing=queueing)
    tolerated = status in ("stable", "saturated") or (status == "failed" and bool(scenario.replication.faults))  # those are misses
    served = status == "stable" if share is None else tolerated and not missed and not rising
    fits = served and figures["num_injected"] > 0
    reasons = []
    if figures["num_injected"] == 0:
        reasons.append("no request arrived after the warm-up")
    if status == "rejecting":
        why_not = "are turned away" if scenario.model_serving is not None else "can never run here"
        reasons.append(f"{figures['num_rejected']:,} of {figures['num_injected']:,} requests {why_not}")
    if status == "failed":
        how = "failed when a replica was down" if scenario.replication.faults else "were given up"
        reasons.append(f"{figures['num_failed']:,} of {figures['num_injected']:,} requests {how}")
    if queueing:
        reasons.append(f"requests wait {waiting_share:.0%} of the time" if closed else "more and more requests are there")
    if slow:
        reasons.append(f"{ideal_share:.0%} of the throughput that these users would get from an unloaded machine")
    if share is not None:
        reasons.append(f"{share:.1%} of requests meet the goals")
    if why is not None:
        reasons.append(why.text)
    fit, do_not_fit = ("fits", "does not fit") if scenario.load.title.startswith("1 user") else ("fit", "do not fit")
    text = f"{scenario.load.title} {fit if fits else do_not_fit}: {status}"
    text += f" ({'; '.join(reasons)})" if reasons else ""
    text += f". {'Next limit' if fits else 'Limit'}: {LIMIT_NAMES[binding]}."
    return Verdict(
        status=status,
        fits=fits,
        binding=binding,
        missed=None if why is None else why.text,
        text=text,
        next_command=_next_command(scenario, binding, runs, why, attain=attain, fits=fits),
    )


def _saturation(scenario: Scenario, figures: dict[str, Any], runs: list[Run], waits: "MeanWaits") -> tuple[bool, float | None]:
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
        if longest > min(deployment.scheduler.max_model_len for deployment in scenario.deployments):
            return "max_model_len"
        return "kv_memory" if scenario.model_serving is None else queue_blocker(runs) or "kv_memory"  # or the queue is full
    if queueing and waits.queued_s > waits.slowed_s and (blocker := queue_blocker(runs)) is not None:
        return blocker
    slots_only = queue_blocker(runs) == "max_num_seqs"  # memory that is reserved for every slot is always full
    if figures["kv"] and figures["kv"]["free"] + figures["kv"]["cached"] < NEARLY_FULL and not slots_only:
        return "kv_memory"
    max_num_seqs = scenario.deployment.scheduler.max_num_seqs * scenario.replication.num_replicas
    if figures["running_max"] > (1 - NEARLY_FULL) * max_num_seqs:
        return "max_num_seqs"
    memory_s, compute_s, *_ = np.sum([run.recorder.integrals.cost_s for run in runs], axis=0).tolist()
    return step_limit(memory_s, compute_s)


def _next_command(
    scenario: Scenario, binding: Binding, runs: list[Run], why: MissedGoal | None, *, attain: float, fits: bool
) -> str:
    """Return the command to try next: more load if this one fits, else the nearest remedy that would start, else less load.

    Less load does not help prompts that miss a goal all by themselves: a faster format does, or a goal that they can keep.
    """
    config, load = scenario.config, scenario.config.load
    remedies: list[dict[str, Any]] = []
    if not fits:
        if binding == "max_model_len":
            needed = max(int((run.log.prompt_tokens + run.log.output_tokens).max(initial=1)) for run in runs)
            remedies = [{"max_model_len": needed}, {"over_length": "drop"}]
        elif binding == "kv_memory":
            remedies = [_more_kv(scenario)]
        elif binding == "bandwidth" and (narrower := _narrower_format(scenario)):
            remedies = [{"quantization": narrower}]
        elif binding == "max_num_seqs":
            remedies = [{"max_num_seqs": 2 * scenario.deployment.scheduler.max_num_seqs}]
        elif binding == "model_loads" and (lower := lower_context(scenario.deployment.scheduler.max_model_len)):
            remedies = [{"ctx_size": lower}]
    more = 2.0 if fits else 0.5
    if why is not None and (why.prompts_alone_miss or load.users == 1):
        remedies += [{"quantization": faster} for faster in _faster_formats(scenario)]
        remedies.append({"goodput": _goals_within_reach(scenario, runs, attain)})
    elif load.users is not None:
        remedies.append({"users": max(1, round(load.users * more))})
    elif load.workload is not None:
        remedies += [{"quantization": faster} for faster in _faster_formats(scenario)]
        remedies.append({"repeats": config.measurement.repeats + 4})
    elif load.request_rate is not None:
        remedies.append({"request_rate": load.request_rate * more})
    else:
        remedies.append({"trace_rate": (load.trace_rate or 1.0) * more})
    return command_line(config, **next(remedy for remedy in remedies if _starts(config, remedy) or remedy is remedies[-1]))


def _starts(config: SimulationConfig, remedy: dict[str, Any]) -> bool:
    try:
        resolve(changed(config, **remedy))
    except ConfigError:
        return False
    return changed(config, **remedy) != config


def _more_kv(scenario: Scenario) -> dict[str, Any]:
    serving = scenario.config.serving
    if serving.num_gpu_blocks_override is not None:
        return {"num_gpu_blocks_override": 2 * serving.num_gpu_blocks_override}
    return {"kv_cache_dtype": "fp8"}


def _narrower_format(scenario: Scenario) -> str | None:
    bits = scenario.deployment.weight_format.bits_per_weight
    return "fp8" if bits > 8 else "nvfp4" if bits > 4.5 and "fp4" in scenario.deployment.hardware.reached_flops else None


def _faster_formats(scenario: Scenario) -> list[str]:
    hardware, current = scenario.deployment.hardware, scenario.deployment.weight_format
    narrower = _narrower_format(scenario)
    faster = narrower and hardware.effective_flops(load_weight_format(narrower)) > hardware.effective_flops(current)
    return [narrower] if narrower and faster else []


def _goals_within_reach(scenario: Scenario, runs: list[Run], attain: float) -> tuple[str, ...]:
    """Return the goals with each limit that is missed raised to what the wanted share would keep, rounded up."""
    texts = []
    for term in terms(runs, scenario.goals, attain=attain):
        limit_s = term.limit_s if term.reached_s is None else max(term.limit_s, term.reached_s)
        raised_ms = f"{math.ceil(1e3 * limit_s):d}" if limit_s > term.limit_s else f"{1e3 * limit_s:g}"
        texts.append(f"{term.metric}:{raised_ms}")
    return tuple(texts)
