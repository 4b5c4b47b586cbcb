"""Which latencies may be higher than they look: those of requests that a run's end cuts off count with what they have at least."""

import numpy as np

from pagedkv.arrays import BoolArray, Float64Array
from pagedkv.sims.statistics import PERCENTILES

TOLERANCE = 0.01
"""A percentile that cannot be higher by more than this, relative, counts as known."""


def raisable(samples: Float64Array, known: BoolArray) -> list[int]:
    """Return the `PERCENTILES` of `samples` that would be higher if those that are not `known` took forever. O(n log n)."""
    if samples.size == 0:
        return []
    now = np.percentile(samples, PERCENTILES)
    worst = np.percentile(np.where(known, samples, np.inf), PERCENTILES, method="lower")
    return [p for p, low, high in zip(PERCENTILES, now, worst, strict=True) if high > low * (1 + TOLERANCE)]
