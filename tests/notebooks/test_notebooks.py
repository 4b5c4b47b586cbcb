"""The notebooks: short, without stored outputs, and executed; what their figures show is what the data says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import pagedkv

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_CELLS = 25
PLOTLY = "application/vnd.plotly.v1+json"


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def text(path: Path, kind: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells(path, kind))


def tagged(path: Path, tag: str) -> list[dict[str, Any]]:
    return [cell for cell in cells(path, "code") if tag in cell["metadata"].get("tags", ())]


def test_there_are_eight() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}-" for number in range(1, 9)]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_notebook_is_short_and_stores_no_outputs(notebook: Path) -> None:
    document = json.loads(notebook.read_text("utf-8"))
    assert (document["nbformat"], document["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len(document["cells"]) <= MOST_CELLS
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])
    for cell in cells(notebook, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_a_notebook_has_an_idea_predictions_exercises_and_says_what_it_leaves_out(notebook: Path) -> None:
    prose = text(notebook, "markdown")
    assert prose.startswith("# ")
    assert "**The idea.**" in "".join(cells(notebook, "markdown")[0]["source"])
    assert len(re.findall("[Bb]efore you run this:", prose)) >= 3
    assert len(re.findall(r"^## Exercise \d", prose, re.M)) == len(tagged(notebook, "exercise")) == 2
    assert "".join(json.loads(notebook.read_text("utf-8"))["cells"][-1]["source"]).startswith("## What this leaves out")


def test_behind_an_exercise_come_its_check_and_a_folded_solution(notebook: Path) -> None:
    kinds = [cell["metadata"].get("tags", [""])[0] for cell in cells(notebook, "code")]
    for place, kind in enumerate(kinds):
        if kind == "exercise":
            assert kinds[place : place + 3] == ["exercise", "check", "solution"]
    assert {kinds.count(tag) for tag in ("exercise", "check", "solution")} == {2}
    for cell in tagged(notebook, "check") + tagged(notebook, "solution"):
        assert cell["metadata"]["jupyter"]["source_hidden"]


def test_links_lead_somewhere(notebook: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text(notebook, "markdown"))
    assert links
    for link in links:
        assert not link.startswith("http"), f"{link}: a student may be offline"
        assert (notebook.parent / link.partition("#")[0]).is_file(), link


def test_a_notebook_uses_the_public_api_only(notebook: Path) -> None:
    code = text(notebook, "code")
    assert not re.findall(r"\._[a-z]\w*|import _\w+|from pagedkv\S*\._", code)
    assert "from pagedkv" in code
    assert "torch" not in code


def test_a_notebook_runs_its_checks_tell_wrong_from_right_and_its_figures_show_the_data(
    notebook: Path, kept: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[test-notebooks]'")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    document = nbformat.read(notebook, as_version=4)
    probe = f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport figure_checks\nfigure_checks.check_figures(globals())"
    document.cells.append(nbformat.v4.new_code_cell(f"import sys\n{probe}"))
    monkeypatch.setenv("PYTHONPATH", str(Path(pagedkv.__file__).parents[1]))  # the kernel has the pagedkv that this test has
    nbclient.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(notebook.parent)}}).execute()
    outputs = {cell.id: cell.outputs for cell in document.cells if cell.cell_type == "code"}
    for tag, begins in (("check", "Not yet"), ("solution", "Right")):
        for cell in tagged(notebook, tag):
            said = "".join(output.get("text", "") for output in outputs[cell["id"]])
            assert said.startswith(begins), said
    assert not [output for each in outputs.values() for output in each if output.get("name") == "stderr"]
    shown = [output for each in outputs.values() for output in each if PLOTLY in output.get("data", {})]
    checked = document.cells[-1].outputs[-1]["data"]["text/plain"].count("'") // 2
    assert len(shown) == checked >= 2
    if kept is not None:
        del document.cells[-1]
        (kept / notebook.name).write_text(nbformat.writes(document), "utf-8")
