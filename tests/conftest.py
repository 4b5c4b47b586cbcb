"""What every test may use."""

import contextlib
import io
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from pagedkv.sims.cli import main

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real traces, logs and measurements that lies beside a checkout; the product does not ship it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no validation data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def children_can_be_interrupted() -> Iterator[None]:
    """Let SIGINT reach the processes that tests start, even where these run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def said() -> Callable[..., tuple[str, str]]:
    """What a command says, given as words without its name: on stdout, and on stderr. Each is run once."""

    @cache
    def say(*words: str) -> tuple[str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
            main(words)
        return out.getvalue(), err.getvalue()

    return say
