"""Compiled code on disk is used again, but never after any source file of the package has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pagedkv
import pagedkv.sims
from pagedkv.block_moves import take_blocks
from pagedkv.jit import _package_digest, fixed_types, lean_jit

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
    for name in ("__init__.py", "jit.py", "inner_code.py"):
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


@lean_jit
def _scaled(values: Any, factor: int) -> int:
    for i in range(values.size):
        values[i] *= factor
    return int(values.sum())


@lean_jit
def _scaled_by_all(values: Any, factors: Any, narrow: Any) -> tuple[int, int, int]:
    return _scaled(values, factors[0]), _scaled(values, narrow[0]), _scaled(values, 5)


def test_compiled_callers_share_one_version_for_all_signed_integers() -> None:
    values = np.arange(4)
    assert _scaled_by_all(values, np.array([2]), np.array([3], np.int32)) == (12, 36, 180)
    assert values.tolist() == [0, 30, 60, 90]
    compiled: Any = _scaled
    if hasattr(compiled, "_inner"):
        assert len(compiled._inner.overloads) <= 1  # none if it was found on disk, in its caller
    assert _scaled(values, 2) == 360  # and Python can call it too


def test_fixed_types_do_what_the_function_does_every_time() -> None:
    scaled, values = fixed_types(_scaled), np.arange(4)
    assert [scaled(values, 2), scaled(values, 3), scaled(np.arange(5), 1)] == [12, 36, 10]
    with pytest.raises(TypeError):
        scaled(values)  # type: ignore[call-arg]


def lean(code: str) -> str:
    return code.replace("import jit", "import lean_jit").replace("@jit", "@lean_jit")


def test_a_lean_function_is_found_on_disk(checkout: Path) -> None:
    (checkout / "pagedkv" / "caller.py").write_text(lean(CALLER))
    (checkout / "pagedkv" / "callee.py").write_text(lean(CALLEE).format(21))
    assert run(checkout, DOUBLED) == ["42", "0"]
    assert run(checkout, DOUBLED) == ["42", "1"]
    (checkout / "pagedkv" / "callee.py").write_text(lean(CALLEE).format(5))
    assert run(checkout, DOUBLED) == ["10", "0"]
