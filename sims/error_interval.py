"""How far the headline figures may be off because the constants are: an interval from the calibration's spread."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pagedkv.sims.calibration import Calibration
from pagedkv.sims.run_record import RunRecord

HEADLINES = ("output_tokens_per_s", "tpot_s", "ttft_s")
"""Figures that get an interval; of the latencies the mean."""


def error_intervals(
    figures: Mapping[str, Any], calibration: Calibration, recorders: Sequence[RunRecord]
) -> dict[str, list[float] | None]:
    """Return low and high of each of `HEADLINES`; None where there is no such figure.

    A step bound by reading is off by the spread of decode rates, one bound by arithmetic by that of prefill rates: throughput and
    TPOT by the mean of both, weighted with the time that each took; TTFT by at least that of prefill. A queue that is near to
    running over amplifies such errors, which this does not know.
    """
    memory_s, compute_s, overhead_s = np.sum([recorder.integrals.cost_s[:3] for recorder in recorders], axis=0).tolist()
    busy_s = memory_s + compute_s + overhead_s
    share = compute_s / busy_s if busy_s else 0.0
    mixed = share * calibration.prefill_spread + (1 - share) * calibration.decode_spread
    spreads = {"output_tokens_per_s": mixed, "tpot_s": mixed, "ttft_s": max(mixed, calibration.prefill_spread)}
    intervals: dict[str, list[float] | None] = {}
    for name, spread in spreads.items():
        value = figures[name]
        mean = value["mean"] if isinstance(value, Mapping) else value
        intervals[name] = None if mean is None else [mean / math.exp(spread), mean * math.exp(spread)]
    return intervals


def calibration_lines(document: Mapping[str, Any]) -> list[str]:
    """Return what a view says of the calibration of a result document: what the constants rest on, and the intervals."""
    calibration = document["calibration"]
    known = calibration["basis"] if calibration["why"] is None else f"{calibration['basis']}; {calibration['why']}"
    lines = [
        f"Step times {calibration['status']}: {known}. Rates may be off by a factor of {calibration['decode_factor']:.2f} "
        f"in decoding and {calibration['prefill_factor']:.2f} in prefill, which gives:"
    ]
    for column in document["results"]:
        parts = [
            _range(title, column["error_interval"][name], scale, unit)
            for name, title, scale, unit in (
                ("output_tokens_per_s", "output tokens/s", 1.0, ""),
                ("tpot_s", "TPOT mean", 1e3, " ms"),
                ("ttft_s", "TTFT mean", 1e3, " ms"),
            )
            if column["error_interval"][name] is not None
        ]
        if parts:
            lines.append(f"{column['allocator']}: {', '.join(parts)}")
    return lines


def _range(title: str, interval: Sequence[float], scale: float, unit: str) -> str:
    low, high = (scale * each for each in interval)
    return f"{title} {low:,.0f} to {high:,.0f}{unit}"
