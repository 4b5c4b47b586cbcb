"""What a progress line says: what is going on, how far it is, and how long it will still take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.compilation import Compilation
from pagedkv.sims.progress import STARTING, ProgressLine, in_words

ROOT = Path(__file__).parents[1]


def test_it_speaks_of_compiling_only_while_something_is_compiled() -> None:
    state = Compilation()
    line = ProgressLine(state)
    assert line.at(1.0, 0.0, STARTING) == ("", "  0% starting")
    state.begin()
    assert line.at(1.2, 0.0, STARTING) == ("", "  0% starting, compiling (kept for later runs)")
    state.end()
    assert line.at(1.4, 0.0, "paged") == ("", "  0% paged")
    state.begin()
    state.end()  # between two looks
    assert line.at(1.6, 0.0, "paged")[1] == "  0% paged, compiling (kept for later runs)"


def test_what_was_compiled_before_does_not_count() -> None:
    assert ProgressLine(Compilation(num_begun=7)).at(1.0, 0.0, STARTING) == ("", "  0% starting")


def test_that_nothing_can_be_kept_is_said_once_with_the_remedy() -> None:
    state = Compilation(kept=False)
    line = ProgressLine(state)
    assert line.at(1.0, 0.0, STARTING) == ("", "  0% starting"), "nothing has been compiled yet"
    state.begin()
    note, text = line.at(1.2, 0.0, STARTING)
    assert "set NUMBA_CACHE_DIR" in note
    assert text == "  0% starting, compiling"
    assert line.at(1.4, 0.0, STARTING)[0] == ""


@given(rate=st.floats(1e-5, 0.05), start_s=st.floats(1, 100), compile_s=st.floats(0, 60), until=st.integers(30, 200))
def test_what_is_left_is_what_a_steady_rate_leaves(rate: float, start_s: float, compile_s: float, until: int) -> None:
    state = Compilation()
    line = ProgressLine(state)
    line.at(start_s, 0.0, STARTING)
    state.begin()
    line.at(start_s + compile_s, 0.0, "paged")
    state.end()
    begun_s = start_s + compile_s + 0.2
    text = ""
    for i in range(until):
        share = min(rate * 0.2 * i, 1.0)
        text = line.at(begun_s + 0.2 * i, share, "paged")[1]
    left_s = (1 - share) / rate
    if left_s >= 2:
        assert text.endswith(f", {in_words(left_s)} left") or any(
            text.endswith(f", {in_words(left_s * nearly)} left") for nearly in (0.98, 0.99, 0.999, 1.001, 1.01, 1.02)
        )


def test_nothing_is_estimated_before_there_is_something_to_go_by() -> None:
    line = ProgressLine(Compilation())
    assert "left" not in line.at(1.0, 0.02, "paged")[1]
    assert "left" not in line.at(2.0, 0.02, "paged")[1]
    assert "left" not in line.at(3.0, 0.04, "paged")[1], "two seconds are no rate"
    assert line.at(121.0, 0.04, "paged")[1] == "  4% paged"
    assert line.at(241.0, 0.06, "paged")[1] == "  6% paged, about 1.6 h left"
    assert line.at(541.0, 0.06, "paged")[1] == "  6% paged, about 89 min left"


@pytest.mark.parametrize(
    ("duration_s", "words"),
    [(1, "1 s"), (44, "40 s"), (91, "2 min"), (5300, "88 min"), (5900, "1.6 h"), (130_000, "1.5 days")],
)
def test_durations_are_said_as_one_would(duration_s: float, words: str) -> None:
    assert in_words(duration_s) == f"about {words}"


KEEPS = """
from pagedkv.compilation import COMPILATION
from pagedkv.jit import jit

@jit
def double(x):
    return 2 * x

double(3)
first = COMPILATION.num_begun
double(4)
print(COMPILATION.kept, first > 0, COMPILATION.num_begun == first, COMPILATION.num_running)
"""


def test_jit_says_what_it_compiles_and_whether_it_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "doubles.py"
    file.write_text(KEEPS, encoding="utf-8")
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    assert _run(str(file), more=kept) == "True True True 0"
    assert _run(str(file), more=kept) == "True False True 0", "read from disk, not compiled"
    assert _run("-c", KEEPS, more=kept) == "False True True 0", "numba has no folder for code that is in no file"


def _run(*arguments: str, more: dict[str, str]) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True).stdout.strip()
