"""Where executed notebooks are kept, for the site to show."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-executed", type=Path, help="a folder for executed notebooks, for `python docs/site --executed`")


@pytest.fixture
def kept(request: pytest.FixtureRequest) -> Path | None:
    """The folder for executed notebooks."""
    folder: Path | None = request.config.getoption("--keep-executed")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder
