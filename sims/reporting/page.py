"""An offline page: one file that loads nothing from anywhere. All text that a user chose is escaped."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from pagedkv import __version__
from pagedkv.sims.palette import DARK

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""The browser itself holds the page to loading nothing."""
_CONTROLS = ("sliders", "updatemenus")
"""Plotly's own controls are for notebooks: no key reaches them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page under a heading."""

    anchor: str
    """Its id."""
    title: str
    body: str
    """HTML."""
    drawings: tuple["Drawing", ...] = ()
    """The figures in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure, and what it says."""

    name: str
    """Its id is figure-`name`; a file of it is called so."""
    figure: Figure
    words: str
    """The same in a sentence or two, with the main numbers: for those who do not see it."""


def page(title: str, head: str, sections: Sequence[Section], *, closing: str = "Simulated; see the assumptions.") -> str:
    """Return the page: `head` (HTML, with the h1), links to the sections, the sections, a last line."""
    links = "".join(f'<li><a href="#{each.anchor}">{escape(each.title)}</a></li>' for each in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)} · pagedkv</title>\n<style>\n{_file('page.css')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">To the answer</a>\n<main id="main">\n{head}\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        "<noscript><p>The pictures need JavaScript; what each says stands below it, in words.</p></noscript>\n"
        + "\n".join(_section(each) for each in sections)
        + f'\n</main>\n<p class="soft">pagedkv {__version__}. {escape(closing)}</p>\n'
        '<p id="said" class="unseen" role="status" aria-live="polite"></p>\n'
        f'<script type="application/json" id="dark-colours">{json.dumps(DARK)}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>\n{_file('page.js')}</script>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    name = f"{section.anchor}-title"
    heading = f'<h2 id="{name}">{escape(section.title)}</h2>'
    return f'<section id="{section.anchor}" aria-labelledby="{name}">\n{heading}\n{section.body}\n</section>'


def picture(drawing: Drawing, caption: str) -> str:
    """Return a figure, `caption` (HTML) below it, and what it says in words."""
    return f"<figure>{_drawn(drawing)}{_caption(caption)}{_words(drawing)}</figure>"


def pictures(drawings: Sequence[Drawing], caption: str, labels: Sequence[str], first: int) -> str:
    """Return figures side by side with one slider and play button for the frames of all.

    `labels` are their moments, of which the one at `first` is drawn.
    """
    each_drawn = "".join(f"<div>{_drawn(each)}{_words(each)}</div>" for each in drawings)
    return f'<figure><div class="side-by-side">{each_drawn}</div>{_player(drawings, labels, first)}{_caption(caption)}</figure>'


def _caption(caption: str) -> str:
    return f"<figcaption>{caption}</figcaption>" if caption else ""


def _words(drawing: Drawing) -> str:
    return f'<details class="words"><summary>In words</summary><p>{escape(drawing.words)}</p></details>'


def _drawn(drawing: Drawing) -> str:
    anchor = f"figure-{drawing.name}"
    spec = json.loads(drawing.figure.to_json(validate=False))
    spec["layout"] = {name: value for name, value in spec["layout"].items() if name not in _CONTROLS}
    text = json.dumps(spec, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    height = drawing.figure.layout.height
    return (
        f'<div class="drawing" id="{anchor}" data-figure role="img" aria-label="{escape(drawing.words)}" '
        f'style="height:{height}px"></div>'
        f'<script type="application/json" id="{anchor}-data">{text}</script>'
    )


def _player(drawings: Sequence[Drawing], labels: Sequence[str], first: int) -> str:
    if len(labels) < 2:
        return ""
    names, texts = " ".join(f"figure-{each.name}" for each in drawings), escape(json.dumps(list(labels), ensure_ascii=False))
    return (
        f'<div class="player" data-figures="{names}" data-labels="{texts}"><button type="button" aria-pressed="false">Play</button>'
        f'<input type="range" min="0" max="{len(labels) - 1}" value="{first}" aria-label="Moment shown" '
        f'aria-valuetext="{escape(labels[first])}"><output>{escape(labels[first])}</output></div>'
    )


def command(anchor: str, text: str) -> str:
    """Return a command with a button that copies it. No line ends inside a flag, unless that is longer than a line."""
    words = " ".join(f"<span>{escape(word)}</span>" for word in text.split(" "))
    return (
        f'<div class="command"><code id="{anchor}">{words}</code>'
        f'<button type="button" data-copy="{anchor}" aria-describedby="{anchor}">Copy</button></div>'
    )


def badge(text: str, kind: str = "") -> str:
    """Return a short text as a badge, of the colour of its `kind` (its text, unless given)."""
    return f'<span class="badge {kind or text}">{escape(text)}</span>'


def table(head: Sequence[str], body: str, *, kind: str = "", label: str) -> str:
    """Return a table of the rows `body` (HTML), which scrolls by itself, with keys too, where it is too wide."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f'<table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def rows(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of a table, the first cell of each its heading; text, not HTML."""
    return "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in cells
    )


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
