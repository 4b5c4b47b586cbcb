"""Executed notebooks as pages: their text, code and outputs; figures stay figures."""

import json
import os
import re
from pathlib import Path
from typing import Any

from plotly_page import figure_block, scripts
from repository_links import ROOT, rewritten

import pagedkv

PLOTLY = "application/vnd.plotly.v1+json"
_FOLDED = {"check": "The check", "solution": "A solution"}
_ABOUT = (
    "Eight to learn from, with predictions and exercises. These are copies that were executed when the site was built; to run and "
    "change them: `pip install 'pagedkv[notebooks]'` and `jupyter lab notebooks` in a checkout."
)
Document = dict[str, Any]


def notebooks() -> list[str]:
    """Return the paths of the notebooks, in order."""
    return [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def executed(path: str, folder: Path | None) -> Document:
    """Return the notebook `path` with outputs: executed now, or the copy in `folder` if one is there that has the same cells.

    What is executed is put into `folder`. Nothing notices there that pagedkv itself has changed.
    """
    source: Document = json.loads((ROOT / path).read_text("utf-8"))
    copy = None if folder is None else folder / Path(path).name
    if copy is not None and copy.is_file():
        document: Document = json.loads(copy.read_text("utf-8"))
        if _sources(document) == _sources(source):
            return document
    document = _execute(path)
    if copy is not None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(document), "utf-8")
    return document


def notebook_page(path: str, document: Document) -> tuple[str, set[str]]:
    """Return the Markdown of an executed notebook, and the paths that it links to."""
    title = re.search(r"^# (.*)$", _text(document["cells"][0]), re.M)
    assert title is not None
    parts = [scripts(path)]
    paths: set[str] = set()
    for number, cell in enumerate(document["cells"]):
        if cell["cell_type"] == "markdown":
            text, found = rewritten(_text(cell), path)
            paths |= found
            parts.append(text)
        else:
            parts.append(_code(cell, label=f"Figure of cell {number + 1}"))
    # The title stays first: Sphinx names the page by it.
    parts[0], parts[1] = parts[1], parts[0]
    return "\n\n".join(parts) + "\n", paths


def index_page() -> str:
    """Return the page that lists the notebooks, each with its idea."""
    rows = []
    for path in notebooks():
        idea = re.search(r"\*\*The idea\.\*\* (.*?)(?:\n\n|\Z)", _first_cell(path), re.S)
        assert idea is not None
        rows.append(f"* [{_numbered_title(path)}]({Path(path).stem}.md): {idea[1]}".replace("\n", " "))
    return "\n\n".join(["# Notebooks", _ABOUT, "\n".join(rows)]) + "\n"


def menu_entry(path: str) -> str:
    """Return how the menu names a notebook, and its page."""
    return f"{_numbered_title(path)} <{Path(path).stem}>"


def _numbered_title(path: str) -> str:
    return f"{Path(path).name[:2]} {_first_cell(path).partition(chr(10))[0].removeprefix('# ')}"


def _first_cell(path: str) -> str:
    return _text(json.loads((ROOT / path).read_text("utf-8"))["cells"][0])


def _code(cell: Document, *, label: str) -> str:
    parts = [f"```python\n{_text(cell).rstrip()}\n```", *(_output(output, label) for output in cell["outputs"])]
    folded = [_FOLDED[tag] for tag in cell["metadata"].get("tags", ()) if tag in _FOLDED]
    if folded:
        parts = [f"<details><summary>{folded[0]}</summary>", *parts, "</details>"]
    return "\n\n".join(part for part in parts if part)


def _output(output: Document, label: str) -> str:
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]))
    data = output.get("data", {})
    if PLOTLY in data:
        return figure_block(data[PLOTLY], label=label)
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return _fenced("".join(data.get("text/plain", "")))


def _fenced(text: str) -> str:
    return f"```{{code-block}} text\n:class: output\n\n{text.rstrip()}\n```" if text.strip() else ""


def _text(cell: Document) -> str:
    return "".join(cell["source"])


def _sources(document: Document) -> list[tuple[str, str]]:
    return [(cell["cell_type"], _text(cell)) for cell in document["cells"]]


def _execute(path: str) -> Document:
    import nbclient  # noqa: PLC0415 - only who executes needs a kernel
    import nbformat  # noqa: PLC0415

    document = nbformat.read(ROOT / path, as_version=4)
    nbclient.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute(
        env=os.environ | {"PYTHONPATH": str(Path(pagedkv.__file__).parents[1])}  # the kernel has the pagedkv that this process has
    )
    as_json: Document = json.loads(nbformat.writes(document))
    return as_json
