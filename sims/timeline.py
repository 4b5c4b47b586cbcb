"""Gauges over time in constant memory: a fixed number of bins that double in width as the run grows longer."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.jit import lean_jit

NUM_BINS = 1024
FIRST_WIDTH_S = 1.0


class TimelineArrays(NamedTuple):
    """Integrals of each gauge within each bin."""

    integral: Float64Array
    """[NUM_BINS, gauges]: gauge × seconds."""
    observed_s: Float64Array
    """[NUM_BINS]: seconds of the bin that were observed."""
    preemptions: Int64Array
    """[NUM_BINS]: preemptions at moments within the bin."""
    width_s: Float64Array
    """Length 1: width of a bin."""

    @classmethod
    def empty(cls, num_gauges: int) -> "TimelineArrays":
        """Return a timeline on which nothing has happened."""
        return cls(np.zeros((NUM_BINS, num_gauges)), np.zeros(NUM_BINS), np.zeros(NUM_BINS, np.int64), np.array([FIRST_WIDTH_S]))

    def at_width(self, width_s: float) -> "TimelineArrays":
        """Return the same in bins of `width_s`, a power of two times as wide as now. O(bins × gauges)."""
        if width_s == self.width_s[0]:
            return self
        pairs = [array.reshape(NUM_BINS // 2, 2, *array.shape[1:]).sum(1) for array in self[:3]]
        integral, observed_s, preemptions = (np.concatenate((pair, np.zeros_like(pair))) for pair in pairs)
        return TimelineArrays(integral, observed_s, preemptions, 2 * self.width_s).at_width(width_s)

    def means(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Return (start of each observed bin in seconds, its observed seconds, time-weighted mean of each gauge in it)."""
        seen = np.flatnonzero(self.observed_s > 0)
        return seen * self.width_s[0], self.observed_s[seen], self.integral[seen] / self.observed_s[seen, None]

    def preemptions_over_time(self) -> tuple[Float64Array, Int64Array]:
        """Return (middle of each bin with preemptions in seconds, their number)."""
        seen = np.flatnonzero(self.preemptions)
        return (seen + 0.5) * self.width_s[0], self.preemptions[seen]


@lean_jit
def count_preemptions(timeline: TimelineArrays, at_s: float, number: int) -> None:
    """Say that `number` requests were preempted at `at_s`, a moment that `observe` has reached."""
    timeline.preemptions[min(int(at_s / timeline.width_s[0]), NUM_BINS - 1)] += number


@lean_jit
def observe(timeline: TimelineArrays, start_s: float, end_s: float, gauges: Int64Array) -> None:
    """Say that the gauges had these values from `start_s` to `end_s`. Amortised O(gauges × bins touched)."""
    while end_s > NUM_BINS * timeline.width_s[0]:
        _merge_pairs(timeline)
    width_s = timeline.width_s[0]
    first, last = int(start_s / width_s), min(int(end_s / width_s), NUM_BINS - 1)
    for i in range(first, last + 1):
        seconds = min(end_s, (i + 1) * width_s) - max(start_s, i * width_s)
        if seconds > 0:
            timeline.observed_s[i] += seconds
            for g in range(gauges.size):
                timeline.integral[i, g] += seconds * gauges[g]


@lean_jit
def _merge_pairs(timeline: TimelineArrays) -> None:
    num_gauges = timeline.integral.shape[1]
    for i in range(NUM_BINS):  # explicit loops: numba takes seconds to compile expressions over slices
        a, b = 2 * i, 2 * i + 1
        merged = b < NUM_BINS
        timeline.observed_s[i] = timeline.observed_s[a] + timeline.observed_s[b] if merged else 0.0
        timeline.preemptions[i] = timeline.preemptions[a] + timeline.preemptions[b] if merged else 0
        for g in range(num_gauges):
            timeline.integral[i, g] = timeline.integral[a, g] + timeline.integral[b, g] if merged else 0.0
    timeline.width_s[0] *= 2.0
