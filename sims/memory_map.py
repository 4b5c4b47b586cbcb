"""The memory map: physical blocks as cells, coloured by who holds them, over time; one function for reports, notebooks and docs.

A figure of plotly with a slider and a play button: no server, no widget. What a cell says is read from a `MemorySnapshot`, and can
be read back from the figure (`cells_of`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pagedkv.errors import ConfigError
from pagedkv.snapshot import NOBODY, MemorySnapshot, UnitState

MOST_CELLS = 4096
"""A map of more shows every n-th unit, and says so."""
MOST_NUMBERED = 64
"""In a map of no more cells, each shows its unit's number."""
_REQUEST_COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"),
    *("#4f9ccf", "#f2c14e", "#57bfa0", "#e0a9cc", "#f08a4b", "#9bd3f5"),
    *("#004d7a", "#a66f00", "#00664d", "#94577a", "#9c4400", "#2f86b5"),
)
"""Okabe and Ito's, then lighter and darker: neighbours in time are told apart by colour-blind readers and in print."""
_LIGHT = {UnitState.FREE: "#eef1f4", UnitState.CACHED: "#c9cfd6", UnitState.SET_ASIDE: "#6e7781"}
_DARK = {UnitState.FREE: "#22272e", UnitState.CACHED: "#4b535d", UnitState.SET_ASIDE: "#8b949e"}
_HOVER = (
    "block %{customdata[0]}<br>held by %{customdata[3]}<br>%{customdata[4]} tokens, %{customdata[5]} slots unfilled<extra></extra>"
)
_TABLE_ROWS, _TABLE_BLOCKS = 8, 12

Cells: TypeAlias = npt.NDArray[np.int64]
"""By unit shown: its number, its `UnitState`, owner (place among the live requests, or NOBODY), reference count, tokens, unfilled
slots: int64 [cells, 6]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One moment."""

    label: str
    """On the slider, e.g. "12.5 s", or "request B is admitted"."""
    snapshot: MemorySnapshot


def memory_map(
    panels: Mapping[str, Sequence[Frame]],
    *,
    most_cells: int = MOST_CELLS,
    tables: bool = True,
    dark: bool = False,
    columns: int = 0,
) -> go.Figure:
    """Return the map of one or more memories side by side, frame by frame.

    Args:
        panels: By title: as many frames for each, at the same moments.
        most_cells: Units shown of a memory at most.
        tables: Show the block tables of the requests below.
        dark: For a dark page.
        columns: Cells in a row; 0: a square, more or less.

    Raises:
        ConfigError: If there is no frame, or panels have different numbers of them.
    """
    numbers = {len(frames) for frames in panels.values()}
    if len(numbers) != 1 or 0 in numbers:
        shown = ", ".join(f"{name}: {len(frames)}" for name, frames in panels.items()) or "no memory"
        raise ConfigError(f"a memory map of frames of {shown}: needs as many of each, 1 or more")
    number = numbers.pop()
    figure = make_subplots(
        rows=2 if tables else 1,
        cols=len(panels),
        subplot_titles=[_title(name, frames[0].snapshot, most_cells) for name, frames in panels.items()],
        specs=[[{"type": "xy"}] * len(panels), *([[{"type": "table"}] * len(panels)] if tables else [])],
        row_heights=[0.72, 0.28] if tables else [1.0],
        vertical_spacing=0.04,
        horizontal_spacing=0.04,
    )
    palette = _palette(dark=dark)
    for place, frames in enumerate(panels.values(), start=1):
        for row, trace in enumerate(_traces(frames[0].snapshot, most_cells, columns, palette, tables=tables, dark=dark)):
            figure.add_trace(trace, row=1 if row < 2 else 2, col=place)
    labels = [frame.label for frame in next(iter(panels.values()))]
    figure.frames = [
        go.Frame(
            name=str(i),
            data=[
                trace
                for frames in panels.values()
                for trace in _traces(frames[i].snapshot, most_cells, columns, palette, tables=tables, dark=dark)
            ],
            traces=list(range(len(figure.data))),
        )
        for i in range(number)
    ]
    ink = "#e6edf3" if dark else "#1b1f24"
    figure.update_layout(
        template="plotly_dark" if dark else "plotly_white",
        height=620 if tables else 440,
        margin={"l": 10, "r": 10, "t": 60, "b": 10},
        font={"family": "system-ui, sans-serif", "size": 13, "color": ink},
        showlegend=False,
        **_controls(labels),
    )
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, autorange="reversed")
    return figure


def legend_text() -> str:
    """Return what the colours mean, for a caption."""
    return (
        "Each cell is a block. Coloured: held by a request, one colour each; ×2 and more: shared by so many; hatched: some of its "
        "slots are not filled; pale grey: cached, free for anyone who needs it; almost white: empty; dark: set aside."
    )


def cells_of(snapshot: MemorySnapshot, most_cells: int = MOST_CELLS) -> Cells:
    """Return what a map shows of `snapshot`: every n-th unit, n the least that leaves at most `most_cells`."""
    units = np.arange(0, snapshot.states.size, _every(snapshot, most_cells))
    return np.stack(
        (
            units,
            *(
                array[units]
                for array in (snapshot.states, snapshot.owners, snapshot.ref_counts, snapshot.tokens, snapshot.unfilled)
            ),
        ),
        axis=1,
    ).astype(np.int64)


def _every(snapshot: MemorySnapshot, most_cells: int) -> int:
    return max(-(-snapshot.states.size // most_cells), 1)


def _title(name: str, snapshot: MemorySnapshot, most_cells: int) -> str:
    every, units = _every(snapshot, most_cells), snapshot.states.size
    slots = f"{snapshot.unit_slots} token{'s' if snapshot.unit_slots > 1 else ''}"
    return f"{name}<br>{units:,} blocks of {slots}" + (f", every {every}th shown" if every > 1 else "")


def _palette(*, dark: bool) -> list[str]:
    """Return the colours by category: free, cached, set aside, then requests."""
    plain = _DARK if dark else _LIGHT
    return [plain[UnitState.FREE], plain[UnitState.CACHED], plain[UnitState.SET_ASIDE], *_REQUEST_COLOURS]


def _traces(
    snapshot: MemorySnapshot, most_cells: int, columns: int, palette: list[str], *, tables: bool, dark: bool
) -> list[go.Heatmap | go.Scatter | go.Table]:
    cells = cells_of(snapshot, most_cells)
    width = columns or max(int(np.ceil(np.sqrt(len(cells) * 1.6))), 1)
    height = -(-len(cells) // width)
    colours = _colour_numbers(snapshot)
    category = np.full(height * width, np.nan, np.float32)
    plain = {UnitState.FREE: 0, UnitState.CACHED: 1, UnitState.SET_ASIDE: 2, UnitState.HELD: 3}
    held = zip(cells[:, 1], cells[:, 2], strict=True)
    category[: len(cells)] = [3 + colours[owner] if owner != NOBODY else plain[UnitState(state)] for state, owner in held]
    data = np.full((height * width, cells.shape[1]), -1, np.int16 if cells.max(initial=0) < 1 << 15 else np.int32)  # a small page
    data[: len(cells)] = cells
    text = _text(cells, height * width)
    number = len(palette)
    scale = [[edge, colour] for i, colour in enumerate(palette) for edge in (i / number, (i + 1) / number)]
    heatmap = go.Heatmap(
        z=category.reshape(height, width),
        customdata=data.reshape(height, width, -1),
        text=None if text is None else np.array(text).reshape(height, width),
        texttemplate="%{text}",
        textfont={"size": 12 if len(cells) <= MOST_NUMBERED else 9},  # no colour: black or white, whichever is legible
        hovertemplate=_HOVER,
        zmin=-0.5,
        zmax=number - 0.5,
        colorscale=scale,
        showscale=False,
        xgap=1,
        ygap=1,
    )
    partly = np.flatnonzero(cells[:, 5] > 0)
    size, width_px, below_px = (12, 2, 7) if len(cells) <= MOST_NUMBERED else (7, 1.2, 0)
    hatch = go.Scatter(
        x=partly % width,
        y=partly // width,
        mode="markers",
        marker={
            "symbol": "line-ne",
            "size": size,
            "line": {"width": width_px, "color": "#ffffff" if dark else "#1b1f24"},
            "standoff": below_px,
        },
        hoverinfo="skip",
    )
    return [heatmap, hatch, *([_table(snapshot, dark=dark)] if tables else [])]


def _text(cells: Cells, places: int) -> list[str] | None:
    """Return what stands in each of `places` cells: how many share it, and its number if there are few; None if nothing does."""
    numbered = len(cells) <= MOST_NUMBERED
    if not numbered and not (cells[:, 3] > 1).any():
        return None
    shared = [f"×{count}" if count > 1 else "" for count in cells[:, 3]]
    # Above the middle of the cell, the hatching is below it.
    names = [f"{unit} {times}<br> " for unit, times in zip(cells[:, 0], shared, strict=True)] if numbered else shared
    return names + [""] * (places - len(cells))


def _colour_numbers(snapshot: MemorySnapshot) -> list[int]:
    """Return each live request's colour: by its name, so that it keeps it."""
    return [(name if isinstance(name, int) else sum(name.encode())) % len(_REQUEST_COLOURS) for name in snapshot.requests]


def _table(snapshot: MemorySnapshot, *, dark: bool) -> go.Table:
    """Return the block tables of the first requests, and how many more there are."""
    rows = list(zip(snapshot.requests, snapshot.tables, strict=True))
    names = [str(name) for name, _ in rows[:_TABLE_ROWS]]
    shown = [_blocks(tables[0].tolist() if tables else []) for _, tables in rows[:_TABLE_ROWS]]
    if len(rows) > _TABLE_ROWS:
        names.append("…")
        shown.append(f"and {len(rows) - _TABLE_ROWS:,} more requests")
    fill, ink = ("#161b22", "#e6edf3") if dark else ("#f6f8fa", "#1b1f24")
    cell: dict[str, Any] = {"align": "left", "fill": {"color": fill}, "font": {"color": ink, "size": 12}}
    return go.Table(
        columnwidth=[1, 6],
        header={"values": ["request", "its blocks, in the order of its tokens"], **cell},
        cells={"values": [names, shown], **cell},
    )


def _blocks(table: list[int]) -> str:
    text = " ".join(map(str, table[:_TABLE_BLOCKS]))
    return f"{text} … ({len(table):,} blocks)" if len(table) > _TABLE_BLOCKS else text


def _controls(labels: Sequence[str]) -> dict[str, Any]:
    """Return slider and buttons; nothing for a single frame."""
    if len(labels) == 1:
        return {}
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    play = {"fromcurrent": True, "frame": {"duration": 250, "redraw": True}, "transition": {"duration": 0}}
    return {
        "sliders": [
            {
                "steps": [{"label": label, "method": "animate", "args": [[str(i)], jump]} for i, label in enumerate(labels)],
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
