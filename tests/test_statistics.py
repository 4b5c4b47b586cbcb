"""Percentiles against their definitions, confidence intervals against the table, the integral and their promise."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.sims.statistics import PERCENTILES, ci95, summarize, summarize_bins

SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@given(samples=SAMPLES)
def test_percentiles_are_linear_between_order_statistics(samples: list[float]) -> None:
    summary = summarize(np.array(samples))
    assert summary is not None
    assert summary["mean"] == pytest.approx(math.fsum(samples) / len(samples))
    ordered = sorted(samples)
    for p in PERCENTILES:
        below, share = divmod(p / 100 * (len(ordered) - 1), 1)
        low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
        assert summary[f"p{p}"] == pytest.approx(low + share * (high - low), abs=1e-9)


@given(samples=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=200))
def test_binned_percentiles_are_order_statistics_within_half_a_bin(samples: list[float]) -> None:
    smallest, ratio = 1e-4, 1.01
    counts = np.zeros(2000, np.int64)
    for sample in samples:
        counts[int(math.log(sample / smallest) / math.log(ratio))] += 1
    summary = summarize_bins(counts, total=math.fsum(samples), smallest=smallest, ratio=ratio)
    assert summary is not None
    assert summary["mean"] == math.fsum(samples) / len(samples)
    for p in PERCENTILES:
        exact = sorted(samples)[math.ceil(p / 100 * len(samples)) - 1]
        assert exact / ratio**0.5001 <= summary[f"p{p}"] <= exact * ratio**0.5001


def test_nothing_has_no_summary() -> None:
    assert summarize(np.array([])) is None
    assert summarize_bins(np.zeros(5, np.int64), total=0.0, smallest=1.0, ratio=2.0) is None
    assert ci95([]) is None
    assert ci95([3.0]) is None


@pytest.mark.parametrize(
    ("values", "half_width"),
    [  # t × s / √n by hand, t from the table
        ([1.0, 3.0], 12.7062 * math.sqrt(2) / math.sqrt(2)),
        ([2.0, 4.0, 9.0], 4.3027 * math.sqrt(13) / math.sqrt(3)),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2.7764 * math.sqrt(2.5) / math.sqrt(5)),
        ([7.0] * 4, 0.0),
    ],
)
def test_an_interval_by_hand(values: list[float], half_width: float) -> None:
    mean = sum(values) / len(values)
    assert ci95(values) == pytest.approx((mean - half_width, mean + half_width), rel=1e-4)


def t_quantile(df: int) -> float:
    """Return the 0.975 quantile of Student's t by bisection of its distribution, integrated with Simpson's rule."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)

    def beyond_the_median(t: float) -> float:
        points = [scale * (1 + (t * i / 400) ** 2 / df) ** (-(df + 1) / 2) for i in range(401)]
        return t / 1200 * (points[0] + points[-1] + 4 * sum(points[1:-1:2]) + 2 * sum(points[2:-1:2]))

    low, high = 1.9, 13.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if beyond_the_median(middle) < 0.475 else (low, middle)
    return low


def t_used(df: int) -> float:
    values = [0.0] * (df // 2) + [1.0] * (df + 1 - df // 2)
    interval = ci95(values)
    assert interval is not None
    return (interval[1] - interval[0]) / 2 / (np.std(values, ddof=1) / math.sqrt(df + 1))


# Simpson's rule is too coarse for the tail of df 1 and 2: the table by hand above has those.
@pytest.mark.parametrize("df", [3, 10, 29, 30, 60, 200, 2000])
def test_the_quantiles_are_students(df: int) -> None:
    assert t_used(df) == pytest.approx(t_quantile(df), abs=1e-3)


def test_the_quantiles_just_beyond_the_table() -> None:
    assert [t_used(df) for df in (31, 35, 40)] == pytest.approx([t_quantile(df) for df in (31, 35, 40)], abs=1e-3)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_95_of_100_intervals_contain_the_mean(n: int) -> None:
    rng, trials = random.Random(0), 4000
    intervals = [ci95([rng.gauss(3.0, 2.0) for _ in range(n)]) for _ in range(trials)]
    covered = sum(interval is not None and interval[0] <= 3.0 <= interval[1] for interval in intervals)
    assert covered / trials == pytest.approx(0.95, abs=0.01)
