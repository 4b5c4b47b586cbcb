"""Build the site: `python docs/site FOLDER`. Every broken link and every warning is an error."""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import api_pages
import cli_pages
import map_figure
import notebook_pages
from navigation import with_navigation
from plotly.offline import get_plotlyjs
from plotly_page import figure_block, scripts
from repository_links import ROOT, page_of, rewritten
from source_pages import source_page
from sphinx.cmd.build import build_main

HERE = Path(__file__).parent
_LEFT_OUT = ("site",)
"""Folders of docs/ that hold no pages."""
AT_ONCE = 2
"""Notebooks that are executed side by side: each has a process of its own."""
MAP_MARK = "*(Here the built site has the picture: `pip install '.[docs]'`, `python docs/site build/site`.)*"
"""In docs/memory-map.md."""


def write(folder: Path, page: str, text: str) -> None:
    """Write a page of the site's source."""
    path = folder / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def stage(folder: Path, executed: Path | None) -> None:
    """Write all pages and what they need to `folder`, for Sphinx to read."""
    linked: set[str] = set()
    for path in _pages():
        text, found = rewritten((ROOT / path).read_text("utf-8"), path)
        linked |= found
        write(folder, page_of(path), with_navigation(_with_map(text), page_of(path)))
    for picture in [*(ROOT / "docs").glob("*.svg"), *(ROOT / "docs" / "validation").glob("*.svg")]:
        target = folder / page_of(picture.relative_to(ROOT).as_posix())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    paths = notebook_pages.notebooks()
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        documents = list(pool.map(notebook_pages.executed, paths, [executed] * len(paths)))
    for path, document in zip(paths, documents, strict=True):
        text, found = notebook_pages.notebook_page(path, document)
        linked |= found
        write(folder, page_of(path), text)
    _write_indexes(folder)
    for name, text in cli_pages.command_pages().items():
        write(folder, f"reference/cli/{name}.md", text)
    for name, text in api_pages.api_pages().items():
        write(folder, f"reference/api/{name}.rst", text)
    _write_sources(folder, linked)
    shutil.copytree(HERE / "static", folder / "_static")
    write(folder, "_static/plotly.min.js", get_plotlyjs())


def _pages() -> list[str]:
    inside = [path for path in (ROOT / "docs").rglob("*.md") if path.relative_to(ROOT / "docs").parts[0] not in _LEFT_OUT]
    return [*sorted(path.relative_to(ROOT).as_posix() for path in inside), "README.md", "CONTRIBUTING.md"]


def _with_map(text: str) -> str:
    if MAP_MARK not in text:
        return text
    light, dark = map_figure.figures(map_figure.frames())
    block = figure_block(light, label="Memory map: paged and contiguous allocation side by side, over time", dark=dark)
    return text.replace(MAP_MARK, f"{scripts('memory-map.md')}\n\n{block}")


def _write_indexes(folder: Path) -> None:
    for page, text in {
        "notebooks/index.md": notebook_pages.index_page(),
        "reference/cli/index.md": cli_pages.index_page(),
        "reference/api/index.rst": api_pages.index_page(),
    }.items():
        write(folder, page, with_navigation(text, page))


def _write_sources(folder: Path, paths: set[str]) -> None:
    """Write a page for every file and folder that others link to, and for the files of these folders."""
    waiting = {path for path in paths if page_of(path).startswith("source/")}
    done: set[str] = set()
    while waiting - done:
        path = min(waiting - done)
        done.add(path)
        text, inside = source_page(path)
        waiting.update(inside)
        write(folder, page_of(path), text)


def main() -> int:
    """Build it, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python docs/site", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the site goes")
    parser.add_argument("--executed", type=Path, help="folder of executed notebooks: those that are there are not executed again")
    asked = parser.parse_args()
    if (asked.folder / ".buildinfo").is_file():  # an earlier site, whose pages may have gone
        shutil.rmtree(asked.folder)
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "pages"
        stage(source, asked.executed)
        options = ["-W", "--keep-going", "-q", "-b", "html", "-d", f"{work}/doctrees", "-c", str(HERE)]
        options += ["-D", f"html_static_path={source}/_static"]
        return int(build_main([*options, str(source), str(asked.folder)]))


if __name__ == "__main__":
    sys.exit(main())
