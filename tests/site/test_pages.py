"""The pages before they are a site: links, titles, menu, and what is generated."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import api_pages
import cli_pages
import map_figure
import navigation
import notebook_pages
import plotly_page
import pytest
import repository_links
import source_pages
from repository_links import ROOT, github_slug, links, page_of, path_of_link, rewritten

from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig
from pagedkv.snapshot import UnitState

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEADING = re.compile(r"^#+ (.*)$", re.M)


def of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def bare(entry: str) -> str:
    """The page of an entry of the menu, which may have words of its own."""
    return entry.partition("<")[2].removesuffix(">") or entry


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_links_lead_to_files_and_headings_here_and_on_github(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in links(text):
        assert path_of_link(target, of(page))
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)\s#]*)#([^)\s]+)\)", without_code(text)):
        there = page if not target else ROOT / path_of_link(target, of(page))
        assert anchor in map(github_slug, HEADING.findall(without_code(there.read_text("utf-8")))), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_a_page_begins_with_its_only_title(page: Path) -> None:
    text = without_code(page.read_text("utf-8"))
    assert text.startswith("# ")
    assert len(re.findall("^# ", text, re.M)) == 1


def test_links_are_rewritten_to_pages_and_code_is_left_alone() -> None:
    text = (
        "[a](../README.md) [b](metrics.md#requests) [c](../sims/cli.py) [d](https://x.y) `[e](../f)`\n```\n[g](../h)\n```\n[i](#j)"
    )
    moved, paths = rewritten(text, "docs/models.md")
    assert moved.startswith("[a](readme.md) [b](metrics.md#requests) [c](source/sims/cli.py.md) [d](https://x.y) `[e](../f)`")
    assert "[g](../h)" in moved
    assert moved.endswith("[i](#j)")
    assert paths == {"README.md", "docs/metrics.md", "sims/cli.py"}


@pytest.mark.parametrize("target", ["nothing.md", "../../outside.md"])
def test_a_broken_link_is_an_error(target: str) -> None:
    with pytest.raises(repository_links.BrokenLinkError, match=r"docs/models\.md links to"):
        rewritten(f"[a]({target})", "docs/models.md")


def test_every_page_is_in_the_menu() -> None:
    listed = {
        f"{Path(page).parent / bare(name)}" for page, groups in navigation.CONTENTS.items() for _, names in groups for name in names
    }
    there = {str(Path(page_of(of(page))).with_suffix("")) for page in PAGES}
    assert there - {"index"} <= listed
    generated = {f"reference/cli/{name}" for name in cli_pages.command_pages()} | {
        f"reference/api/{name}" for name in api_pages.PAGES
    }
    assert generated <= listed
    assert {str(Path(page_of(path)).with_suffix("")) for path in notebook_pages.notebooks()} <= listed


def test_every_command_and_every_flag_is_in_the_reference() -> None:
    pages = cli_pages.command_pages()
    registered = re.findall(
        r"@tools\.command\ndef (\w+)|tools\.command\((\w+)\)", "".join(p.read_text() for p in (ROOT / "sims").glob("cli*.py"))
    )
    names = {(a or b).replace("_", "-") for a, b in registered} - {"question"}
    assert names < set(pages)
    assert {"max-users", "sweep", "serve", "simulate"} < set(pages)
    assert all(f"]({name}.md)" in cli_pages.index_page() for name in pages)
    for field in (*fields(LoadConfig), *fields(ServingConfig), *fields(MeasurementConfig)):
        assert f"--{field.name.replace('_', '-')}" in pages["simulate"], field.name
    for name, page in pages.items():
        assert page.startswith("# ")
        assert f"simulate{'' if name == 'simulate' else ' ' + name}" in page


def test_what_docs_and_notebooks_import_is_in_the_reference_of_the_library() -> None:
    shown = {module for page in api_pages.PAGES.values() for module in page["modules"]}
    shown |= {page["names_of"] for page in api_pages.PAGES.values() if "names_of" in page}
    code = "".join(page.read_text("utf-8") for page in PAGES)
    for path in notebook_pages.notebooks():
        code += "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / path).read_text("utf-8"))["cells"]) + "\n"
    imported = set(re.findall(r"^(?:>>> )?from (pagedkv[\w.]*) import", code, re.M)) - {
        "pagedkv",
        "pagedkv.sims",
        "pagedkv.kernels",
    }
    assert len(imported) > 20
    assert imported <= shown


def test_modules_of_the_reference_say_what_they_are() -> None:
    for page in api_pages.PAGES.values():
        for module in page["modules"]:
            path = ROOT.joinpath(*re.sub(r"^pagedkv\.(sims|kernels)\b", r"\1", module).split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert ast.get_docstring(ast.parse(file.read_text("utf-8")))


def test_a_notebook_becomes_a_page() -> None:
    figure = {"data": [{"y": [1, 2]}], "layout": {"title": {"text": "</script>"}}}
    cells = [
        {"cell_type": "markdown", "source": ["# T\n", "see [x](../docs/metrics.md#rates)"]},
        {
            "cell_type": "code",
            "source": "f",
            "metadata": {"tags": ["solution"]},
            "outputs": [
                {"output_type": "stream", "text": ["hello\n"]},
                {"output_type": "display_data", "data": {notebook_pages.PLOTLY: figure, "text/plain": "F"}},
            ],
        },
    ]
    text, paths = notebook_pages.notebook_page("notebooks/02-blocks-and-tables.ipynb", {"cells": cells})
    assert text.startswith("# T\nsee [x](../metrics.md#rates)")
    assert paths == {"docs/metrics.md"}
    assert "<summary>A solution</summary>" in text
    assert "\nhello\n" in text
    (data,) = re.findall(r'<script type="application/json" data-theme="light">(.*?)</script>', text)
    assert json.loads(data) == figure
    assert plotly_page.scripts("notebooks/02.md") in text


def test_a_folder_and_a_file_become_pages() -> None:
    text, files = source_pages.source_page("sims/routing")
    assert "sims/routing/round_robin.py" in files
    assert "[round_robin.py](round_robin.py.md): " in text
    assert "```python\n" in source_pages.source_page("sims/cli.py")[0]


def test_the_memory_map_shows_what_its_page_says() -> None:
    panels = map_figure.frames()
    assert set(panels) == {"paged", "contiguous-max"}
    assert {len(frames) for frames in panels.values()} == {map_figure.NUM_FRAMES}
    paged, contiguous = ([frame.snapshot for frame in frames] for frames in panels.values())
    assert {snapshot.states.size for snapshot in (*paged, *contiguous)} == {map_figure.NUM_BLOCKS}
    pieces = map_figure.NUM_BLOCKS * 16 // 1024
    full = [snapshot for snapshot in contiguous if len(snapshot.requests) == pieces]
    assert pieces == 7
    assert full, "all pieces are taken at some moment"
    assert all(snapshot.unfilled.sum() > snapshot.states.size * 16 / 2 for snapshot in full), (
        "though more than half of the memory is empty"
    )
    assert max(len(snapshot.requests) for snapshot in paged) == 15
    assert any((snapshot.states == UnitState.CACHED).any() for snapshot in paged)
    assert not any((snapshot.states == UnitState.CACHED).any() for snapshot in contiguous)
    light, dark = map_figure.figures(panels)
    assert len(light["frames"]) == len(dark["frames"]) == map_figure.NUM_FRAMES
