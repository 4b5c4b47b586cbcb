"""What each figure of report.html says, in a sentence or two with its main numbers: for those who do not see it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pagedkv.sims.budget_parts import PARTS
from pagedkv.sims.memory_panel import Frame
from pagedkv.sims.recording import CACHED, FREE, WAITING
from pagedkv.sims.results import Results
from pagedkv.snapshot import UnitState
from pagedkv.units import GIB


def budget_words(document: dict[str, Any]) -> str:
    """Return the memory ledger in words."""
    budget = document["budget"]
    parts = ", ".join(f"{title} {budget[name] / GIB:,.2f} GiB" for name, title in PARTS.items() if budget[name])
    share = budget["kv_cache"] / budget["visible"]
    return f"Of {budget['visible'] / GIB:,.2f} GiB of visible memory: {parts}. The KV cache is {share:.0%} of it."


def kinds_words(results: Results) -> str:
    """Return how full the KV memory was, and with what, by allocator."""
    texts = []
    for name, result in results.by_allocator.items():
        shares, run = result.figures["kv"], result.runs[0]
        if not shares:
            texts.append(f"{name}: nothing was measured.")
            continue
        listed = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items() if share >= 0.0005)
        starts_s, _, means = run.recorder.timeline.means()
        taken = 1 - (means[:, FREE] + means[:, CACHED]) / run.allocator.usable_slots
        fullest = int(np.argmax(taken))
        peak = (
            f" At its fullest, around {starts_s[fullest]:,.0f} s, {taken[fullest]:.1%} is taken."
            if taken.size and taken[fullest] > 0
            else ""
        )
        texts.append(f"{name}, mean over the measured time: {listed}.{peak}")
    return " ".join(texts)


def fullest(frames: Sequence[Frame]) -> int:
    """Return the place of the moment at which the most blocks are held."""
    return int(np.argmax([int((frame.snapshot.states == UnitState.HELD).sum()) for frame in frames]))


def map_words(name: str, frames: Sequence[Frame]) -> str:
    """Return what a memory map shows at its fullest moment."""
    at = frames[fullest(frames)]
    one = at.snapshot
    counts = {state: int((one.states == state).sum()) for state in UnitState}
    holders = "1 request" if len(one.requests) == 1 else f"{len(one.requests):,} requests"
    shared = int((one.ref_counts > 1).sum())
    return (
        f"{name}: {len(frames)} moments from {frames[0].label} to {frames[-1].label}. At the fullest of them, {at.label}, "
        f"{counts[UnitState.HELD]:,} of {one.states.size:,} blocks are held by {holders}"
        + (f" ({shared:,} of them by more than one)" if shared else "")
        + f", {counts[UnitState.CACHED]:,} are cached and {counts[UnitState.FREE]:,} are empty."
    )


def occupancy_words(results: Results) -> str:
    """Return how many ran and waited, and when requests were preempted, by allocator."""
    texts = []
    for name, result in results.by_allocator.items():
        figures, timeline = result.figures, result.runs[0].recorder.timeline
        starts_s, _, means = timeline.means()
        if figures["running_mean"] is None or not starts_s.size:
            texts.append(f"{name}: nothing was measured.")
            continue
        most = int(np.argmax(means[:, WAITING]))
        waiting = f"{figures['waiting_mean']:,.1f} wait"
        if means[most, WAITING] > 0:
            waiting += f" (most around {starts_s[most]:,.0f} s: {means[most, WAITING]:,.1f})"
        at_s, _ = timeline.preemptions_over_time()
        preempted = "no preemptions"
        if at_s.size:
            measured = f"{figures['num_preemptions']:,} in the measured time"
            preempted = f"preemptions from {at_s[0]:,.0f} s to {at_s[-1]:,.0f} s, {measured}"
        at_once = f"{figures['running_mean']:,.1f} requests run at once on average, {figures['running_max']:,} at most"
        texts.append(f"{name}: {at_once}; {waiting}; {preempted}.")
    return " ".join(texts)


def latency_words(results: Results, field: str, title: str, metric: str) -> str:
    """Return percentiles of a latency, and the share of requests within its goal, by allocator."""
    goals = {goal.metric: goal.limit_s for goal in results.scenario.goals}
    texts = []
    for name, result in results.by_allocator.items():
        latency = result.figures[field]
        if latency is None:
            texts.append(f"{name}: no request had one.")
            continue
        at_least = {p for p in ("p50", "p90", "p99") if f"{field}.{p}" in result.figures["lower_bounds"]}
        listed = ", ".join(f"{p.upper()} {'at least ' if p in at_least else ''}{latency[p]:.3g} s" for p in ("p50", "p90", "p99"))
        texts.append(f"{name}: {listed}.")
    goal = f" The goal is {goals[metric]:g} s." if metric in goals else ""
    return f"{title}. {' '.join(texts)}{goal}"
