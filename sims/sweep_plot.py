"""The picture of a sweep: one figure against the first swept flag, a line per combination of the others, in one offline page."""

from html import escape

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from pagedkv.sims.flat_figures import interval
from pagedkv.sims.sweep import Sweep, labels, value_text
from pagedkv.sims.sweep_findings import lines_along

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("solid", "dash", "dot", "dashdot")
_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
_STYLE = (
    "body{margin:0 auto;max-width:72rem;padding:.6rem;font:16px/1.5 system-ui,sans-serif;color:#1b1f24}"
    "h1{font-size:1.3rem;line-height:1.25;overflow-wrap:anywhere}"
)
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def figure(sweep: Sweep, metric: str) -> go.Figure:
    """Return `metric` against the first swept flag, with 95 % intervals where there are repeats; crosses mark preemption."""
    axis = sweep.grid.axes[0]
    picture = go.Figure()
    for i, (others, line) in enumerate(lines_along(axis, sweep.rows)):
        known = [row for row in line if row.figure(metric) is not None]
        bounds = [interval(row.outcome["result"], metric) for row in known]
        values = [row.figure(metric) for row in known]
        halves = [0.0 if bound is None else (bound[1] - bound[0]) / 2 for bound in bounds]
        picture.add_scatter(
            x=[value_text(row.values[axis.name]) for row in known],
            y=values,
            error_y={"array": halves} if any(bounds) else None,
            name=labels(others) or metric,
            mode="lines+markers",
            line={"color": _COLOURS[i % len(_COLOURS)], "dash": _DASHES[i // len(_COLOURS) % len(_DASHES)]},
            marker={"size": 8, "symbol": ["x" if row.figure("num_preemptions") else "circle" for row in known]},
        )
    picture.update_layout(
        template="plotly_white",
        height=560,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1b1f24"},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
    )
    picture.update_xaxes(title=axis.name.replace("_", "-"), type="linear" if axis.numeric else "category")
    picture.update_yaxes(title=metric, rangemode="tozero", automargin=True)
    return picture


def html(sweep: Sweep, metric: str) -> str:
    """Return the page. It loads nothing from anywhere."""
    title = f"{metric} by {', '.join(axis.name.replace('_', '-') for axis in sweep.grid.axes)}"
    body = to_html(
        figure(sweep, metric), include_plotlyjs=False, include_mathjax=False, full_html=False, config=_CONFIG, div_id="sweep"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)} · pagedkv</title>\n<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n<p>A cross marks a run with preemptions.</p>\n</body>\n</html>\n"
    )
