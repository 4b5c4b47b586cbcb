"""Choices are files of a folder: adding one is adding a file."""

import importlib
import sys
from pathlib import Path

import pytest

from pagedkv.errors import ConfigError
from pagedkv.registry import Registry

CHOICE = """
from shelf import THINGS

@THINGS.register("{name}")
def thing():
    return "{name}"
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    """The registry of a package with choices first-fit and other, a helper, and one that cannot be imported."""
    package = tmp_path / "shelf"
    package.mkdir()
    (package / "__init__.py").write_text("from pagedkv.registry import Registry\nTHINGS = Registry(__name__, kind='thing')\n")
    (package / "first_fit.py").write_text(CHOICE.format(name="first-fit"))
    (package / "other.py").write_text(CHOICE.format(name="other"))
    (package / "broken.py").write_text("raise RuntimeError('imported')")
    (package / "_helper.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "shelf"]:
        monkeypatch.delitem(sys.modules, name)
    things: Registry[object] = importlib.import_module("shelf").THINGS
    return things


def test_names_are_the_files_and_listing_them_imports_none(shelf: Registry[object]) -> None:
    assert shelf.names() == ("broken", "first-fit", "other")
    assert not [name for name in sys.modules if name.startswith("shelf.")]


def test_a_choice_is_imported_when_it_is_used(shelf: Registry[object]) -> None:
    choice = shelf.load("first-fit")
    assert callable(choice)
    assert choice() == "first-fit"
    assert shelf.load("first-fit") is choice
    assert "shelf.other" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):
        shelf.load("broken")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("frist-fit", r"unknown thing 'frist-fit': did you mean first-fit\?"),
        ("First-Fit", r"unknown thing 'First-Fit': did you mean first-fit\?"),
        ("xyz", "unknown thing 'xyz': known: broken, first-fit, other."),
        ("first_fit", "unknown thing 'first_fit'"),  # the file's name is not the choice's
        ("_helper", "unknown thing '_helper'"),
        ("", "unknown thing ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_near_ones(shelf: Registry[object], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shelf.load(name)
