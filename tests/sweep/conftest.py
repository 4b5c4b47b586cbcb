"""Lets these tests import what they share, and runs once the sweep that they look at."""

import sys
from pathlib import Path

import pytest

from pagedkv.sims.sweep import run_sweep

sys.path.insert(0, str(Path(__file__).parent))

from small_sweep import FLAGS, grid  # it is on the path from here on


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep of `FLAGS`, done in one go. Whoever repeats it there leaves the same bytes."""
    folder = tmp_path_factory.mktemp("sweep") / "undisturbed"
    run_sweep(grid(FLAGS), folder, workers=1)
    return folder
