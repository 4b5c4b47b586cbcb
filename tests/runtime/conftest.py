"""Test modules here share `tiny_models`, which pytest's importlib mode finds only on the path. Each skips without torch."""

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numba
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and threads that wait for each other on a busy machine cost far more than the work."""
    if find_spec("torch") is not None:
        torch = import_module("torch")
        threads = torch.get_num_threads(), numba.get_num_threads()
        torch.set_num_threads(1)
        numba.set_num_threads(1)
        yield
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])
    else:
        yield
