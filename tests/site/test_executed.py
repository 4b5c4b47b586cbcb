"""Notebooks of the site: executed, unless a folder has a copy of the same cells."""

import json
from pathlib import Path
from typing import Any

import notebook_pages
import pytest

NAME = "notebooks/09-small.ipynb"


def stored(folder: Path, code: str) -> None:
    """Put a notebook of one cell where the site looks for notebooks."""
    cell = {"cell_type": "code", "id": "a", "source": code, "outputs": [], "execution_count": None, "metadata": {}}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    document = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": [cell]}
    (folder / "notebooks").mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(document), "utf-8")


def said(document: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for cell in document["cells"] for output in cell["outputs"]).strip()


def test_a_notebook_is_executed_once_with_the_pagedkv_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[docs]'")
    pytest.importorskip("ipykernel")
    monkeypatch.setattr(notebook_pages, "ROOT", tmp_path)
    kept = tmp_path / "kept"
    stored(tmp_path, "import os, pagedkv\nprint(os.getpid(), pagedkv.__file__)")
    first = said(notebook_pages.executed(NAME, kept))
    assert first.split()[1] == notebook_pages.pagedkv.__file__
    assert said(notebook_pages.executed(NAME, kept)) == first  # the copy
    assert said(notebook_pages.executed(NAME, None)) != first  # another process
    stored(tmp_path, "print('changed')")
    assert said(notebook_pages.executed(NAME, kept)) == "changed"
