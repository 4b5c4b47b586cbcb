"""A sweep that is killed at any moment loses nothing: it ends in the bytes of an undisturbed one."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_sweep import BASE, FLAGS, grid, same

from pagedkv.sims.sweep import run_sweep

KILLS = int(os.environ.get("PAGEDKV_SWEEP_KILLS", "4"))
"""How often the sweep of the kill test is killed."""
COMMAND = [sys.executable, "-c", "from pagedkv.sims.cli import main; main()"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def long_sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return the flags of a sweep that has more runs than the kills let it finish, and the folder of one that nobody disturbed."""
    flags = f"{BASE} --users 2,6 --num-gpu-blocks-override 100 --seed 0..{16 * KILLS - 1}"
    folder = tmp_path_factory.mktemp("sweep") / "long"
    run_sweep(grid(flags), folder, workers=1)
    return flags, folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_killed_at_any_moment_ends_in_the_same_bytes(workers: int, long_sweep: tuple[str, Path], tmp_path: Path) -> None:
    """Most kills come a moment after a run is done, when the next is written or computed; some in the first two seconds."""
    flags, whole = long_sweep
    argv = [*COMMAND, "sweep", *shlex.split(flags), "--out", str(tmp_path), "--workers", str(workers)]
    dice, kept, kills = random.Random(workers), 0, 0
    lines = tmp_path / "results.jsonl"
    for i in range(KILLS):
        with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + (dice.uniform(0, 2) if i % 4 == 3 else 120)  # the first compilation takes its time
            while process.poll() is None and time.monotonic() < until and lines_of(lines) <= kept:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.1))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        assert lines_of(lines) >= kept  # nothing that was there is lost
        kept = lines_of(lines)
    assert kills >= 0.9 * KILLS  # or it is done too soon
    run_sweep(grid(flags), tmp_path, workers=1)
    same(tmp_path, whole)
    hashes = [json.loads(line)["hash"] for line in lines.read_text().splitlines()]
    assert len(hashes) == len(set(hashes)) == len(grid(flags))  # nothing was done twice


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    argv = [*COMMAND, "sweep", *shlex.split(FLAGS.replace("8s", "90000s")), "--out", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        children = wait_for(lambda: workers_of(process.pid))
        process.kill()
    wait_for(lambda: not any(map(runs, children)))


def workers_of(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return workers if len(workers) == 2 else []


def runs(pid: int) -> bool:
    """Whether a process has not ended: one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what: Any) -> Any:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if value := what():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen within two minutes")


def test_ctrl_c_keeps_what_is_done_and_says_so(undisturbed: Path, tmp_path: Path) -> None:
    argv = [*COMMAND, "sweep", *shlex.split(FLAGS.replace("2..10:2", "2..400:2")), "--out", str(tmp_path), "--workers", "1"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: lines_of(tmp_path / "results.jsonl") >= 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert f"of 400 runs are kept in {tmp_path}" in err
    assert "Traceback" not in err
    before = lines_of(tmp_path / "results.jsonl")
    run_sweep(grid(FLAGS), tmp_path, workers=1)  # fewer values of the same flags: what is there is used
    same(tmp_path, undisturbed)
    assert lines_of(tmp_path / "results.jsonl") < before + 10


def test_a_worker_that_is_killed_is_said(tmp_path: Path) -> None:
    argv = [*COMMAND, "sweep", *shlex.split(FLAGS.replace("8s", "90000s")), "--out", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        os.kill(wait_for(lambda: workers_of(process.pid))[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process was killed" in err
    assert "Traceback" not in err
