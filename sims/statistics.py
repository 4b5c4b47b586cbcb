"""Percentiles with lower bounds, and confidence intervals over repeated runs."""

import math
from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array

PERCENTILES = (50, 90, 99)

_T_975: tuple[float, ...] = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_T_975 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def summarize(samples: Float64Array) -> dict[str, float] | None:
    """Return the mean and `PERCENTILES` (linear between order statistics) of `samples`; None if there are none."""
    if samples.size == 0:
        return None
    percentiles = np.percentile(samples, PERCENTILES)
    return {"mean": float(samples.mean())} | {f"p{p}": float(x) for p, x in zip(PERCENTILES, percentiles, strict=True)}


def summarize_bins(counts: Int64Array, *, total: float, smallest: float, ratio: float) -> dict[str, float] | None:
    """Return the same for samples counted in bins; bin i covers [smallest × ratio**i, smallest × ratio**(i + 1)).

    The mean is exact; a percentile is the middle of its bin: within half a bin's width.
    """
    number = int(counts.sum())
    if number == 0:
        return None
    ranks = [math.ceil(p / 100 * number) for p in PERCENTILES]
    bins = np.searchsorted(np.cumsum(counts), ranks)
    middles = smallest * ratio ** (bins + 0.5)
    return {"mean": total / number} | {f"p{p}": float(x) for p, x in zip(PERCENTILES, middles, strict=True)}


def ci95(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean of independent `values`; None for fewer than two.

    Student's t; quantiles for up to 30 degrees of freedom from the usual table, 1.96 + 2.4/df beyond (error below 0.001).
    """
    n = len(values)
    if n < 2:
        return None
    df = n - 1
    t = _T_975[df - 1] if df <= len(_T_975) else 1.96 + 2.4 / df
    mean = math.fsum(values) / n
    half = t * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / df / n)
    return mean - half, mean + half
