"""The Triton kernels against the reference, on the CPU. The interpreter is chosen at import, so it gets a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("torch", reason="the Triton kernels need torch")
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernels/interpreted_triton.py")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
