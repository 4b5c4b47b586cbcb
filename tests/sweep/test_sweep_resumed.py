"""A sweep goes on after a torn line or on a disk that was full, and ends in the bytes of an undisturbed one."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from small_sweep import FLAGS, grid, same

from pagedkv.errors import ConfigError
from pagedkv.sims.sweep import run_sweep


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_torn_last_line_is_done_again(cut: int, undisturbed: Path, tmp_path: Path) -> None:
    for name in ("sweep.json", "results.jsonl"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    lines = tmp_path / "results.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-cut])
    run_sweep(grid(FLAGS), tmp_path, workers=1)
    same(tmp_path, undisturbed)
    assert sorted(lines.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_line_that_is_none_is_done_again(undisturbed: Path, tmp_path: Path) -> None:
    for name in ("sweep.json", "results.jsonl"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = b"\0" * len(lines[3][:-1]) + b"\n"
    lines[5] = json.dumps({"hash": json.loads(lines[5])["hash"]}).encode() + b"\n"
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines))
    run_sweep(grid(FLAGS), tmp_path, workers=1)
    same(tmp_path, undisturbed)


def test_a_sweep_that_is_done_runs_nothing(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(config: Any) -> Any:
        raise AssertionError(config)

    monkeypatch.setattr("pagedkv.sims.workers.outcome", never)
    told: list[tuple[int, int]] = []
    run_sweep(grid(FLAGS), undisturbed, workers=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(10, 10)]


def test_a_full_disk_is_said_and_nothing_is_lost(undisturbed: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: a write is cut short, then refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, total: int) -> None:
        if done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "results.jsonl").stat().st_size + 99, hard))

    try:
        with pytest.raises(ConfigError, match="2 finished runs are kept: make room and repeat the command"):
            run_sweep(grid(FLAGS), tmp_path, workers=1, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines()
    assert (len(lines), len(lines[-1])) == (3, 99)  # the last line is torn
    assert not list(tmp_path.glob("results.csv"))
    run_sweep(grid(FLAGS), tmp_path, workers=1)
    same(tmp_path, undisturbed)
