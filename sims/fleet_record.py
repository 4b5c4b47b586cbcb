"""What the processes of several replicas recorded, as if one recorder had watched them all.

The whole is as one machine is: its time is the run's, its running and waiting requests are everybody's, and its pool is the mean
of the pools that are up. So whatever reads a single machine's record reads this one, and its shares of memory sum to 1.
"""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.sims.recording import (
    GAUGE_SUMS,
    KV_KINDS,
    OBSERVED_S,
    RUNNING_MAX,
    WAITING_SUMS,
    RecorderArrays,
)
from pagedkv.sims.records import no_times
from pagedkv.sims.run_record import RunRecord
from pagedkv.sims.timeline import NUM_BINS, TimelineArrays


def fleet_record(recorders: Sequence[RunRecord], *, warmup_s: float, end_s: float) -> RunRecord:
    """Return what `recorders`, one per process that ran, say of a run that was measured from `warmup_s` to `end_s`."""
    counters = np.sum([recorder.arrays.counters for recorder in recorders], axis=0)
    counters[RUNNING_MAX] = max(recorder.running_max for recorder in recorders)  # each has counted the others' in
    arrays = RecorderArrays(
        sums=_sums(recorders, max(end_s - warmup_s, 0.0)),
        itl_bins=np.sum([recorder.arrays.itl_bins for recorder in recorders], axis=0),
        timeline=_timeline([recorder.timeline for recorder in recorders], end_s),
        times=no_times(0),  # the requests' times are in their log
        gauges=np.sum([recorder.arrays.gauges for recorder in recorders], axis=0),  # a process that has died holds nothing
        counters=counters,
        window_s=np.array([warmup_s, end_s]),
    )
    return RunRecord(arrays, caches_prefixes=recorders[0].caches_prefixes, offloads=recorders[0].offloads)


def _sums(recorders: Sequence[RunRecord], window_s: float) -> Float64Array:
    sums: Float64Array = np.sum([recorder.arrays.sums for recorder in recorders], axis=0)
    up_s, waiting_s = sums[OBSERVED_S : OBSERVED_S + 2].tolist()
    if up_s > 0:
        # Seconds of one machine instead of seconds of all: time in which requests waited is a share of the time up.
        machine_s = (window_s, window_s * waiting_s / up_s)
        sums[GAUGE_SUMS : GAUGE_SUMS + len(KV_KINDS)] *= machine_s[0] / up_s
        sums[WAITING_SUMS : WAITING_SUMS + len(KV_KINDS)] *= machine_s[1] / waiting_s if waiting_s else 0.0
        sums[OBSERVED_S : OBSERVED_S + 2] = machine_s
    return sums


def _timeline(timelines: Sequence[TimelineArrays], end_s: float) -> TimelineArrays:
    width_s = max(timeline.width_s[0] for timeline in timelines)
    while NUM_BINS * width_s < end_s:
        width_s *= 2
    same = [timeline.at_width(width_s) for timeline in timelines]
    integral, up_s = np.sum([each.integral for each in same], axis=0), np.sum([each.observed_s for each in same], axis=0)
    starts_s = np.arange(NUM_BINS) * width_s
    passed_s = np.clip(end_s - starts_s, 0.0, width_s)
    integral[:, : len(KV_KINDS)] *= np.divide(passed_s, up_s, out=np.zeros(NUM_BINS), where=up_s > 0)[:, None]
    return TimelineArrays(integral, passed_s, np.sum([each.preemptions for each in same], axis=0), np.array([width_s]))
