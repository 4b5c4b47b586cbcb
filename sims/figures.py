"""The pictures of a simulation, as plotly figures."""

from collections.abc import Iterator
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pagedkv.arrays import Float64Array
from pagedkv.sims.budget_parts import PARTS
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.palette import (
    BLUE,
    GREEN,
    INK,
    NEUTRAL,
    ORANGE,
    PANEL,
    PINK,
    SKY,
    SOFT,
    TOTAL,
    VERMILION,
    WHITE,
    base_layout,
    series,
)
from pagedkv.sims.recording import KV_KINDS, RUNNING, WAITING
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import Results
from pagedkv.units import GIB

KIND_COLOURS = {
    "tokens": BLUE,
    "reserved": SKY,
    "internal": VERMILION,
    "external": ORANGE,
    "cached": PINK,
    "state": GREEN,
    "free": "#e8eaed",
}
_HATCHES = {"reserved": ".", "internal": "/", "external": "\\"}
_CDF_POINTS = 400
_LABEL = {"showarrow": False, "bgcolor": PANEL, "borderpad": 2, "opacity": 0.9}
LATENCIES = (
    ("ttft_s", "ttft", "Time to first token"),
    ("tpot_s", "tpot", "Time per output token"),
    ("e2e_s", "e2el", "End-to-end latency"),
)
"""Latencies that have a goal: figure, goal, title."""


def waterfall(results: Results) -> go.Figure:
    """Return the memory budget as horizontal bars, each starting where the one before ends."""
    budget = results.scenario.deployment.budget
    sizes = [getattr(budget, part) / GIB for part in PARTS]
    labels = [*PARTS.values(), "visible memory"]
    starts = [*np.cumsum([0.0, *sizes])[:-1].tolist(), 0.0]
    sizes.append(budget.visible / GIB)
    colours = [KIND_COLOURS["tokens"] if label == "KV cache" else NEUTRAL for label in labels[:-1]] + [TOTAL]
    figure = go.Figure(
        go.Bar(
            y=labels,
            x=sizes,
            base=starts,
            orientation="h",
            marker={"color": colours},
            text=[f"{size:,.2f} GiB" for size in sizes],
            textposition="auto",
            insidetextfont={"color": WHITE},
            outsidetextfont={"color": INK},
            cliponaxis=False,
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    figure.update_layout(**base_layout(360), showlegend=False)
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="GiB", range=[0, 1.34 * budget.visible / GIB])  # room for what stands beside a bar
    return figure


def kv_over_time(results: Results) -> go.Figure:
    """Return the kinds of KV memory over time as stacked areas, one panel per allocator."""
    names = list(results.by_allocator)
    figure = make_subplots(rows=len(names), cols=1, shared_xaxes=True, vertical_spacing=0.06, subplot_titles=names)
    for row, result in enumerate(results.by_allocator.values(), start=1):
        run = result.runs[0]
        starts_s, seconds, means = run.recorder.timeline.means()
        for place, kind in enumerate(KV_KINDS):
            shares = 100 * means[:, place] / run.allocator.usable_slots
            if kind in ("cached", "state") and not shares.any():
                continue
            hatch = _HATCHES.get(kind, "")
            figure.add_scatter(
                x=_rounded(starts_s + seconds / 2),
                y=_rounded(shares),
                name=kind,
                legendgroup=kind,
                showlegend=row == 1,
                stackgroup="kinds",
                mode="lines",
                line={"width": 0, "color": KIND_COLOURS[kind]},
                fillcolor=KIND_COLOURS[kind],
                fillpattern={"shape": hatch, "fgcolor": WHITE, "size": 5, "solidity": 0.25} if hatch else None,
                hovertemplate="%{y:.1f} %",
                row=row,
                col=1,
            )
    figure.update_layout(**base_layout(100 + 190 * len(names)))
    figure.update_layout(margin={"t": 90}, legend={"y": 1 + 0.12 / len(names)})
    figure.update_yaxes(range=[0, 100], ticksuffix=" %")
    figure.update_xaxes(title="simulated time, s", row=len(names), col=1)
    _mark_times(figure, results)
    return figure


def occupancy(results: Results) -> go.Figure:
    """Return running and waiting requests over time, and where preemptions happened."""
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1, subplot_titles=("running requests", "waiting requests")
    )
    for i, (name, result) in enumerate(results.by_allocator.items()):
        timeline = result.runs[0].recorder.timeline
        starts_s, seconds, means = timeline.means()
        times_s, line = starts_s + seconds / 2, series(i)
        for row, gauge in ((1, RUNNING), (2, WAITING)):
            figure.add_scatter(
                x=_rounded(times_s),
                y=_rounded(means[:, gauge]),
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                mode="lines",
                line=line,
                row=row,
                col=1,
            )
        at_s, preemptions = timeline.preemptions_over_time()
        if at_s.size:
            figure.add_scatter(
                x=_rounded(at_s),
                y=_rounded(np.interp(at_s, times_s, means[:, RUNNING])),
                name=f"{name}: preemptions",
                mode="markers",
                marker={"symbol": "x", "color": line["color"], "size": 8, "line": {"width": 1, "color": WHITE}},
                customdata=preemptions.astype(int),
                hovertemplate="%{customdata} preempted",
                row=1,
                col=1,
            )
    figure.update_layout(**base_layout(500))
    figure.update_layout(margin={"t": 90}, legend={"y": 1.08})
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title="simulated time, s", row=2, col=1)
    _mark_times(figure, results)
    return figure


def latency_cdfs(results: Results) -> Iterator[tuple[go.Figure, str]]:
    """Yield the distributions of TTFT, TPOT and E2E with the goals as lines, each with its caption."""
    goals = {goal.metric: goal.limit_s for goal in results.scenario.goals}
    for field, metric, caption in LATENCIES:
        figure = go.Figure()
        for i, (name, result) in enumerate(results.by_allocator.items()):
            samples_s = np.sort(np.concatenate([_samples(run, field) for run in result.runs]))
            if samples_s.size == 0:
                continue
            shares = np.linspace(0, 1, min(_CDF_POINTS, samples_s.size))
            figure.add_scatter(
                x=_rounded(np.quantile(samples_s, shares)),
                y=_rounded(100 * shares),
                name=name,
                mode="lines",
                line=series(i),
                hovertemplate="%{y:.0f} % within %{x:.3g} s",
            )
        if metric in goals:
            figure.add_vline(x=goals[metric], line={"color": INK, "dash": "dot"})
            # On a log axis plotly places lines by value and annotations by its logarithm.
            figure.add_annotation(x=np.log10(goals[metric]), y=5, text=f" goal {goals[metric]:g} s", xanchor="left", **_LABEL)
        figure.update_layout(**base_layout(300))
        figure.update_layout(hovermode="closest")
        figure.update_xaxes(type="log", title=f"{caption}, s (log scale)")
        figure.update_yaxes(range=[0, 100], ticksuffix=" %")
        yield figure, f"{escape(caption)}: share of requests within it. Unfinished requests count with their lower bound."


def _samples(run: object, field: str) -> Float64Array:
    log = run.measured  # type: ignore[attr-defined]
    accepted = log.where((log.outcome == Outcome.FINISHED) | (log.outcome == Outcome.UNFINISHED))
    samples: Float64Array = getattr(Latencies.of(accepted, run.end_s), field)  # type: ignore[attr-defined]
    return samples[np.isfinite(samples) & (samples > 0)]


def _mark_times(figure: go.Figure, results: Results) -> None:
    """Mark the end of the warm-up, and when replicas were down."""
    end_s = max(result.runs[0].end_s for result in results.by_allocator.values())
    for fault in results.scenario.replication.faults:
        figure.add_vrect(x0=fault.at_s, x1=min(fault.back_s, end_s), fillcolor=SOFT, opacity=0.2, line_width=0, layer="above")
    warmup_s = results.scenario.warmup_s
    if warmup_s > 0:
        figure.add_vline(x=warmup_s, line={"color": SOFT, "dash": "dot", "width": 1})


def _rounded(values: Float64Array) -> list[float]:
    """Return `values` with five significant digits: enough for a picture, and a third of the bytes."""
    return [float(f"{value:.5g}") for value in values.tolist()]
