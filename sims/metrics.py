"""From what a run recorded to the figures that are reported. docs/metrics.md states each as a formula."""

from typing import Any

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.sims.fleet_record import fleet_record
from pagedkv.sims.goodput import Goal
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.lower_bounds import raisable
from pagedkv.sims.model_figures import model_rows
from pagedkv.sims.model_record import any_waits_s
from pagedkv.sims.recording import ITL_BIN_RATIO, ITL_SMALLEST_S, KV_KINDS, RUNNING, WAITING
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.run_record import RunRecord
from pagedkv.sims.simulation import Run
from pagedkv.sims.statistics import summarize, summarize_bins
from pagedkv.sims.utilization import machine_shares


def kv_shares(gauge_integral: Float64Array, observed_s: float, usable_slots: int) -> dict[str, float] | None:
    """Return the time-weighted shares of the pool by kind, which sum to 1; None if nothing was observed."""
    if observed_s <= 0 or usable_slots == 0:
        return None
    shares = gauge_integral[: len(KV_KINDS)] / (observed_s * usable_slots)
    return {kind: float(share) for kind, share in zip(KV_KINDS, shares, strict=True)}


def _prefix_figures(recorder: RunRecord) -> dict[str, Any]:
    """Return what the prefix cache did; vLLM keeps resumed requests apart in the same way."""
    if not recorder.caches_prefixes:
        return dict.fromkeys(("num_queried_tokens", "num_hit_tokens", "prefix_hit_rate", "resumed_hit_rate"))
    (queried, hits), (resumed, found_again) = recorder.prefix_tokens, recorder.resumed_tokens
    return {
        "num_queried_tokens": queried,
        "num_hit_tokens": hits,
        "prefix_hit_rate": hits / queried if queried else None,
        "resumed_hit_rate": found_again / resumed if resumed else None,
    }


def _tier_figures(recorder: RunRecord) -> dict[str, Any]:
    """Return what moved between the KV cache and a second tier; None where there is none."""
    loaded, offloaded = recorder.copied_tokens if recorder.offloads else (None, None)
    return {"num_loaded_tokens": loaded, "num_offloaded_tokens": offloaded}


def _tokens_received(record: RunRecord, log: RequestLog, warmup_s: float) -> int:
    """Return the output tokens of the window, less those of requests that failed: nobody has their answers."""
    failed = log.of(Outcome.FAILED)
    return max(record.num_output_tokens - failed.output_tokens_since(warmup_s), 0) if len(failed) else record.num_output_tokens


def _draft_figures(recorder: RunRecord) -> dict[str, Any]:
    """Return what became of the drafts; None where there were none."""
    drafted, accepted = recorder.draft_tokens
    return {
        "num_draft_tokens": drafted or None,
        "num_accepted_tokens": accepted if drafted else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
    }


def _replica_row(run: Run, index: int) -> dict[str, Any]:
    """Return what one replica did: measured requests that were sent there, and its processes while they were up."""
    replica = run.replicas[index]
    everyone, record = replica.log(), fleet_record(replica.recorders, warmup_s=run.warmup_s, end_s=run.end_s)
    log, window_s = everyone.where(everyone.arrival_s >= run.warmup_s), max(run.end_s - run.warmup_s, 0.0)
    sums = record.integrals
    return {
        "replica": index,
        "num_finished": len(log.of(Outcome.FINISHED)),
        "num_failed": len(log.of(Outcome.FAILED)),
        "output_tokens_per_s": _tokens_received(record, everyone, run.warmup_s) / window_s if window_s else None,
        "kv": kv_shares(sums.gauges, float(sums.observed_s[0]), run.allocator.usable_slots),
        "prefix_hit_rate": _prefix_figures(record)["prefix_hit_rate"],
        "up_s": float(sum(recorder.integrals.observed_s[0] for recorder in replica.recorders)),
    }


def _class_row(run: Run, index: int, goals: tuple[Goal, ...]) -> dict[str, Any]:
    """Return how the measured requests of one class of users fared."""
    log = run.measured.where(run.measured.user_class == index)
    served = log.where((log.outcome != Outcome.REJECTED) & (log.outcome != Outcome.FAILED))
    latencies = Latencies.of(served, run.end_s)
    finished = served.outcome == Outcome.FINISHED
    looked_up = log.where(~np.isnan(log.scheduled_s))
    queried = int(looked_up.prompt_tokens.sum()) if run.recorder.caches_prefixes else 0
    return {
        "name": run.class_names[index],
        "num_injected": len(log),
        **{f"num_{outcome.name.lower()}": len(log.of(outcome)) for outcome in Outcome},
        "ttft_s": summarize(latencies.ttft_s),
        "tpot_s": summarize(latencies.tpot_s[~np.isnan(latencies.tpot_s)]),
        "e2e_s": summarize(latencies.e2e_s),
        "goodput_share": int((latencies.meet(goals) & finished).sum()) / len(log) if goals and len(log) else None,
        "prefix_hit_rate": int(looked_up.num_cached_tokens.sum()) / queried if queried else None,
    }


def measure(run: Run, goals: tuple[Goal, ...]) -> dict[str, Any]:
    """Return the figures of one run, by the names of the result schema."""
    recorder, sums, log = run.recorder, run.recorder.integrals, run.measured
    window_s = max(run.end_s - run.warmup_s, 0.0)
    accepted = log.where(log.outcome != Outcome.REJECTED)
    served = accepted.where(accepted.outcome != Outcome.FAILED)
    latencies = Latencies.of(served, run.end_s)
    finished = served.outcome == Outcome.FINISHED
    num_good = int((latencies.meet(goals) & finished).sum())
    observed_s, waiting_s = sums.observed_s.tolist()
    waiting_share = waiting_s / observed_s if observed_s else None
    if run.server is not None and window_s:  # whoever waits for a model waits in none of the recorded processes
        waiting_share = max(waiting_share or 0.0, any_waits_s(run.server.waits_s, run.warmup_s, run.end_s) / window_s)
    usable = run.allocator.usable_slots
    figures: dict[str, Any] = {
        "num_injected": len(log),
        "num_finished": int(finished.sum()),
        "num_rejected": len(log.of(Outcome.REJECTED)),
        "num_failed": len(log.of(Outcome.FAILED)),
        "num_unfinished": int((~finished).sum()),
        "error_rate": (len(log) - len(served)) / len(log) if len(log) else None,
        "num_preemptions": recorder.num_preemptions,
        **_prefix_figures(recorder),
        **_tier_figures(recorder),
        **_draft_figures(recorder),
        "running_mean": sums.gauges[RUNNING] / observed_s if observed_s else None,
        "running_max": recorder.running_max,
        "waiting_mean": sums.gauges[WAITING] / observed_s if observed_s else None,
        "waiting_time_share": waiting_share,
        "kv": kv_shares(sums.gauges, observed_s, usable),
        "kv_when_waiting": kv_shares(sums.gauges_when_waiting, waiting_s, usable),
        **machine_shares(sums, of_one_s=None if run.server is None else window_s),
        "ttft_s": summarize(latencies.ttft_s),
        "tpot_s": summarize(latencies.tpot_s[~np.isnan(latencies.tpot_s)]),
        "itl_s": summarize_bins(sums.itl_bins, total=float(sums.itl_sum_s[0]), smallest=ITL_SMALLEST_S, ratio=ITL_BIN_RATIO),
        "e2e_s": summarize(latencies.e2e_s),
        "lower_bounds": [
            *(f"ttft_s.p{p}" for p in raisable(latencies.ttft_s, ~np.isnan(served.first_token_s))),
            *(f"e2e_s.p{p}" for p in raisable(latencies.e2e_s, finished)),
        ],
        "output_tokens_per_s": _tokens_received(recorder, run.log, run.warmup_s) / window_s if window_s else None,
        "request_throughput_per_s": recorder.num_completed / window_s if window_s else None,
        "goodput_per_s": num_good / window_s if goals and window_s else None,
        "goodput_share": num_good / len(log) if goals and len(log) else None,
        "iterations": recorder.iterations,
        "request_steps": recorder.request_steps,
        "simulated_s": run.end_s,
    }
    if run.replicas:
        figures |= {"num_replicas": len(run.replicas), "replicas": [_replica_row(run, i) for i in range(len(run.replicas))]}
    if run.server is not None:
        figures["models"] = model_rows(run, run.server, goals)
    if len(run.class_names) > 1:
        figures["classes"] = [_class_row(run, i, goals) for i in range(len(run.class_names))]
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in figures.items()}
