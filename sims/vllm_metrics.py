"""metrics.prom: a run as vLLM's /metrics would have shown it, one scrape at its end with all columns. docs/metrics.md explains it.

Source of names, labels, kinds and bucket bounds: vLLM, vllm/v1/metrics/loggers.py and stats.py, as of 2026. The older
`vllm:time_per_output_token_seconds` went in 0.13; its successors are here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.sims.columns import Column, columns
from pagedkv.sims.exposition import Family, Histogram, Labels, Value, exposition
from pagedkv.sims.recording import CACHED, FREE, ITL_BIN_RATIO, ITL_BINS, ITL_SMALLEST_S, KV_KINDS, RUNNING, WAITING, gap_bin
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.results import Results
from pagedkv.sims.simulation import Run

TTFT_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
"""vLLM's; a simulated request ends at the length that its load gives it, "length", or is given up, "error"."""


class _Scrape(NamedTuple):
    """What one run would have told, counted from the end of its warm-up on."""

    run: Run
    max_model_len: int
    started: RequestLog
    """Requests whose first token came within the window, whenever they arrived."""
    finished: RequestLog
    """Those whose last token did."""


def metrics_text(answers: Iterable[Results]) -> str:
    """Return metrics.prom for one answer, or for those of several engines."""
    shown = list(columns(answers))
    scrapes = [(_labels(column), _scrape(column)) for column in shown]

    def family(name: str, kind: str, meaning: str, value: Callable[[_Scrape], Value]) -> Family:
        return Family(name=f"vllm:{name}", kind=kind, help=meaning, samples=[(labels, value(s)) for labels, s in scrapes])  # type: ignore[arg-type]

    families = [
        *(family(name, "gauge", meaning, value) for name, meaning, value in _GAUGES),
        *(family(name, "counter", meaning, value) for name, meaning, value in _COUNTERS),
        _request_success(scrapes),
        *(family(name, "histogram", meaning, value) for name, meaning, value in _HISTOGRAMS),
    ]
    return exposition(families, comments=_comments(shown))


def _comments(shown: Sequence[Column]) -> list[str]:
    times = sorted({(column.run.warmup_s, column.run.end_s) for column in shown})
    return [
        "A simulated run, in the words of vLLM's /metrics: one scrape at the end of each run, counted from the end of its warm-up.",
        *(f"Simulated time: counted from {start_s:g} s, scraped at {end_s:g} s." for start_s, end_s in times),
        "Inter-token latencies are counted in bins 0.1 % wide, so one that close to a bucket's bound may count on its other side.",
    ]


def _labels(column: Column) -> Labels:
    model_name = column.scenario.model_name
    return {"model_name": model_name, "engine": column.engine, "allocator": column.allocator, "repeat": str(column.repeat)}


def _scrape(column: Column) -> _Scrape:
    run, log = column.run, column.run.log
    return _Scrape(
        run=run,
        max_model_len=column.scenario.deployment.scheduler.max_model_len,
        started=log.where(log.first_token_s >= run.warmup_s),
        finished=log.where((log.outcome == Outcome.FINISHED) & (log.last_token_s >= run.warmup_s)),
    )


def _kv_usage(scrape: _Scrape) -> float:
    """Return the share of slots in use. What is kept for reuse counts as free, as in vLLM."""
    slots = scrape.run.recorder.arrays.gauges[: len(KV_KINDS)]
    total = int(slots.sum())
    return 1.0 - float(slots[FREE] + slots[CACHED]) / total if total else 0.0


def _request_success(scrapes: list[tuple[Labels, _Scrape]]) -> Family:
    samples: list[tuple[Labels, Value]] = []
    for labels, scrape in scrapes:
        number = dict.fromkeys(FINISHED_REASONS, 0)
        number["length"], number["error"] = len(scrape.finished), len(scrape.run.measured.of(Outcome.FAILED))
        samples += [({**labels, "finished_reason": reason}, value) for reason, value in number.items()]
    meaning = f"{_ENDED} The length is the load's; error: measured requests that the engine gave up."
    return Family(name="vllm:request_success_total", kind="counter", help=meaning, samples=samples)


_ENDED = "Requests that ended, by reason."


def _inter_token_latency(scrape: _Scrape) -> Histogram:
    """Return the gaps by bucket, each bin of the record where its middle lies, and the sum without rounding.

    The record closes with a lower bound for each request that still generates; vLLM observes a gap once its token is there.
    """
    run, log = scrape.run, scrape.run.measured
    waits = log.where((log.outcome == Outcome.UNFINISHED) & (log.num_output_tokens > 0))
    open_gaps_s = run.end_s - waits.last_token_s
    bins, total_s = run.recorder.integrals.itl_bins.copy(), float(run.recorder.integrals.itl_sum_s[0] - open_gaps_s.sum())
    np.subtract.at(bins, [gap_bin(gap_s) for gap_s in open_gaps_s.tolist()], 1)
    middles_s = ITL_SMALLEST_S * ITL_BIN_RATIO ** (np.arange(ITL_BINS) + 0.5)
    counts = np.zeros(len(TOKEN_BOUNDS_S) + 1, np.int64)
    np.add.at(counts, np.searchsorted(TOKEN_BOUNDS_S, middles_s, side="left"), bins)
    return Histogram(bounds=TOKEN_BOUNDS_S, counts=counts, total=max(total_s, 0.0))


def _time_per_output_token(scrape: _Scrape) -> Histogram:
    """Return each finished request's mean gap; 0 for one of a single token, as vLLM has it."""
    log = scrape.finished
    mean_s = (log.last_token_s - log.first_token_s) / np.maximum(log.num_output_tokens - 1, 1)
    return Histogram.of(mean_s, TOKEN_BOUNDS_S)


def _of_finished(seconds: Callable[[RequestLog], Float64Array]) -> Callable[[_Scrape], Histogram]:
    return lambda scrape: Histogram.of(seconds(scrape.finished), REQUEST_BOUNDS_S)


def length_bounds(max_model_len: int) -> list[float]:
    """Return 1, 2, 5, 10, 20, 50 and so on, as far as `max_model_len`."""
    bounds = [mantissa * 10.0**exponent for exponent in range(len(str(max_model_len))) for mantissa in (1, 2, 5)]
    return [bound for bound in bounds if bound <= max_model_len]


def _lengths(scrape: _Scrape, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Histogram:
    return Histogram.of(tokens.astype(np.float64), length_bounds(scrape.max_model_len))


_GAUGES: tuple[tuple[str, str, Callable[[_Scrape], Value]], ...] = (
    ("num_requests_running", "Requests in the running batch.", lambda s: int(s.run.recorder.arrays.gauges[RUNNING])),
    (
        "num_requests_waiting",
        "Requests that the last scheduling decision left in the queue.",
        lambda s: int(s.run.recorder.arrays.gauges[WAITING]),
    ),
    ("kv_cache_usage_perc", "KV memory in use, from 0 to 1; blocks kept for reuse count as free.", _kv_usage),
)
_COUNTERS: tuple[tuple[str, str, Callable[[_Scrape], Value]], ...] = (
    (
        "prefix_cache_queries_total",
        "Tokens looked up in the prefix cache by requests admitted for the first time.",
        lambda s: s.run.recorder.prefix_tokens[0] if s.run.recorder.caches_prefixes else 0,
    ),
    (
        "prefix_cache_hits_total",
        "Tokens of those that were found.",
        lambda s: s.run.recorder.prefix_tokens[1] if s.run.recorder.caches_prefixes else 0,
    ),
    ("num_preemptions_total", "Running requests put back into the queue.", lambda s: s.run.recorder.num_preemptions),
    (
        "prompt_tokens_total",
        "Prompt tokens, cached ones included, of requests that got their first token.",
        lambda s: int(s.started.prompt_tokens.sum()),
    ),
    ("generation_tokens_total", "Output tokens.", lambda s: s.run.recorder.num_output_tokens),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[_Scrape], Value]], ...] = (
    (
        "time_to_first_token_seconds",
        "From arrival to the first output token.",
        lambda s: Histogram.of(s.started.first_token_s - s.started.arrival_s, TTFT_BOUNDS_S),
    ),
    (
        "inter_token_latency_seconds",
        "From an output token to the next, of requests that arrived after the warm-up.",
        _inter_token_latency,
    ),
    (
        "request_time_per_output_token_seconds",
        "Mean time per output token after the first, of each finished request.",
        _time_per_output_token,
    ),
    (
        "e2e_request_latency_seconds",
        "From arrival to the last output token, of finished requests.",
        _of_finished(lambda log: log.last_token_s - log.arrival_s),
    ),
    (
        "request_queue_time_seconds",
        "From arrival to the first step that computes any of it, of finished requests.",
        _of_finished(lambda log: log.scheduled_s - log.arrival_s),
    ),
    (
        "request_prefill_time_seconds",
        "From there to the first output token, preemptions included.",
        _of_finished(lambda log: log.first_token_s - log.scheduled_s),
    ),
    (
        "request_decode_time_seconds",
        "From the first output token to the last, preemptions included.",
        _of_finished(lambda log: log.last_token_s - log.first_token_s),
    ),
    (
        "request_inference_time_seconds",
        "Prefill and decode together.",
        _of_finished(lambda log: log.last_token_s - log.scheduled_s),
    ),
    ("request_prompt_tokens", "Prompt tokens of finished requests.", lambda s: _lengths(s, s.finished.prompt_tokens)),
    ("request_generation_tokens", "Output tokens of finished requests.", lambda s: _lengths(s, s.finished.num_output_tokens)),
)

MEANINGS: dict[str, tuple[Literal["counter", "gauge", "histogram"], str]] = {
    **{name: ("gauge", meaning) for name, meaning, _ in _GAUGES},
    **{name: ("counter", meaning) for name, meaning, _ in _COUNTERS},
    "request_success_total": ("counter", _ENDED),
    **{name: ("histogram", meaning) for name, meaning, _ in _HISTOGRAMS},
}
"""Kind and meaning of each metric, by its name without `vllm:`."""
