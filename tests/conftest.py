"""What every test may use."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real traces, logs and measurements that lies beside a checkout; the product does not ship it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no validation data at {SHARED_DATA}")
    return SHARED_DATA
