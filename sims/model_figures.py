"""What became of each of several models: its requests, its loads, and what it took of the machine."""

from typing import Any

import numpy as np

from pagedkv.sims.goodput import Goal
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.model_server import ModelServer
from pagedkv.sims.records import Outcome
from pagedkv.sims.simulation import Run
from pagedkv.sims.statistics import summarize


def model_rows(run: Run, server: ModelServer, goals: tuple[Goal, ...]) -> list[dict[str, Any]]:
    """Return a row per model, in the order of the server's: its measured requests, and its loads over the whole run."""
    return [_row(run, server, index, goals) for index in range(len(server.models))]


def _row(run: Run, server: ModelServer, index: int, goals: tuple[Goal, ...]) -> dict[str, Any]:
    log = run.measured.where(run.measured.model == index)
    served = log.where((log.outcome != Outcome.REJECTED) & (log.outcome != Outcome.FAILED))
    latencies = Latencies.of(served, run.end_s)
    finished = served.outcome == Outcome.FINISHED
    loads = [load for load in server.loads if load.model == index]
    ready = [load for load in loads if load.ready_s is not None]
    window_s = max(run.end_s - run.warmup_s, 0.0)
    byte_s = sum(load.held_bytes * load.held_s(run.warmup_s, run.end_s) for load in loads)
    return {
        "model": server.models[index].name,
        "num_injected": len(log),
        **{f"num_{outcome.name.lower()}": len(log.of(outcome)) for outcome in Outcome},
        "ttft_s": summarize(latencies.ttft_s),
        "tpot_s": summarize(latencies.tpot_s[~np.isnan(latencies.tpot_s)]),
        "e2e_s": summarize(latencies.e2e_s),
        "goodput_share": int((latencies.meet(goals) & finished).sum()) / len(log) if goals and len(log) else None,
        "num_loads": len(ready),
        "num_failed_loads": sum(load.why_ended == "out of memory" for load in loads),
        "load_s": sum((load.ready_s or load.start_s) - load.start_s for load in ready),
        "num_unloads_for_room": sum(load.why_ended == "room" for load in ready),
        "num_unloads_for_keep_alive": sum(load.why_ended == "keep-alive" for load in ready),
        "loaded_share": sum(load.held_s(run.warmup_s, run.end_s) for load in ready) / window_s if window_s else None,
        "held_bytes": max((load.held_bytes for load in ready), default=None),
        "held_bytes_mean": byte_s / window_s if window_s else None,
        "context": max((load.context for load in ready), default=None),
    }
