"""Percentiles with lower bounds, and confidence intervals over repeated runs."""

import math
from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array

PERCENTILES = (50, 90, 99)

_T_975: tuple[float, ...] = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_Z_975 = 1.959964


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

    Student's t: for up to 10 degrees of freedom from the usual table, beyond by Fisher's expansion around the normal quantile
    (error below 0.0002).
    """
    n = len(values)
    if n < 2:
        return None
    df = n - 1
    z = _Z_975
    expansion = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    t = _T_975[df - 1] if df <= len(_T_975) else expansion
    mean = math.fsum(values) / n
    half = t * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / df / n)
    return mean - half, mean + half
