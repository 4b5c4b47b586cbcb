"""Where a file of the repository stands in the site, and Markdown whose links lead there.

The pages are written for readers of the repository: a link is a path from the file that it stands in. In the site docs/ is the
root, README.md and CONTRIBUTING.md are pages, a notebook is its executed copy, and a page shows any other file or folder.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""

_RENAMED = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "notebooks": "notebooks/index.md", "docs": "index.md"}
_FENCE = re.compile(r"^ *(`{3,}|~{3,})")
_LINK = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)|(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
"""Code, which is skipped, or what a link leads to."""
_PICTURES = (".svg", ".png")


class BrokenLinkError(Exception):
    """A page links to what is not there."""


def page_of(path: str) -> str:
    """Return the page of `path`, a file or folder of the repository: both relative, with slashes.

    >>> page_of("docs/howto/block-size.md"), page_of("notebooks/02-blocks.ipynb"), page_of("sims/cli.py")
    ('howto/block-size.md', 'notebooks/02-blocks.md', 'source/sims/cli.py.md')
    """
    inside = PurePosixPath(path)
    if path in _RENAMED:
        return _RENAMED[path]
    if inside.parts[0] == "docs" and inside.suffix in (".md", *_PICTURES):
        return str(inside.relative_to("docs"))
    if inside.parts[0] == "notebooks" and inside.suffix == ".ipynb":
        return str(inside.with_suffix(".md"))
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def path_of_link(target: str, at: str) -> str:
    """Return the path in the repository that a link to `target` in the file `at` means.

    Raises:
        BrokenLinkError: If nothing is there, or it is outside.
    """
    path = os.path.normpath(PurePosixPath(at).parent / target)
    if path.startswith("..") or not (ROOT / path).exists():
        raise BrokenLinkError(f"{at} links to {target}: there is no {path}")
    return path


def links(text: str) -> list[str]:
    """Return what the links of a Markdown text lead to inside the repository, without anchors."""
    found: list[str] = []

    def noted(target: str, anchor: str) -> str:
        found.append(target)
        return target + anchor

    _for_links(text, noted)
    return found


def rewritten(text: str, at: str) -> tuple[str, set[str]]:
    """Return the Markdown of the file `at` with links between pages, and the paths that they lead to.

    Raises:
        BrokenLinkError: If a link leads nowhere.
    """
    paths: set[str] = set()
    here = PurePosixPath(page_of(at)).parent

    def moved(target: str, anchor: str) -> str:
        path = path_of_link(target, at)
        paths.add(path)
        return os.path.relpath(page_of(path), here) + anchor

    return _for_links(text, moved), paths


def github_slug(title: str) -> str:
    """Return the anchor that GitHub gives a heading.

    >>> github_slug('What operators watch: `metrics.prom`')
    'what-operators-watch-metricsprom'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _for_links(text: str, moved: Callable[[str, str], str]) -> str:
    """Return `text` with every link outside of code as `moved` says."""

    def one(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if target is None or re.match(r"[a-z]+:", target):
            return match[0]
        return moved(target, anchor)

    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        lines.append(line if fence or mark else _LINK.sub(one, line))
    return "\n".join(lines)
