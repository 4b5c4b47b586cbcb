"""The limits that a load runs into, and which of them holds up a queue."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pagedkv.scheduling.step import Blocker
from pagedkv.sims.engine_flags import ENGINE_FLAGS
from pagedkv.sims.load import OpenLoop, TraceReplay
from pagedkv.sims.model_record import any_waits_s
from pagedkv.sims.recording import BLOCKERS
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run

Binding = Literal["kv_memory", "ctx_size", "bandwidth", "prefill_compute", "max_num_seqs", "max_model_len", "model_loads"]

LIMIT_NAMES: dict[Binding, str] = {
    "kv_memory": "KV memory",
    "ctx_size": "cells of the KV cache (--ctx-size)",
    "bandwidth": "memory bandwidth",
    "prefill_compute": "prefill compute",
    "max_num_seqs": "max-num-seqs",
    "max_model_len": "max-model-len",
    "model_loads": "models that take turns in memory",
}
_OF_BLOCKER: dict[Blocker, Binding] = {
    Blocker.KV_MEMORY: "kv_memory",
    Blocker.MAX_NUM_SEQS: "max_num_seqs",
    Blocker.TOKEN_BUDGET: "prefill_compute",  # steps are full of prompts
}


def queue_blocker(runs: Sequence[Run]) -> Binding | None:
    """Return what held up the head of the queue for the longest time; None if nothing ever did."""
    blocked_s: dict[Binding, float] = {}
    for run in runs:
        for blocker, seconds in zip(BLOCKERS, run.recorder.integrals.blocked_s.tolist(), strict=True):
            if blocker in _OF_BLOCKER and seconds > 0:
                blocked_s[_OF_BLOCKER[blocker]] = blocked_s.get(_OF_BLOCKER[blocker], 0.0) + seconds
        if run.server is not None and run.server.waits_s:
            seconds = any_waits_s(run.server.waits_s, run.warmup_s, run.end_s)
            blocked_s["model_loads"] = blocked_s.get("model_loads", 0.0) + seconds
    return max(blocked_s, key=blocked_s.__getitem__, default=None)


def step_limit(memory_s: float, compute_s: float) -> Binding:
    """Return what binds steps that spend so many seconds on each."""
    return "bandwidth" if memory_s >= compute_s else "prefill_compute"


def memory_limit(scenario: Scenario) -> Binding:
    """Return what a full KV cache is limited by: the memory, or, where an engine is told its size, that setting."""
    return "ctx_size" if scenario.deployment.engine.name in ENGINE_FLAGS["ctx_size"] else "kv_memory"


def limit_words(scenario: Scenario, binding: Binding) -> str:
    """Return what a reader of this engine's settings calls `binding`."""
    slots = binding == "max_num_seqs" and scenario.deployment.engine.name in ENGINE_FLAGS["parallel"]
    return "server slots (--parallel)" if slots else LIMIT_NAMES[binding]


def held_back_to(scenario: Scenario, runs: list[Run]) -> float | None:
    """Return the requests per second that a client sends of which most wait for answers to others; None if most do not.

    Such a client may have only so many under way (`max_concurrency`). Requests all sent at once are sent at no rate.
    """
    load = scenario.load
    if not isinstance(load, OpenLoop | TraceReplay) or load.max_concurrency is None:
        return None
    if any(len(run.log) == 0 or np.ptp(run.log.arrival_s) == 0 for run in runs):
        return None
    at_limit, per_s = [], []
    for run in runs:
        sent_s = run.log.arrival_s
        ended_s = np.sort(np.nan_to_num(run.log.last_token_s, nan=np.inf))
        under_way = np.arange(1, sent_s.size + 1) - np.searchsorted(ended_s, sent_s, side="right")
        at_limit.append(np.mean(under_way >= load.max_concurrency))
        per_s.append((sent_s.size - 1) / np.ptp(sent_s))
    return float(np.mean(per_s)) if np.mean(at_limit) > 1 / 2 else None
