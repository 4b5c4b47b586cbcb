"""The site's own modules lie in docs/site, `net_log` here; pytest's importlib mode finds them only on the path."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "site"), str(Path(__file__).parent)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--site", type=Path, help="a site that `python docs/site FOLDER` has built, to be looked at")


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest) -> Path:
    """The built site."""
    folder: Path | None = request.config.getoption("--site")
    if folder is None:
        pytest.skip("no site to look at: build one with `python docs/site FOLDER`, and give it with --site FOLDER")
    return folder.resolve()
