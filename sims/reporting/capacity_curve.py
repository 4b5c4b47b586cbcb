"""The capacity curve: how many are served within the goals, and how much is generated, against users or whatever the load is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pagedkv.sims.palette import INK, PANEL, SOFT, base_layout, series

_DECADES = 30
"""From this ratio of the largest value to the smallest on, the axis is logarithmic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One simulation."""

    value: float
    """Users, or what is searched or swept."""
    attained: float | None
    """Share of the requests within the goals; None without goals, or if nothing is known."""
    output_tokens_per_s: float | None
    num_preemptions: int | None
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What one allocator, or one setting, does at different loads."""

    name: str
    points: tuple[CurvePoint, ...]
    """Ascending; those that could run."""
    chosen: float | None
    """The largest value that fits; None if none does."""

    @property
    def onset(self) -> float | None:
        """The smallest value with preemptions; None if there is none."""
        return min((point.value for point in self.points if point.num_preemptions), default=None)


def amount(value: float, unit: str) -> str:
    """Return so many of `unit`, one without its plural."""
    return f"{value:,} {unit.removesuffix('s') if value == 1 else unit}"


def capacity_curve(curves: Sequence[Curve], *, unit: str, attain: float | None) -> go.Figure:
    """Return two panels, share within the goals (if any has goals) and output tokens per second, with chosen values and onsets.

    Full markers fit, empty ones do not, crosses preempt. `attain` is the share that is wanted.
    """
    goals = any(point.attained is not None for curve in curves for point in curve.points)
    titles = (*(["requests within the goals"] if goals else []), "output tokens/s")
    figure = make_subplots(rows=len(titles), cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=titles)
    for i, curve in enumerate(curves):
        rows: list[tuple[int, list[float | None], str]] = []
        if goals:
            rows.append((1, [None if p.attained is None else 100 * p.attained for p in curve.points], "%{y:.1f} %"))
        rows.append((len(titles), [p.output_tokens_per_s for p in curve.points], "%{y:,.0f} tokens/s"))
        line = series(i)
        for row, values, shown in rows:
            figure.add_scatter(
                x=[p.value for p in curve.points],
                y=values,
                name=curve.name,
                legendgroup=curve.name,
                showlegend=row == 1,
                mode="lines+markers",
                line=line,
                marker={
                    "size": 9,
                    "color": line["color"],
                    "line": {"width": 2, "color": line["color"]},
                    "symbol": [_symbol(p) for p in curve.points],
                },
                customdata=[p.num_preemptions or 0 for p in curve.points],
                hovertemplate=f"%{{x:,}} {unit}: {shown}, %{{customdata:,}} preemptions",
                row=row,
                col=1,
            )
        if len(curves) == 1:
            _mark(figure, curve, unit)
    if goals and attain is not None:
        figure.add_hline(y=100 * attain, line={"color": INK, "dash": "dot", "width": 1}, row=1, col=1)
    figure.update_layout(**base_layout(520 if goals else 340))
    figure.update_layout(margin={"t": 80, "r": 20}, hovermode="closest", legend={"y": 1.08 if goals else 1.15})
    figure.update_yaxes(rangemode="tozero")
    if _spans_decades(curves):
        _logarithmic(figure, [p.value for curve in curves for p in curve.points])
    if goals:
        figure.update_yaxes(ticksuffix=" %", range=[0, 104], row=1, col=1)
    figure.update_xaxes(title=unit, row=len(titles), col=1)
    return figure


def _spans_decades(curves: Sequence[Curve]) -> bool:
    """Return whether values are as far apart as a search's: a linear axis would put all that matters to its edge."""
    values = [point.value for curve in curves for point in curve.points]
    return bool(values) and min(values) > 0 and max(values) > _DECADES * min(values)


def _logarithmic(figure: go.Figure, values: Sequence[float]) -> None:
    """Put `values` on a logarithmic axis, ticks at 1, 2 and 5 of each power of ten. Notes have to be moved, lines have not."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10**power for power in powers for digit in (1, 2, 5)]
    edge = 0.03 * math.log10(high / low)
    bounds = [math.log10(low) - edge, math.log10(high) + edge]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks], range=bounds)
    for note in figure.layout.annotations:
        if note.xref != "paper":  # a title of a panel
            note.x = math.log10(note.x)


def _symbol(point: CurvePoint) -> str:
    if point.num_preemptions:
        return "x" if point.fits else "x-open"
    return "circle" if point.fits else "circle-open"


def _mark(figure: go.Figure, curve: Curve, unit: str) -> None:
    """Mark the chosen value and where preemption begins, at different heights since they may be neighbours."""
    marks = (
        (curve.chosen, f"{amount(curve.chosen or 0, unit)} fit", INK, "solid", 0.2),
        (curve.onset, "preemptions", SOFT, "dash", 0.06),
    )
    for value, text, colour, dash, height in marks:
        if value is None:
            continue
        figure.add_vline(x=value, line={"color": colour, "dash": dash, "width": 1.5})
        note = {"showarrow": False, "bgcolor": PANEL, "borderpad": 2, "opacity": 0.9, "xanchor": "left"}
        figure.add_annotation(x=value, y=height, yref="y domain", text=text, **note)


def curve_words(curves: Sequence[Curve], *, unit: str) -> str:
    """Return what the curves say."""
    texts = []
    for curve in curves:
        if not curve.points:
            texts.append(f"{curve.name}: nothing could run.")
            continue
        last = curve.points[-1].value
        text = f"{curve.name}: {amount(curve.chosen, unit)} fit" if curve.chosen else f"{curve.name}: nothing that was tried fits"
        onset = (
            f"preemptions from {amount(curve.onset, unit)} on"
            if curve.onset is not None
            else f"no preemptions up to {amount(last, unit)}"
        )
        rates = [p.output_tokens_per_s for p in curve.points if p.output_tokens_per_s is not None]
        at_most = f"; at most {max(rates):,.0f} output tokens/s" if rates else ""
        texts.append(f"{text}; {onset}{at_most}.")
    return " ".join(texts)


CURVE_CAPTION = "Full markers: the load fits; empty ones: it does not; crosses: requests are preempted."
