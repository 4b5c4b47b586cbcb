"""Compiled code on disk is used again, but never after any source file of the package has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pagedkv
import pagedkv.sims
from pagedkv.block_moves import take_blocks
from pagedkv.jit import _package_digest

CALLER = """
from pagedkv.callee import value
from pagedkv.jit import jit

@jit
def doubled():
    return 2 * value()
"""
CALLEE = """
from pagedkv.jit import jit

@jit
def value():
    return {}
"""
DOUBLED = "from pagedkv.caller import doubled; print(doubled(), sum(doubled.stats.cache_hits.values()))"
DIGEST = "from pagedkv.jit import _package_digest; print(_package_digest())"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is needed, laid out as in a checkout: pagedkv/ and sims/ side by side."""
    return lay_out(tmp_path / "checkout")


def lay_out(root: Path) -> Path:
    core, sims = Path(str(pagedkv.__file__)).parent, Path(str(pagedkv.sims.__file__)).parent
    for name in ("__init__.py", "jit.py"):
        (root / "pagedkv").mkdir(parents=True, exist_ok=True)
        shutil.copy(core / name, root / "pagedkv" / name)
    (root / "sims" / "engines").mkdir(parents=True)
    shutil.copy(sims / "__init__.py", root / "sims" / "__init__.py")
    return root


def run(root: Path, code: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_stamp_of_a_compiled_function_holds_the_digest_of_the_package() -> None:
    compiled: Any = take_blocks
    if not hasattr(compiled, "_cache"):
        pytest.skip("compilation is switched off")
    assert _package_digest() in compiled._cache._cache_file._source_stamp


def test_a_change_in_a_file_that_is_called_is_seen(checkout: Path) -> None:
    (checkout / "pagedkv" / "caller.py").write_text(CALLER)
    (checkout / "pagedkv" / "callee.py").write_text(CALLEE.format(21))
    assert run(checkout, DOUBLED) == ["42", "0"]
    assert run(checkout, DOUBLED) == ["42", "1"]
    (checkout / "pagedkv" / "callee.py").write_text(CALLEE.format(50))
    assert run(checkout, DOUBLED) == ["100", "0"]


def test_the_digest_covers_the_simulator_and_nothing_beside_the_package(checkout: Path) -> None:
    before = run(checkout, DIGEST)
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "other.py").write_text("1")
    assert run(checkout, DIGEST) == before
    (checkout / "sims" / "new.py").write_text("1")
    assert run(checkout, DIGEST) != before


def test_the_digest_is_the_same_in_a_checkout_named_like_the_package(tmp_path: Path) -> None:
    checkout = lay_out(tmp_path / "pagedkv")  # what `git clone` makes
    before = run(checkout, DIGEST)
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "other.py").write_text("1")
    assert run(checkout, DIGEST) == before
