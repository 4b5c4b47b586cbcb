"""An offline page: one file that loads nothing from anywhere. All text that a user chose is escaped."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from plotly.graph_objects import Figure
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from pagedkv import __version__

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""The browser itself holds the page to loading nothing."""


def page(title: str, sections: Sequence[str]) -> str:
    """Return the page of `sections`, each from `section`."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)} · pagedkv</title>\n<style>\n{_file('page.css')}</style>\n<script>{get_plotlyjs()}</script>\n"
        "</head>\n<body>\n"
        + "\n".join(sections)
        + f'\n<p class="soft">pagedkv {__version__}. Simulated; see the assumptions.</p>\n<script>\n{_file("page.js")}</script>\n'
        + "</body>\n</html>\n"
    )


def section(anchor: str, title: str, body: str) -> str:
    """Return a section under a heading."""
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def figure(name: str, drawn: Figure, caption: str) -> str:
    """Return a figure, `caption` (HTML) below."""
    body = to_html(
        drawn,
        include_plotlyjs=False,
        include_mathjax=False,
        full_html=False,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
        auto_play=False,
        div_id=f"figure-{name}",
    )
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


def command(anchor: str, text: str) -> str:
    """Return a command with a button that copies it."""
    return (
        f'<div class="command"><code id="{anchor}">{escape(text)}</code>'
        f'<button type="button" data-copy="{anchor}" aria-label="Copy the command">Copy</button></div>'
    )


def badge(status: str) -> str:
    """Return a status as a badge."""
    return f'<span class="badge {status}">{status}</span>'


def table(head: tuple[str, ...], body: str, *, kind: str = "") -> str:
    """Return a table of the rows `body` (HTML), which scrolls by itself where it is too wide."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
