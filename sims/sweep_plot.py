"""The page of a sweep: the capacity curve if load is swept, one figure against the first flag, findings, a table; offline."""

from html import escape
from typing import Any

import plotly.graph_objects as go

from pagedkv.sims.flat_figures import interval
from pagedkv.sims.palette import base_layout, series
from pagedkv.sims.reporting.capacity_curve import CURVE_CAPTION, Curve, CurvePoint, capacity_curve, curve_words
from pagedkv.sims.reporting.page import Drawing, Section, command, page, picture, rows, table
from pagedkv.sims.sweep import Sweep, errors, labels, value_text
from pagedkv.sims.sweep_findings import MORE_LOAD, Row, lines_along
from pagedkv.sims.sweep_grid import Axis
from pagedkv.sims.sweep_words import anomaly_text, cliff_text, flag_of, sweep_command

_MOST_ROWS = 500
"""Of the table; results.csv has all."""
_COLUMNS = ("output_tokens_per_s", "goodput_share", "num_preemptions", "running_mean", "ttft_s.p99", "tpot_s.p99")


def figure(sweep: Sweep, metric: str) -> go.Figure:
    """Return `metric` against the first swept flag, with 95 % intervals where there are repeats; crosses mark preemption."""
    axis = sweep.grid.axes[0]
    drawn = go.Figure()
    for i, (others, line) in enumerate(lines_along(axis, sweep.rows)):
        known = [row for row in line if row.figure(metric) is not None]
        bounds = [interval(row.outcome["result"], metric) for row in known]
        values = [row.figure(metric) for row in known]
        halves = [0.0 if bound is None else (bound[1] - bound[0]) / 2 for bound in bounds]
        drawn.add_scatter(
            x=[value_text(row.values[axis.name]) for row in known],
            y=values,
            error_y={"array": halves} if any(bounds) else None,
            name=labels(others) or metric,
            mode="lines+markers" if axis.numeric else "markers",  # between names lies nothing
            line=series(i),
            marker={"size": 8, "symbol": ["x" if row.figure("num_preemptions") else "circle" for row in known]},
        )
    drawn.update_layout(**base_layout(560), showlegend=True)
    drawn.update_layout(legend={"yanchor": "top", "y": -0.2}, margin={"t": 10})
    drawn.update_xaxes(title=flag_of(axis), type="linear" if axis.numeric else "category")
    drawn.update_yaxes(title=metric, rangemode="tozero", automargin=True)
    return drawn


def html(sweep: Sweep, metric: str) -> str:
    """Return the page. It loads nothing from anywhere."""
    title = f"{metric} by {', '.join(flag_of(axis) for axis in sweep.grid.axes)}"
    found = [*map(cliff_text, sweep.cliffs), *map(anomaly_text, sweep.anomalies)]
    found += [f"Cannot run: {what}: {why}" for what, why in errors(sweep.rows)]
    head = (
        f"<h1>{escape(title)}</h1>\n"
        f"<p>{len(sweep.rows):,} runs. This sweep:</p>{command('this-sweep', sweep_command(sweep))}\n"
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in found)}</ul>"
    )
    words = _metric_words(sweep, metric)
    capacity = _capacity(sweep)
    drawn_there = capacity and metric in ("goodput_share", "output_tokens_per_s") and sweep.grid.base.measurement.repeats == 1
    of_metric = [
        Section(
            anchor="metric",
            title=f"{metric} against {flag_of(sweep.grid.axes[0])}",
            body=picture(Drawing(name="sweep", figure=figure(sweep, metric), words=words), "A cross marks a run with preemptions."),
        ),
    ]
    runs = Section(anchor="runs", title="Every run", body=_runs(sweep))
    closing = "Simulated. What a run rests on, and how sure that is, says its own report: simulate with its settings and --report."
    return page(title, head, [*capacity, *([] if drawn_there else of_metric), runs], closing=closing)


def _capacity(sweep: Sweep) -> list[Section]:
    """Return the capacity curve if the first flag is how much load there is."""
    axis = sweep.grid.axes[0]
    if axis.name not in MORE_LOAD or len(axis.values) < 2:
        return []
    curves = [_curve(axis, labels(others) or flag_of(axis), line) for others, line in lines_along(axis, sweep.rows)]
    drawing = Drawing(
        name="capacity",
        figure=capacity_curve(curves, unit=flag_of(axis), attain=None),
        words=curve_words(curves, unit=flag_of(axis)),
    )
    caption = (
        f"{CURVE_CAPTION} The share counts unfinished requests as misses; whether a load fits, those whose fate is known alone."
    )
    return [Section(anchor="capacity", title=f"Capacity against {flag_of(axis)}", body=picture(drawing, caption))]


def _curve(axis: Axis, name: str, line: list[Row]) -> Curve:
    known = sorted((row for row in line if "result" in row.outcome), key=lambda row: float(row.values[axis.name]))
    points = tuple(
        CurvePoint(
            value=row.values[axis.name],
            attained=row.figure("goodput_share"),
            output_tokens_per_s=row.figure("output_tokens_per_s"),
            num_preemptions=row.figure("num_preemptions"),
            fits=bool(row.figure("verdict.fits")),
        )
        for row in known
    )
    return Curve(name=name, points=points, chosen=max((p.value for p in points if p.fits), default=None))


def _metric_words(sweep: Sweep, metric: str) -> str:
    known = [row for row in sweep.rows if row.figure(metric) is not None]
    if not known:
        return f"{metric}: no run has one."
    low, high = (pick(known, key=lambda row: row.figure(metric)) for pick in (min, max))
    return (
        f"{metric} of {len(known):,} runs: from {low.figure(metric):,.4g} (at {labels(low.values)}) "
        f"to {high.figure(metric):,.4g} (at {labels(high.values)})."
    )


def _runs(sweep: Sweep) -> str:
    names = [axis.name for axis in sweep.grid.axes]
    body = [
        (
            *(str(value_text(row.values[name])) for name in names),
            str(row.figure("verdict.status")),
            "yes" if row.figure("verdict.fits") else "no",
            *(_number(row.figure(name)) for name in _COLUMNS),
        )
        for row in sweep.rows
        if "result" in row.outcome
    ]
    more = f"<p>and {len(body) - _MOST_ROWS:,} more in results.csv</p>" if len(body) > _MOST_ROWS else ""
    head = (*(name.replace("_", "-") for name in names), "status", "fits", *_COLUMNS)
    return table(head, rows(body[:_MOST_ROWS]), label="Runs by setting") + more


def _number(value: Any) -> str:
    if value is None or isinstance(value, int):
        return "–" if value is None else f"{value:,}"
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
