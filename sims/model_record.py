"""What the processes of several models recorded, as if one recorder had watched them all."""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.fleet_record import fleet_record
from pagedkv.sims.model_server import ModelServer
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import GAUGE_SUMS, KV_KINDS, WAITING, WAITING_SUMS
from pagedkv.sims.run_record import RunRecord
from pagedkv.sims.timeline import NUM_BINS


def model_record(server: ModelServer, first: StepScheduler, *, warmup_s: float, end_s: float) -> RunRecord:
    """Return what `server` says of a run that was measured from `warmup_s` to `end_s`.

    Pools of different sizes are counted as shares, of the pool of `first`, so that the whole is the mean pool that is there. Who
    waits for a model waits too.
    """
    usable = first.allocator.usable_slots
    nothing: RunRecord = Recorder(first, warmup_s=warmup_s, end_s=end_s)
    records = [_scaled(runner.recorder, usable / runner.scheduler.allocator.usable_slots) for runner in server.runners]
    record = fleet_record([nothing, *records], warmup_s=warmup_s, end_s=end_s)
    waits_s = np.array(server.waits_s).reshape(-1, 2)
    if waits_s.size and end_s > warmup_s:
        _add_waits(record, waits_s, warmup_s, end_s)
    return record


def any_waits_s(waits_s: Sequence[tuple[float, float]], from_s: float, until_s: float) -> float:
    """Return for how long of that time one or more of `waits_s`, (from, to) each, lasted."""
    total_s = reached_s = 0.0
    for start_s, end_s in sorted(waits_s):
        start_s, end_s = max(start_s, from_s, reached_s), min(end_s, until_s)
        if end_s > start_s:
            total_s, reached_s = total_s + end_s - start_s, end_s
    return total_s


def _scaled(record: RunRecord, factor: float) -> RunRecord:
    sums, timeline, kinds = record.arrays.sums.copy(), record.timeline, len(KV_KINDS)
    sums[GAUGE_SUMS : GAUGE_SUMS + kinds] *= factor
    sums[WAITING_SUMS : WAITING_SUMS + kinds] *= factor
    integral, gauges = timeline.integral.copy(), record.arrays.gauges.copy()
    integral[:, :kinds] *= factor
    gauges[:kinds] = np.rint(gauges[:kinds] * factor)
    arrays = record.arrays._replace(sums=sums, timeline=timeline._replace(integral=integral), gauges=gauges)
    return RunRecord(arrays, caches_prefixes=record.caches_prefixes)


def _add_waits(record: RunRecord, waits_s: Float64Array, warmup_s: float, end_s: float) -> None:
    """Count who waits for a model."""
    arrays = record.arrays
    arrays.gauges[WAITING] += int((waits_s[:, 1] == end_s).sum())  # those who still do
    arrays.sums[GAUGE_SUMS + WAITING] += _overlap_s(waits_s, warmup_s, end_s)
    width_s = arrays.timeline.width_s[0]
    for i in range(min(NUM_BINS, int(np.ceil(end_s / width_s)))):
        arrays.timeline.integral[i, WAITING] += _overlap_s(waits_s, i * width_s, (i + 1) * width_s)


def _overlap_s(waits_s: Float64Array, from_s: float, until_s: float) -> float:
    """Return how many seconds of that time they wait, summed over all."""
    return float(np.maximum(np.minimum(waits_s[:, 1], until_s) - np.maximum(waits_s[:, 0], from_s), 0.0).sum())
