"""Figures of plotly in a page: their data stands in it, the library beside it, once for the site."""

import json
from typing import Any

FIGURE = '<div class="plotly-figure" role="group" aria-label="{label}" data-height="{height}">'
_NOSCRIPT = "<noscript>This picture needs JavaScript.</noscript>"


def figure_block(figure: dict[str, Any], *, label: str, dark: dict[str, Any] | None = None) -> str:
    """Return HTML that stands in Markdown: `figure` (data, layout, perhaps frames), and how it looks on a dark page if it can."""
    height = figure.get("layout", {}).get("height", 450)
    parts = [FIGURE.format(label=label, height=height), _NOSCRIPT, _data(figure, "light")]
    if dark is not None:
        parts.append(_data(dark, "dark"))
    return "\n".join([*parts, "</div>"])


def scripts(page: str) -> str:
    """Return what a page with figures loads: from the site's own folder."""
    up = "../" * page.count("/")
    return "\n".join(f'<script defer src="{up}_static/{name}"></script>' for name in ("plotly.min.js", "figures.js"))


def _data(figure: dict[str, Any], theme: str) -> str:
    kept = {key: figure[key] for key in ("data", "layout", "frames") if key in figure}
    text = json.dumps(kept, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    return f'<script type="application/json" data-theme="{theme}">{text}</script>'
