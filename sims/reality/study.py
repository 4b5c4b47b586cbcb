"""What really happened beside what was predicted, load by load, and the bars that this must meet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.reality.timed_load import TimedLoad
from pagedkv.sims.simulation import Run
from pagedkv.sims.validation.checks import Section, at_most, reported, within
from pagedkv.sims.validation.log_replay import Replay

CLOSEST = 0.05
"""What TPOT and E2E may be off by, if real runs agree with each other that well."""
SPREADS = 2.0
"""Or so many times the spread of identical real runs, if that is more."""
TTFT = 0.10
OCCUPANCY_POINTS = 5.0
_NAMES = {"tpot_s": "mean TPOT", "e2e_s": "mean E2E", "ttft_s": "mean TTFT"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """A load, served several times and predicted once."""

    load: TimedLoad
    real: tuple[Run, ...]
    """Identical runs."""
    predicted: Run
    num_slots: int
    """Of the KV cache."""

    def means(self, name: str) -> tuple[Float64Array, float]:
        """Return (the mean of a latency over requests in each real run, and as predicted), in seconds."""
        real = np.array([float(np.nanmean(getattr(Latencies.of(run.log, run.end_s), name))) for run in self.real])
        return real, float(np.nanmean(getattr(Latencies.of(self.predicted.log, self.predicted.end_s), name)))

    def occupancy(self) -> tuple[Float64Array, Float64Array]:
        """Return the share of KV slots in use in each second, in %: (median of the real runs, as predicted)."""
        seconds = math.ceil(max(run.end_s for run in (*self.real, self.predicted)))
        used = [Replay(run=run, num_slots=self.num_slots).seconds(seconds)[1] for run in (*self.real, self.predicted)]
        return np.median(used[:-1], axis=0), used[-1]

    def section(self, *, fitted: bool) -> Section:
        """Return the comparison; of the load that the machine was `fitted` to it is no test."""
        checks = []
        for name, words in _NAMES.items():
            real, ours = self.means(name)
            mean = float(np.median(real))  # of identical runs: one that something else disturbed does not count
            spread = float((real.max() - real.min()) / mean)
            runs = ", ".join(f"{1e3 * each:,.1f}" for each in real)
            if fitted:
                checks.append(
                    reported(words, f"{1e3 * mean:,.1f} ms", f"{1e3 * ours:,.1f} ms", f"{ours / mean - 1:+.1%}: fitted to")
                )
                continue
            bar = TTFT if name == "ttft_s" else max(CLOSEST, SPREADS * spread)
            checks.append(within(f"{words} ({len(real)} runs: {runs})", 1e3 * mean, 1e3 * ours, share=bar, unit=" ms"))
        real_used, our_used = self.occupancy()
        off = np.abs(real_used - our_used)
        what = f"KV occupancy by the second, mean difference in points (at most {off.max():.1f})"
        if not fitted:
            checks.append(at_most(what, float(off.mean()), OCCUPANCY_POINTS, percent=False))
        else:
            checks.append(reported(what, "", f"{off.mean():.1f}", "fitted to"))
        return Section(
            name=self.load.name,
            title=f"{self.load.name}: {self.load.words}",
            source=f"{self.load.size} requests, served {len(self.real)} times",
            checks=tuple(checks),
            details={"load": self.load.settings(), "figures": self._figures(), "occupancy": self._series()},
        )

    def _figures(self) -> dict[str, Any]:
        figures = {}
        for name in _NAMES:
            real, ours = self.means(name)
            figures[name] = {"real": real.tolist(), "predicted": ours}
        return figures

    def _series(self) -> dict[str, Any]:
        real, ours = self.occupancy()
        return {"real_percent": np.round(real, 2).tolist(), "predicted_percent": np.round(ours, 2).tolist()}


def sections(served: Sequence[Served]) -> tuple[Section, ...]:
    """Return the comparison of each load; the machine was fitted to the first."""
    return tuple(each.section(fitted=i == 0) for i, each in enumerate(served))
