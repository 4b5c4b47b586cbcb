"""The memory map: physical blocks as cells, coloured by who holds them, over time; one function for reports, notebooks and docs.

A figure of plotly with a slider and a play button: no server, no widget. What a cell says is read from a `MemorySnapshot`, and can
be read back from the figure (`cells_of`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pagedkv.errors import ConfigError
from pagedkv.sims.memory_panel import MOST_CELLS, MOST_NUMBERED, Frame, MemoryPanel, cells_of
from pagedkv.sims.palette import DARK, DARK_PAGE, INK, base_layout

__all__ = ["MOST_CELLS", "MOST_NUMBERED", "Frame", "cells_of", "legend_text", "memory_map"]

_TITLE_PX = 13
"""Size of the panels' titles: three lines fit above a panel."""


def memory_map(
    panels: Mapping[str, Sequence[Frame]],
    *,
    most_cells: int = MOST_CELLS,
    tables: bool = True,
    dark: bool = False,
    columns: int = 0,
    first: int = 0,
) -> go.Figure:
    """Return the map of one or more memories side by side, frame by frame.

    Args:
        panels: By title: as many frames for each, at the same moments.
        most_cells: Units shown of a memory at most.
        tables: Show the block tables of the requests below.
        dark: For a dark page.
        columns: Cells in a row; 0: a square, more or less.
        first: Place of the frame that is shown at first.

    Raises:
        ConfigError: If there is no frame, or panels have different numbers of them.
    """
    numbers = {len(frames) for frames in panels.values()}
    if len(numbers) != 1 or 0 in numbers:
        shown = ", ".join(f"{name}: {len(frames)}" for name, frames in panels.items()) or "no memory"
        raise ConfigError(f"a memory map of frames of {shown}: needs as many of each, 1 or more")
    number = numbers.pop()
    drawn = [
        MemoryPanel(name=name, frames=frames, most_cells=most_cells, columns=columns, tables=tables)
        for name, frames in panels.items()
    ]
    figure = make_subplots(
        rows=2 if tables else 1,
        cols=len(panels),
        subplot_titles=[panel.title for panel in drawn],
        specs=[[{"type": "xy"}] * len(panels), *([[{"type": "table"}] * len(panels)] if tables else [])],
        row_heights=[0.7, 0.3] if tables else [1.0],
        vertical_spacing=0.04,
        horizontal_spacing=0.04,
    )
    for place, panel in enumerate(drawn, start=1):
        for row, trace in enumerate(panel.whole(first, dark=dark)):
            figure.add_trace(trace, row=1 if row < 2 else 2, col=place)
    figure.frames = [
        go.Frame(
            name=str(i),
            data=[trace for panel in drawn for trace in panel.moment(i)],
            traces=list(range(len(figure.data))),
        )
        for i in range(number)
    ]
    figure.update_layout(**base_layout(660 if tables else 440))
    figure.update_layout(margin={"t": 60}, hovermode="closest", showlegend=False)
    figure.update_annotations(font_size=_TITLE_PX)
    if dark:
        figure.update_layout(paper_bgcolor=DARK_PAGE, plot_bgcolor=DARK_PAGE, font={"color": DARK[INK]})
    figure.update_layout(**_controls([frame.label for frame in next(iter(panels.values()))], first))
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, autorange="reversed")
    return figure


def legend_text() -> str:
    """Return what the colours mean, for a caption."""
    return (
        "Each cell is a block. Coloured: held by a request, one colour each; ×2 and more: shared by so many; hatched: some of its "
        "slots are not filled; light grey: cached, free for anyone who needs it; barely tinted: empty; mid grey: set aside."
    )


def _controls(labels: Sequence[str], first: int) -> dict[str, Any]:
    """Return slider and buttons; nothing for a single frame."""
    if len(labels) == 1:
        return {}
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    play = {"fromcurrent": True, "frame": {"duration": 250, "redraw": True}, "transition": {"duration": 0}}
    return {
        "sliders": [
            {
                "steps": [{"label": label, "method": "animate", "args": [[str(i)], jump]} for i, label in enumerate(labels)],
                "active": first,
                "currentvalue": {"prefix": "at "},
                "pad": {"t": 10, "l": 110, "r": 40},
            }
        ],
        "updatemenus": [
            {
                "type": "buttons",
                "direction": "left",
                "x": 0,
                "y": 0,
                "xanchor": "left",
                "yanchor": "top",
                "pad": {"t": 25},
                "showactive": False,
                "buttons": [
                    {"label": "▶", "method": "animate", "args": [None, play]},
                    {"label": "❚❚", "method": "animate", "args": [[None], jump]},
                ],
            }
        ],
    }
