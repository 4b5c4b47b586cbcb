"""What docs/runtime.md shows is what happens."""

import doctest
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
pytest.importorskip("transformers", reason="the runtime's models are transformers'")

PAGE = Path(__file__).parents[2] / "docs" / "runtime.md"


def test_the_page_is_true() -> None:
    with pytest.warns(FutureWarning, match="past_key_values"):
        result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0
