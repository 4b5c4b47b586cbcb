"""Every figure of a result by one dotted name, such as ttft_s.p99: the columns of a table of results."""

from typing import Any

from pagedkv.errors import unknown_name
from pagedkv.sims.recording import KV_KINDS

COUNTS = ("num_injected", "num_finished", "num_rejected", "num_failed", "num_unfinished", "num_preemptions")
_PREFIX_COUNTS = ("num_queried_tokens", "num_hit_tokens")
TIER_FIGURES = ("num_loaded_tokens", "num_offloaded_tokens")
"""There are none without a second tier."""
_DRAFT_COUNTS = ("num_draft_tokens", "num_accepted_tokens")
DRAFT_FIGURES = (*_DRAFT_COUNTS, "draft_acceptance_rate")
"""There are none without speculative decoding."""
_LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
_SHARES = ("kv", "kv_when_waiting")
SUMMED = (*COUNTS, *_PREFIX_COUNTS, *TIER_FIGURES, *_DRAFT_COUNTS, "iterations", "request_steps", "simulated_s")
"""Figures that are summed over repeats; the others are means."""
FIGURES = (
    *COUNTS,
    "error_rate",
    *(*_PREFIX_COUNTS, "prefix_hit_rate", "resumed_hit_rate"),
    *TIER_FIGURES,
    *DRAFT_FIGURES,
    *("running_mean", "running_max", "waiting_mean", "waiting_time_share"),
    *(f"{shares}.{kind}" for shares in _SHARES for kind in KV_KINDS),
    *("busy_share", "memory_bandwidth_share", "compute_share"),
    *(f"{latency}.{part}" for latency in _LATENCIES for part in ("mean", "p50", "p90", "p99")),
    *("output_tokens_per_s", "request_throughput_per_s", "goodput_per_s", "goodput_share"),
    *("iterations", "request_steps", "simulated_s"),
)
"""The numbers of a result, in the order of a table."""
VERDICT = ("verdict.status", "verdict.fits", "verdict.binding", "verdict.attained")
"""What is judged of them."""


def figure(result: dict[str, Any], name: str) -> Any:
    """Return the figure `name` of an entry of the result document's `results`; None if there is no data."""
    value: Any = result
    for part in name.split("."):
        value = None if value is None else value.get(part)
    return value


def interval(result: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the figure `name`; None if it has none."""
    latency, _, part = name.partition(".")
    both = figure(result, f"{latency}.ci95") if part == "mean" else (result.get("ci95") or {}).get(name)
    return None if both is None else (both[0], both[1])


def check_figure(name: str) -> None:
    """Refuse a name that is no figure.

    Raises:
        ConfigError: With the nearest ones.
    """
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES, hint="simulate explain says what they are.")
