"""Colours of figures and pages. Those of data are Okabe and Ito's: distinct for colour-blind readers and in print.

Figures are drawn for a light page; `DARK` says what each colour that would not show on a dark one becomes there.
"""

INK, SOFT, GRID, PANEL = "#1b1f24", "#57606a", "#e3e7eb", "#f6f8fa"
"""Text and goals; what is beside the point; lines of a grid; a raised surface."""
DARK_PAGE = "#0d1117"
"""What a dark page is painted with."""
WHITE = "#ffffff"
"""On a coloured surface, on any page."""
HATCH = "#111418"
"""Strokes on a bright coloured surface, on any page."""
NEUTRAL, TOTAL = "#6e7781", "#586069"
"""Bars that are not what a figure is about, and their sum: white text is legible on both."""

BLUE, ORANGE, GREEN, PINK, VERMILION, SKY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"
BLACK = "#000000"

SERIES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK)
"""Lines, one each per allocator or setting, told apart by `DASHES` too."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

DARK = {
    INK: "#e6edf3",
    SOFT: "#9aa4af",
    GRID: "#30363d",
    PANEL: "#161b22",
    BLACK: "#ffffff",
    BLUE: "#2f8fd0",
    "#e8eaed": "#2a3038",
    "#eef1f4": "#22272e",
    "#c9cfd6": "#4b535d",
}
"""By colour of a light page: what it is on a dark one. Contrast with the page is 3 and more for data, 7 and more for text."""


def series(place: int) -> dict[str, object]:
    """Return the line of the series at `place`."""
    return {
        "color": SERIES[place % len(SERIES)],
        "dash": DASHES[place % len(DASHES)],
        "width": 3 if place == 0 else 2,
    }  # the first shows under another that is the same


def base_layout(height: int) -> dict[str, object]:
    """Return what the layouts of all figures have in common."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True}
    return {
        "template": {"layout": {"xaxis": axis, "yaxis": axis}},
        "paper_bgcolor": WHITE,
        "plot_bgcolor": WHITE,
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 30, "b": 10},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "hoverlabel": {"bgcolor": PANEL, "bordercolor": GRID, "font": {"color": INK}},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "hovermode": "x unified",
    }
