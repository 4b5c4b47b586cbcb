"""/metrics: what vLLM's server tells, counted as it happens, in constant memory. docs/metrics.md explains each.

Names, meanings, kinds and bucket bounds are those of `pagedkv.sims.vllm_metrics`, which makes the same of a run that is over.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.sims.exposition import Family, Histogram, Labels, Value, exposition
from pagedkv.sims.serve.served_engine import ABORT, ERROR, Admission, StepReport
from pagedkv.sims.vllm_metrics import (
    FINISHED_REASONS,
    MEANINGS,
    REQUEST_BOUNDS_S,
    TOKEN_BOUNDS_S,
    TTFT_BOUNDS_S,
    length_bounds,
)

if TYPE_CHECKING:
    from pagedkv.sims.serve.serve_loop import Answer


class _Buckets:
    """A histogram that grows."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._total = bounds, np.zeros(len(bounds) + 1, np.int64), 0.0

    def observe(self, value: float) -> None:
        self._counts[np.searchsorted(self._bounds, value, side="left")] += 1
        self._total += value

    def histogram(self) -> Histogram:
        return Histogram(bounds=self._bounds, counts=self._counts.copy(), total=self._total)


class LiveMetrics:
    """Counts what a server does. A request counts in the histograms of finished ones only if it came to its own end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._counters = dict.fromkeys(
            (
                *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
                *("prompt_tokens_total", "generation_tokens_total"),
            ),
            0,
        )
        self._ended = dict.fromkeys(FINISHED_REASONS, 0)
        requests = (
            *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
            *("request_decode_time_seconds", "request_inference_time_seconds"),
        )
        lengths = length_bounds(scheduler.settings.max_model_len)
        self._histograms = {
            "time_to_first_token_seconds": _Buckets(TTFT_BOUNDS_S),
            "inter_token_latency_seconds": _Buckets(TOKEN_BOUNDS_S),
            "request_time_per_output_token_seconds": _Buckets(TOKEN_BOUNDS_S),
            **{name: _Buckets(REQUEST_BOUNDS_S) for name in requests},
            "request_prompt_tokens": _Buckets(lengths),
            "request_generation_tokens": _Buckets(lengths),
        }

    def admitted(self, admission: Admission) -> None:
        """Count the look-up of a request that is started for the first time."""
        if self._scheduler.caches_prefixes:
            self._counters["prefix_cache_queries_total"] += admission.num_known_tokens
            self._counters["prefix_cache_hits_total"] += admission.num_hit_tokens

    def stepped(self, report: StepReport) -> None:
        """Count what the step did to the batch."""
        self._counters["num_preemptions_total"] += report.num_preempted

    def tokens(self, answer: "Answer", number: int, now_s: float) -> None:
        """Count new tokens, before the answer knows of them."""
        self._counters["generation_tokens_total"] += number
        if answer.last_token_s is None:
            if answer.place == 0:  # further answers of the same request have not computed it again
                self._counters["prompt_tokens_total"] += len(answer.ask.prompt)
            self._histograms["time_to_first_token_seconds"].observe(now_s - answer.arrived_s)
        else:
            self._histograms["inter_token_latency_seconds"].observe(now_s - answer.last_token_s)

    def finished(self, answer: "Answer", reason: str) -> None:
        """Count an answer that is over."""
        self._ended[reason] += 1
        scheduled_s, first_s, last_s = answer.scheduled_s, answer.first_token_s, answer.last_token_s
        if reason in (ABORT, ERROR) or scheduled_s is None or first_s is None or last_s is None:
            return
        observed = {
            "request_time_per_output_token_seconds": (last_s - first_s) / max(answer.num_tokens - 1, 1),
            "e2e_request_latency_seconds": last_s - answer.arrived_s,
            "request_queue_time_seconds": scheduled_s - answer.arrived_s,
            "request_prefill_time_seconds": first_s - scheduled_s,
            "request_decode_time_seconds": last_s - first_s,
            "request_inference_time_seconds": last_s - scheduled_s,
            "request_prompt_tokens": len(answer.ask.prompt),
            "request_generation_tokens": answer.num_tokens,
        }
        for name, value in observed.items():
            self._histograms[name].observe(value)

    def text(self, model_name: str, *, num_waiting: int) -> str:
        """Return the answer to a scrape."""
        scheduler, labels = self._scheduler, {"model_name": model_name, "engine": "0"}
        allocator = scheduler.allocator
        values: dict[str, Value] = {
            "num_requests_running": scheduler.num_running,
            "num_requests_waiting": num_waiting,
            "kv_cache_usage_perc": 1.0 - allocator.free_slots / allocator.usable_slots,
            **self._counters,
            **{name: buckets.histogram() for name, buckets in self._histograms.items()},
        }
        ended: list[tuple[Labels, Value]] = [({**labels, "finished_reason": why}, number) for why, number in self._ended.items()]
        families = [
            Family(
                name=f"vllm:{name}",
                kind=kind,
                help=meaning,
                samples=ended if name == "request_success_total" else [(labels, values[name])],
            )
            for name, (kind, meaning) in MEANINGS.items()
        ]
        return exposition(families)
