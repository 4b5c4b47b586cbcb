"""Why goals are missed: the goal that most requests miss, the part of their time that takes the most, and the limit behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pagedkv.arrays import BoolArray
from pagedkv.sims.attainment import attained
from pagedkv.sims.goodput import Goal
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.limits import Binding, queue_blocker, step_limit
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run

Cause = Literal["waiting", "prefill", "decoding", "preemption"]
CAUSES: dict[Cause, str] = {
    "waiting": "requests wait in the queue",
    "prefill": "their prompts take that long",
    "decoding": "steps take that long",
    "preemption": "requests are preempted",
}
_SAMPLED_PROMPTS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class MissedGoal:
    """The goal that the fewest requests keep, and why."""

    goal: Goal
    cause: Cause
    binding: Binding
    prompts_alone_miss: bool
    """Whether most of the requests that miss a TTFT goal would miss it with the machine to themselves."""

    @property
    def text(self) -> str:
        """Both, in words."""
        return f"{self.goal.metric} is missed most, because {CAUSES[self.cause]}"


def missed_goal(scenario: Scenario, runs: Sequence[Run]) -> MissedGoal | None:
    """Return what explains the goal that is missed most; None if no accepted request misses one.

    TTFT is waiting and prefill, TPOT is decoding, E2E is all three: the largest, summed over the requests that miss the goal, is
    the cause. A request that arrives during a step waits for its end: up to the length of a full step that counts as prefill,
    since no queue explains it. Waiting is explained by what blocks the queue, prefill by what binds these requests' own prompts,
    and decoding by what binds steps; either of the last two by preemption, if that is what those who miss have in common.
    """
    shares = {goal: share for goal in scenario.goals if (share := attained(runs, (goal,))) is not None}
    goal = min(shares, key=shares.__getitem__, default=None)
    if goal is None or shares[goal] == 1.0:
        return None
    sets = [_accepted(run, goal) for run in runs]
    missing = [(log.where(misses), run) for (log, misses), run in zip(sets, runs, strict=True)]
    if not any(len(log) for log, _ in missing):
        return None
    alone_s, memory_s, compute_s, number = _own_prefill(scenario, [log for log, _ in missing])
    alone = goal.metric == "ttft" and alone_s > goal.limit_s * number
    cause, binding = _largest_part(scenario, goal, missing), queue_blocker(runs)
    if cause == "waiting" and binding is not None:
        return MissedGoal(goal=goal, cause=cause, binding=binding, prompts_alone_miss=alone)
    if _preemption_explains(sets):
        return MissedGoal(goal=goal, cause="preemption", binding="kv_memory", prompts_alone_miss=alone)
    if cause == "decoding":
        memory_s, compute_s, *_ = np.sum([run.recorder.integrals.cost_s for run in runs], axis=0).tolist()
    else:
        cause = "prefill"
    return MissedGoal(goal=goal, cause=cause, binding=step_limit(memory_s, compute_s), prompts_alone_miss=alone)


def _accepted(run: Run, goal: Goal) -> tuple[RequestLog, BoolArray]:
    """Return the measured requests that were not refused, and which of them miss `goal`."""
    log = run.measured
    log = log.where((log.outcome == Outcome.FINISHED) | (log.outcome == Outcome.UNFINISHED))
    return log, ~Latencies.of(log, run.end_s).meet((goal,))


def _largest_part(scenario: Scenario, goal: Goal, missing: list[tuple[RequestLog, Run]]) -> Cause:
    budget = scenario.deployment.scheduler.max_num_batched_tokens
    full_step_s = scenario.deployment.step_time.prefill_cost(budget, max_num_batched_tokens=budget).total_s
    parts_s: dict[Cause, float] = {"waiting": 0.0, "prefill": 0.0, "decoding": 0.0}
    for log, run in missing:
        latencies = Latencies.of(log, run.end_s)
        waited_s = np.where(np.isnan(log.scheduled_s), run.end_s, log.scheduled_s) - log.arrival_s
        queued_s = np.maximum(waited_s - full_step_s, 0.0)
        parts_s["waiting"] += float(queued_s.sum())
        parts_s["prefill"] += float((latencies.ttft_s - queued_s).sum())
        parts_s["decoding"] += float((latencies.e2e_s - latencies.ttft_s).sum())
    within: dict[str, tuple[Cause, ...]] = {"ttft": ("waiting", "prefill"), "tpot": ("decoding",), "e2el": tuple(parts_s)}
    return max(within[goal.metric], key=parts_s.__getitem__)


def _own_prefill(scenario: Scenario, logs: list[RequestLog]) -> tuple[float, float, float, int]:
    """Return seconds that the prompts of `logs` take by themselves, in all, bound by memory and by arithmetic; and their number.

    What they found in a prefix cache counts as nothing. Of many, evenly spaced ones stand for all.
    """
    prompts = np.concatenate([np.column_stack((log.prompt_tokens, log.num_cached_tokens)) for log in logs])
    prompts = prompts[np.unique(np.linspace(0, len(prompts) - 1, min(_SAMPLED_PROMPTS, len(prompts))).astype(int))]
    budget, prefill_cost = scenario.deployment.scheduler.max_num_batched_tokens, scenario.deployment.step_time.prefill_cost
    costs = [prefill_cost(tokens, num_cached_tokens=cached, max_num_batched_tokens=budget) for tokens, cached in prompts.tolist()]
    return sum(c.total_s for c in costs), sum(c.memory_s for c in costs), sum(c.compute_s for c in costs), len(costs)


def _preemption_explains(sets: list[tuple[RequestLog, BoolArray]]) -> bool:
    """Return whether most requests that miss were preempted, and those that were not miss less than half as often."""
    preempted = np.concatenate([log.num_preemptions > 0 for log, _ in sets])
    misses = np.concatenate([each for _, each in sets])
    if not preempted.any() or preempted[misses].mean() <= 0.5:
        return False
    return bool(preempted.all() or misses[~preempted].mean() < misses[preempted].mean() / 2)
