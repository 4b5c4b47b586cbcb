"""What the figures mean: does the load fit, what binds first, and what to try next."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pagedkv.sims.attainment import attained, share_words
from pagedkv.sims.closed_loop import people
from pagedkv.sims.command import command_line
from pagedkv.sims.config import ATTAIN
from pagedkv.sims.limits import Binding, held_back_to, limit_words, memory_limit, queue_blocker, step_limit
from pagedkv.sims.mean_waits import MeanWaits
from pagedkv.sims.missed_goal import missed_goal
from pagedkv.sims.next_command import next_settings
from pagedkv.sims.records import Outcome
from pagedkv.sims.saturation import THROUGHPUT_SHARE_LIMIT, saturation
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run
from pagedkv.sims.unmeasured import unmeasured

Status = Literal["stable", "saturated", "rejecting", "failed", "unmeasured"]

_FITTING = {"saturated": "within the goals, slower than alone", "failed": "within the goals, though some failed"}
NEARLY_FULL = 0.1
"""With less than this share of the KV pool or of the running batch free, it is the nearest limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of one allocator under one load."""

    status: Status
    fits: bool
    """With goals: they are met, nobody is turned away, and an open loop's queue does not rise. Without: stable."""
    binding: Binding | None
    """The limit that is reached, or would be reached first; None if nothing was measured."""
    attained: float | None
    """Share of the requests whose fate is known that meet the goals; None without goals, or if none is known."""
    missed: str | None
    """Which goal is missed most, and why; None if the goals are met, or for want of goals."""
    text: str
    """Both, in words."""
    next_command: str
    """What to try next."""
    next_settings: Mapping[str, Any]
    """What that changes, by field name."""


def judge(scenario: Scenario, figures: dict[str, Any], runs: list[Run], *, attain: float = ATTAIN) -> Verdict:
    """Judge one allocator from its figures, combined over repeats, and its runs; `attain` is the share that must meet the goals."""
    waits = MeanWaits.of(scenario, runs)
    waiting_share = figures["waiting_time_share"] or 0.0
    closed = people(scenario.load, runs) is not None
    queueing, ideal_share = saturation(scenario, figures, runs, waits)
    rising = queueing and not closed
    slow = ideal_share is not None and ideal_share < THROUGHPUT_SHARE_LIMIT
    status: Status = "stable"
    if figures["num_failed"]:
        status = "failed"
    elif figures["num_rejected"]:
        status = "rejecting"
    elif slow or queueing:
        status = "saturated"
    elif figures["num_injected"] == 0:
        return _of_nothing(scenario, runs)
    share = attained(runs, scenario.goals) if scenario.goals else None
    missed = share is not None and share < attain
    why = missed_goal(scenario, runs) if missed and status != "rejecting" else None
    given_up = status == "failed" and not scenario.replication.faults and scenario.model_serving is None
    if given_up:  # an engine gives up nobody for another reason, and whatever else is amiss comes after it
        binding = memory_limit(scenario)
    else:
        rejecting = status == "rejecting"
        binding = why.binding if why else _binding(scenario, figures, runs, waits, rejecting=rejecting, queueing=queueing)
    tolerated = status in ("stable", "saturated") or (status == "failed" and bool(scenario.replication.faults))  # those are misses
    served = status == "stable" if share is None else tolerated and not missed and not rising
    fits = served and figures["num_injected"] > 0
    reasons = [*_troubles(scenario, figures, status, given_up=given_up)]
    if queueing:
        reasons.append(_waiting(scenario, runs, waiting_share) if closed else "more and more requests are there")
    if slow:
        reasons.append(f"{ideal_share:.0%} of the throughput that these users would get from an unloaded machine")
    if (sent_per_s := held_back_to(scenario, runs)) is not None:
        reasons.append(f"the client waits for answers, and sends {sent_per_s:.3g} requests/s")
    if share is not None:
        reasons.append(f"{share_words(share, attain)} of requests meet the goals")
    if why is not None:
        reasons.append(why.text)
    is_one = scenario.load.title.startswith(("1 user", "the 1 request"))
    fit, do_not_fit = ("fits", "does not fit") if is_one else ("fit", "do not fit")
    text = f"{scenario.load.title} {fit if fits else do_not_fit}: {state_words(status, fits=fits)}"
    text += f" ({'; '.join(reasons)})" if reasons else ""
    text += f". {'Next limit' if fits else 'Limit'}: {limit_words(scenario, binding)}."
    settings = next_settings(scenario, binding, runs, why, attain=attain, fits=fits)
    return Verdict(
        status=status,
        fits=fits,
        binding=binding,
        attained=share,
        missed=None if why is None else why.text,
        text=text,
        next_command=command_line(scenario.config, **settings),
        next_settings=settings,
    )


def state_words(status: str, *, fits: bool) -> str:
    """Return what a verdict calls a load: what fits without being stable does so because the goals allow for it."""
    return _FITTING.get(status, status) if fits else status


def _waiting(scenario: Scenario, runs: list[Run], share: float) -> str:
    """Return for how much of the time requests wait; if no goal minds, also for what."""
    if not scenario.goals or any(goal.metric in ("ttft", "e2el") for goal in scenario.goals):
        return f"requests wait {share:.0%} of the time"
    blocker = queue_blocker(runs)
    what = "" if blocker is None else f" for {limit_words(scenario, blocker)}"
    return f"requests wait{what} {share:.0%} of the time, which no goal looks at: add ttft"


def _troubles(scenario: Scenario, figures: dict[str, Any], status: Status, *, given_up: bool) -> Iterator[str]:
    """Yield what became of requests that were not served, if there are any; and that there are none at all."""
    if figures["num_injected"] == 0:
        yield "no request arrived after the warm-up"
    if status == "rejecting":
        why_not = "are turned away" if scenario.model_serving is not None else "can never run here"
        yield f"{figures['num_rejected']:,} of {figures['num_injected']:,} requests {why_not}"
    if status == "failed":
        how = "failed when a replica was down" if scenario.replication.faults else "were given up"
        how += " when the KV cache was full" if given_up else ""
        yield f"{figures['num_failed']:,} of {figures['num_injected']:,} requests {how}"


def _of_nothing(scenario: Scenario, runs: list[Run]) -> Verdict:
    """Return the verdict of runs in which no request counts and none waits: neither a limit nor advice about one."""
    why = unmeasured(scenario, runs)
    return Verdict(
        status="unmeasured",
        fits=False,
        binding=None,
        attained=None,
        missed=None,
        text=f"{scenario.load.title}: nothing was measured: {why.text}.",
        next_command=command_line(scenario.config, **why.remedy),
        next_settings=why.remedy,
    )


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
        return memory_limit(scenario)
    max_num_seqs = scenario.deployment.scheduler.max_num_seqs * scenario.replication.num_replicas
    if figures["running_max"] > (1 - NEARLY_FULL) * max_num_seqs:
        return "max_num_seqs"
    memory_s, compute_s, *_ = np.sum([run.recorder.integrals.cost_s for run in runs], axis=0).tolist()
    return step_limit(memory_s, compute_s)
