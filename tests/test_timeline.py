"""The timeline against sums made by hand. Times in eighths of a second are exact in floating point, so sums must be equal."""

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.sims.timeline import FIRST_WIDTH_S, NUM_BINS, TimelineArrays, count_preemptions, observe

Stretch = tuple[int, int, tuple[int, int]]
"""Eighths unobserved before it, eighths observed, and two gauges' values meanwhile."""

durations = st.integers(0, 40) | st.integers(0, 8 * 3000)
stretches = st.lists(st.tuples(st.just(0) | durations, durations, st.tuples(st.integers(0, 10**6), st.integers(0, 9))), max_size=12)


def follow(observed: list[Stretch]) -> tuple[TimelineArrays, list[tuple[float, float, tuple[int, int]]]]:
    """Return the timeline, and (start, end, gauges) of each stretch, in seconds."""
    timeline, told, now_s = TimelineArrays.empty(2), [], 0.0
    for pause, eighths, gauges in observed:
        start_s = now_s + pause / 8
        now_s = start_s + eighths / 8
        observe(timeline, start_s, now_s, np.array(gauges))
        told.append((start_s, now_s, gauges))
    return timeline, told


@given(stretches)
def test_every_bin_holds_what_was_observed_in_it(observed: list[Stretch]) -> None:
    timeline, told = follow(observed)
    width_s = float(timeline.width_s[0])
    seconds = np.zeros(NUM_BINS)
    integral = np.zeros((NUM_BINS, 2))
    for i in range(NUM_BINS):
        for start_s, end_s, gauges in told:
            inside_s = max(0.0, min(end_s, (i + 1) * width_s) - max(start_s, i * width_s))
            seconds[i] += inside_s
            integral[i] += inside_s * np.array(gauges)
    np.testing.assert_array_equal(timeline.observed_s, seconds)
    np.testing.assert_array_equal(timeline.integral, integral)


@given(stretches)
def test_nothing_is_lost_when_bins_merge(observed: list[Stretch]) -> None:
    timeline, told = follow(observed)
    assert timeline.observed_s.sum() == sum(end_s - start_s for start_s, end_s, _ in told)
    for gauge in range(2):
        assert timeline.integral[:, gauge].sum() == sum((end_s - start_s) * gauges[gauge] for start_s, end_s, gauges in told)


@given(stretches)
def test_bins_are_as_narrow_as_the_run_allows(observed: list[Stretch]) -> None:
    timeline, told = follow(observed)
    end_s = max((end for _, end, _ in told), default=0.0)
    doublings = max(0, math.ceil(math.log2(max(end_s, 1.0) / NUM_BINS / FIRST_WIDTH_S)))
    assert timeline.width_s[0] == FIRST_WIDTH_S * 2**doublings


@given(st.lists(st.tuples(st.floats(1e-6, 500.0), st.integers(0, 10**9)), max_size=30))
def test_any_durations_keep_the_integral_up_to_rounding(observed: list[tuple[float, int]]) -> None:
    timeline, now_s = TimelineArrays.empty(1), 0.0
    for duration_s, gauge in observed:
        observe(timeline, now_s, now_s + duration_s, np.array([gauge]))
        now_s += duration_s
    np.testing.assert_allclose(timeline.observed_s.sum(), now_s, rtol=1e-12)
    np.testing.assert_allclose(timeline.integral.sum(), sum(d * g for d, g in observed), rtol=1e-9)


def test_means_leave_out_what_was_not_observed() -> None:
    timeline = TimelineArrays.empty(1)
    observe(timeline, 1.5, 2.0, np.array([8]))
    observe(timeline, 4.0, 4.25, np.array([8]))
    observe(timeline, 4.25, 5.0, np.array([4]))
    starts_s, seconds, means = timeline.means()
    assert starts_s.tolist() == [1.0, 4.0]
    assert seconds.tolist() == [0.5, 1.0]
    assert means.tolist() == [[8.0], [5.0]]


@given(stretches)
def test_preemptions_stay_in_the_bin_of_their_moment(observed: list[Stretch]) -> None:
    timeline, now_s, moments_s = TimelineArrays.empty(2), 0.0, []
    for pause, eighths, gauges in observed:
        start_s = now_s + pause / 8
        now_s = start_s + eighths / 8
        observe(timeline, start_s, now_s, np.array(gauges))
        count_preemptions(timeline, start_s, 2)
        moments_s += [start_s, start_s]
    middles_s, counts = timeline.preemptions_over_time()
    width_s = float(timeline.width_s[0])
    expected = Counter((moment_s // width_s + 0.5) * width_s for moment_s in moments_s)
    assert dict(zip(middles_s.tolist(), counts.tolist(), strict=True)) == expected
