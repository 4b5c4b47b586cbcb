"""One memory of a memory map: its cells at each moment, as traces of plotly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from pagedkv.sims.palette import DARK, GRID, HATCH, INK, NEUTRAL, PANEL, WHITE
from pagedkv.snapshot import NOBODY, MemorySnapshot, UnitState

MOST_CELLS = 4096
"""A map of more shows every n-th unit, and says so."""
MOST_NUMBERED = 64
"""In a map of no more cells, each shows its unit's number."""
REQUEST_COLOURS = (
    *("#0072b3", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"),
    *("#4f9ccf", "#f2c14e", "#57bfa0", "#e0a9cc", "#f08a4b", "#9bd3f5"),
    *("#004d7a", "#a66f00", "#00664d", "#94577a", "#9c4400", "#2f86b5"),
)
"""Okabe and Ito's, then lighter and darker: neighbours in time are told apart by colour-blind readers and in print.

The first is a shade off `palette.BLUE`, which is another on a dark page: there it would be next to the seventh.
"""
_PLAIN_COLOURS = ("#eef1f4", "#c9cfd6", NEUTRAL)
"""Of units that nobody holds: free, cached, set aside. Those of requests are the same on a dark page."""
_HOVER = (
    "block %{customdata[0]}<br>held by %{customdata[3]}<br>%{customdata[4]} tokens, %{customdata[5]} slots unfilled<extra></extra>"
)
_TABLE_ROWS, _TABLE_BLOCKS, _TABLE_LETTERS = 5, 12, 26
"""Requests shown; of each, blocks, or as many as so many letters name: what fits on a telephone."""

Cells: TypeAlias = npt.NDArray[np.int64]
"""By unit shown: its number, its `UnitState`, owner (place among the live requests, or NOBODY), reference count, tokens, unfilled
slots: int64 [cells, 6]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One moment."""

    label: str
    """On the slider, e.g. "12.5 s", or "request B is admitted"."""
    snapshot: MemorySnapshot


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


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _every(snapshot: MemorySnapshot, most_cells: int) -> int:
    return max(-(-snapshot.states.size // most_cells), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPanel:
    """What a map draws of one memory."""

    name: str
    frames: Sequence[Frame]
    """In order, one or more."""
    most_cells: int
    columns: int
    """Cells in a row; 0: a square, more or less."""
    tables: bool
    """Whether the block tables stand below."""

    @property
    def title(self) -> str:
        """Whose memory it is, of how many blocks, and how many of them are shown: in lines that a telephone shows whole."""
        first = self.frames[0].snapshot
        every, units = _every(first, self.most_cells), first.states.size
        slots = f"{first.unit_slots} token{'s' if first.unit_slots > 1 else ''}"
        return f"{self.name}<br>{units:,} blocks of {slots}" + (f"<br>every {_ordinal(every)} shown" if every > 1 else "")

    def whole(self, place: int, *, dark: bool) -> list[go.Heatmap | go.Scatter | go.Table]:
        """Return the traces at a moment, with what is the same at all of them: colours and sizes."""
        heatmap, hatch, *table = self.moment(place)
        numbered = self._num_cells <= MOST_NUMBERED
        colours = [*(DARK.get(colour, colour) if dark else colour for colour in _PLAIN_COLOURS), *REQUEST_COLOURS]
        number = len(colours)
        heatmap.update(
            texttemplate="%{text}",
            textfont={"size": 12 if numbered else 9},  # no colour: black or white, whichever is legible
            hovertemplate=_HOVER,
            zmin=-0.5,
            zmax=number - 0.5,
            colorscale=[[edge, colour] for i, colour in enumerate(colours) for edge in (i / number, (i + 1) / number)],
            showscale=False,
            xgap=1,
            ygap=1,
        )
        line = {"width": 2 if numbered else 1.2, "colorscale": [[0, HATCH], [1, WHITE]], "cmin": 0, "cmax": 1}
        marker = {"symbol": "line-ne", "size": 12 if numbered else 7, "standoff": 7 if numbered else 0, "line": line}
        hatch.update(mode="markers", marker=marker, hoverinfo="skip")
        fill, ink = (DARK[PANEL], DARK[INK]) if dark else (PANEL, INK)
        cell: dict[str, Any] = {
            "align": "left",
            "fill": {"color": fill},
            "font": {"color": ink, "size": 12},
            "line": {"color": DARK[GRID] if dark else GRID},
        }
        for each in table:
            each.update(columnwidth=[1, 6], cells={**cell, "height": 22})
            each.update(header={"values": ["request", "its blocks, in the order of its tokens"], **cell})
        return [heatmap, hatch, *table]

    def moment(self, place: int) -> list[go.Heatmap | go.Scatter | go.Table]:
        """Return the traces at a moment, but only what changes from one to the next."""
        snapshot = self.frames[place].snapshot
        cells = cells_of(snapshot, self.most_cells)
        width = self.columns or max(int(np.ceil(np.sqrt(len(cells) * 1.6))), 1)
        height = -(-len(cells) // width)
        category = np.full(height * width, np.nan, np.float32)
        category[: len(cells)] = _categories(cells, snapshot)
        kind = np.int16 if cells.max(initial=0) < 1 << 15 else np.int32  # a small page
        data = np.full((height * width, cells.shape[1]), -1, kind)
        data[: len(cells)] = cells
        text = self._text(cells, height * width)
        heatmap = go.Heatmap(
            z=category.reshape(height, width),
            customdata=data.reshape(height, width, -1),
            text=None if text is None else np.array(text).reshape(height, width),
        )
        partly = np.flatnonzero(cells[:, 5] > 0)
        strokes = _is_dark(category[partly]).astype(np.int8)
        hatch = go.Scatter(x=partly % width, y=partly // width, marker={"line": {"color": strokes}})
        return [heatmap, hatch, *([go.Table(cells={"values": _table(snapshot)})] if self.tables else [])]

    @property
    def _num_cells(self) -> int:
        snapshot = self.frames[0].snapshot
        return -(-snapshot.states.size // _every(snapshot, self.most_cells))

    def _text(self, cells: Cells, places: int) -> list[str] | None:
        """Return what stands in each of `places` cells: how many share it, and its number if there are few; None if nothing does.

        What stands there at one moment would stay at the next one, if that said nothing.
        """
        numbered = self._num_cells <= MOST_NUMBERED
        if not numbered and not any((frame.snapshot.ref_counts > 1).any() for frame in self.frames):
            return None
        shared = [f"×{count}" if count > 1 else "" for count in cells[:, 3]]
        # Above the middle of the cell, the hatching is below it.
        names = [f"{unit} {times}<br> " for unit, times in zip(cells[:, 0], shared, strict=True)] if numbered else shared
        return names + [""] * (places - len(cells))


def _categories(cells: Cells, snapshot: MemorySnapshot) -> list[int]:
    """Return the place of each cell's colour: 0 free, 1 cached, 2 set aside, then by request, who keeps its colour."""
    colours = [(name if isinstance(name, int) else sum(name.encode())) % len(REQUEST_COLOURS) for name in snapshot.requests]
    plain = {UnitState.FREE: 0, UnitState.CACHED: 1, UnitState.SET_ASIDE: 2, UnitState.HELD: 3}
    held = zip(cells[:, 1], cells[:, 2], strict=True)
    return [3 + colours[owner] if owner != NOBODY else plain[UnitState(state)] for state, owner in held]


def _is_dark(category: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return whether strokes on these colours must be white."""
    return _DARK_CATEGORY[category.astype(np.int64)]


def _luminance(colour: str) -> float:
    """Return the relative luminance. Source: WCAG 2.2."""
    shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


_DARK_CATEGORY = np.array([_luminance(colour) < 0.18 for colour in (*_PLAIN_COLOURS, *REQUEST_COLOURS)])
"""0.18: where white and black contrast alike."""


def _table(snapshot: MemorySnapshot) -> list[list[str]]:
    """Return the block tables of the first requests, and how many more there are: names, and blocks."""
    rows = list(zip(snapshot.requests, snapshot.tables, strict=True))
    names = [str(name) for name, _ in rows[:_TABLE_ROWS]]
    shown = [_blocks(tables[0].tolist() if tables else []) for _, tables in rows[:_TABLE_ROWS]]
    if len(rows) > _TABLE_ROWS:
        names.append("…")
        shown.append(f"and {len(rows) - _TABLE_ROWS:,} more requests")
    return [names, shown]


def _blocks(table: list[int]) -> str:
    names = [str(block) for block in table[:_TABLE_BLOCKS]]
    while len(table) > _TABLE_BLOCKS and len(" ".join(names)) > _TABLE_LETTERS:
        names.pop()
    text = " ".join(names)
    return f"{text} … ({len(table):,} blocks)" if len(table) > len(names) else text
