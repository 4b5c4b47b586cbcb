"""Compiled code on disk is used again, but never after any source file of the package has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numba
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
    for name in ("__init__.py", "compilation.py", "jit.py", "inner_code.py", "call_types.py", "tuple_reference.py"):
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


def test_an_installed_package_finds_what_a_checkout_has_compiled(checkout: Path, tmp_path: Path) -> None:
    (checkout / "pagedkv" / "caller.py").write_text(CALLER)
    (checkout / "pagedkv" / "callee.py").write_text(CALLEE.format(21))
    assert run(checkout, DOUBLED) == ["42", "0"]
    installed = tmp_path / "installed" / "pagedkv"
    shutil.copytree(checkout / "pagedkv", installed)
    shutil.copytree(checkout / "sims", installed / "sims")
    assert run(installed.parent, DIGEST) == run(checkout, DIGEST)
    assert run(installed.parent, DOUBLED) == ["42", "1"]


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


class Inside(NamedTuple):
    counts: Any
    factor: float
    is_doubled: bool


class Outside(NamedTuple):
    records: Any
    inside: Inside
    table: Any
    every_other: Any
    pair: tuple[int, float]
    number: int


@lean_jit
def _total(inside: Inside, start: float) -> float:
    for i in range(inside.counts.size):
        inside.counts[i] += 1
    total = start + inside.factor * inside.counts.sum()
    return 2 * total if inside.is_doubled else total


@lean_jit
def _all_of(outside: Outside, rows: int) -> tuple[float, int, float, int, float]:
    for row in range(rows):
        outside.records[row]["b"] = outside.table[row, 1] + outside.every_other[row]
    made_here = Inside(outside.inside.counts, 1.0, False)
    negative = outside.every_other[-1]
    return _total(outside.inside, 0.5), negative, _total(made_here, 0.0), len(outside.records), outside.pair[0] * outside.pair[1]


def outside_of(rows: int, factor: float, *, is_doubled: bool) -> Outside:
    records = np.zeros(rows, [("a", "<i4"), ("b", "<i8")])
    inside = Inside(np.arange(rows), factor, is_doubled)
    return Outside(records, inside, np.arange(2 * rows).reshape(rows, 2), np.arange(2 * rows)[::2], (3, 0.5), rows)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("is_doubled", [False, True])
def test_compiled_code_sees_the_fields_of_tuples_as_python_does(rows: int, is_doubled: bool) -> None:
    compiled, plain = outside_of(rows, 1.5, is_doubled=is_doubled), outside_of(rows, 1.5, is_doubled=is_doubled)
    function: Any = _all_of
    expected_total = (1 + is_doubled) * (0.5 + 1.5 * sum(range(1, rows + 1)))
    expected = (expected_total, 2 * rows - 2, sum(range(2, rows + 2)), rows, 1.5)
    assert function(compiled, rows) == expected
    assert function(outside_of(rows, 1.5, is_doubled=is_doubled), rows) == expected  # other arrays, elsewhere in memory
    assert compiled.inside.counts.tolist() == (plain.inside.counts + 2).tolist()
    assert compiled.records["b"].tolist() == [2 * row + 1 + 2 * row for row in range(rows)]


def test_fields_of_a_tuple_that_are_not_there_are_refused() -> None:
    if not hasattr(_total, "_inner"):
        pytest.skip("compilation is switched off")

    @lean_jit
    def asks(inside: Inside) -> int:
        return inside.lengths  # type: ignore[attr-defined, no-any-return]

    with pytest.raises(numba.TypingError, match="lengths"):
        asks(Inside(np.arange(3), 1.0, is_doubled=False))


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
