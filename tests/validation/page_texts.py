"""Where pages of the validation are, and when two of their texts are the same."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def same(committed: str, fresh: str) -> None:
    """Hold that two texts have the same words and, but for another processor's rounding, the same numbers."""
    assert NUMBER.sub("#", committed) == NUMBER.sub("#", fresh)
    numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (committed, fresh)]
    for ours, theirs in zip(*numbers, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05, abs=0.6)
