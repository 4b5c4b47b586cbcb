"""What a sweep shows: where preemption begins, and figures that move the wrong way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pagedkv.sims.flat_figures import figure, interval
from pagedkv.sims.sweep_grid import Axis

TOLERANCE = 0.01
"""Change below which nothing is called worse, relative for throughput; see `_chance` for more."""
MORE_MEMORY = ("num_gpu_blocks_override", "gpu_memory_utilization", "kv_cache_memory_bytes", "free_memory")
"""Settings more of which should not cost throughput."""
MORE_LOAD = ("users", "request_rate", "trace_rate")
"""Settings more of which should not serve a larger share within the goals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run of a sweep."""

    values: dict[str, Any]
    """By swept flag."""
    outcome: dict[str, Any]
    """{"result": ...} or {"error": ...}."""

    def figure(self, name: str) -> Any:
        """Return a figure; None without data."""
        return figure(self.outcome["result"], name) if "result" in self.outcome else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cliff:
    """Two neighbours on an axis of which one preempts and the other does not."""

    axis: str
    calm: Any
    """The value without preemptions."""
    preempting: Any
    """The value with some."""
    num_preemptions: int
    others: dict[str, Any]
    """The other swept flags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """A figure that moves against what more of something should do."""

    axis: str
    figure: str
    before: Any
    """The value of the axis from which it moves."""
    after: Any
    """The value of the axis at which it has moved."""
    figure_before: float
    figure_after: float
    sure: bool | None
    """Whether the confidence intervals are disjoint; None for single runs: it may be noise."""
    others: dict[str, Any]
    """The other swept flags."""


def lines_along(axis: Axis, rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Return the runs that differ in `axis` alone, in its order, by the values of the other flags."""
    lines: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        others = {name: value for name, value in row.values.items() if name != axis.name}
        lines.setdefault(repr(others), (others, []))[1].append(row)
    return list(lines.values())


def cliffs(axes: Sequence[Axis], rows: Sequence[Row]) -> list[Cliff]:
    """Return the crossings of the preemption cliff along the first numeric flag."""
    axis = next((axis for axis in axes if axis.numeric), None)
    if axis is None:
        return []
    found = []
    for others, line in lines_along(axis, rows):
        run = [row for row in line if "result" in row.outcome]
        for row, after in zip(run, run[1:], strict=False):
            counts = row.figure("num_preemptions"), after.figure("num_preemptions")
            if (counts[0] == 0) != (counts[1] == 0):
                calm, preempting = (row, after) if counts[0] == 0 else (after, row)
                found.append(
                    Cliff(
                        axis=axis.name,
                        calm=calm.values[axis.name],
                        preempting=preempting.values[axis.name],
                        num_preemptions=max(counts),
                        others=others,
                    )
                )
    return found


def anomalies(axes: Sequence[Axis], rows: Sequence[Row]) -> list[Anomaly]:
    """Return where more memory does worse, and where more load does better or less before it does more again.

    More memory: throughput or the share within the goals falls from one value to the next. More load: that share rises, or
    throughput falls and is higher again at a later value.
    """
    found = []
    for axis in axes:
        if axis.name not in (*MORE_MEMORY, *MORE_LOAD):
            continue
        for others, line in lines_along(axis, rows):
            found += _along(axis, others, [row for row in line if "result" in row.outcome])
    return found


def _along(axis: Axis, others: dict[str, Any], line: list[Row]) -> list[Anomaly]:
    found = []
    for name in ("output_tokens_per_s", "goodput_share"):
        known = [row for row in line if row.figure(name) is not None]
        for i, (row, after) in enumerate(zip(known, known[1:], strict=False)):
            values = row.figure(name), after.figure(name)
            slack = max(TOLERANCE, _chance(row, name), _chance(after, name)) * (1.0 if name == "goodput_share" else values[0])
            falls, rises = values[1] < values[0] - slack, values[1] > values[0] + slack
            if axis.name in MORE_MEMORY:
                wrong = falls
            elif name == "goodput_share":
                wrong = rises
            else:
                wrong = falls and any(later.figure(name) > values[0] + slack for later in known[i + 2 :])
            if wrong:
                intervals = [interval(each.outcome["result"], name) for each in (row, after)]
                found.append(
                    Anomaly(
                        axis=axis.name,
                        figure=name,
                        before=row.values[axis.name],
                        after=after.values[axis.name],
                        figure_before=values[0],
                        figure_after=values[1],
                        sure=_disjoint(*intervals),
                        others=others,
                    )
                )
    return found


def _chance(row: Row, name: str) -> float:
    """Return what chance alone may add: two standard errors of a share, or of a count of finished requests, relative to it."""
    if name == "goodput_share":
        share, number = row.figure(name), max(row.figure("num_injected"), 1)
        return 2 * math.sqrt(max(share * (1 - share), 1 / number) / number)
    return 2 / math.sqrt(max(row.figure("num_finished"), 1))


def _disjoint(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool | None:
    return None if a is None or b is None else a[1] < b[0] or b[1] < a[0]
