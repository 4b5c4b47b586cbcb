"""A terminal without Unicode: signs of ASCII that still say something, bars above all; and flags that were meant."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagedkv.sims
from pagedkv.sims.cli import main
from pagedkv.sims.console_timeline import _LOOKS
from pagedkv.sims.plain_signs import PLAIN, plain

COMMAND = [sys.executable, "-c", "from pagedkv.sims.cli import main; main()"]


@given(st.text())
def test_any_text_is_shown_in_ascii_and_as_wide(text: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=PLAIN)
    file.write(text)
    shown = plain(text)
    assert shown.isascii()
    assert len(shown) == len(text)
    if text.isascii():
        assert shown == text


def test_every_sign_of_the_views_has_one_that_is_no_question_mark() -> None:
    (folder,) = {str(Path(path)) for path in pagedkv.sims.__path__}
    for file in Path(folder).glob("console*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "?" not in plain(node.value.replace("?", "")), (file.name, node.value)


def test_the_marks_of_a_bar_stay_apart() -> None:
    marks = [plain(mark) for mark, _ in _LOOKS.values()]
    assert len({*marks, plain("·")}) == len(marks) + 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_shows_bars(encoding: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": encoding}
    asked = [*COMMAND, "budget", "--model", "qwen3-8b"]
    out = subprocess.run(asked, env=environment, capture_output=True, check=True).stdout.decode(encoding)
    assert "####" in out
    assert "?" not in out


@pytest.mark.parametrize(
    ("flag", "proposed"),
    [
        ("--bogus", None),
        ("--bogus=3", None),
        ("--x", None),
        ("--modle", "--model"),
        ("--max-len", "--max-model-len"),
        ("--user", "--users"),
    ],
)
def test_only_a_flag_that_is_near_is_proposed(flag: str, proposed: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([flag, "5"])
    err = capsys.readouterr().err
    assert f"Unknown option: {flag.partition('=')[0]}." in err
    assert ("Did you mean" in err) == (proposed is not None)
    assert proposed is None or f"Did you mean {proposed}?" in err
