"""Files of results are written whole or not at all, whatever stops it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from result_folders import FILES, REPORT, one_line

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.export import prepare_folder, write_atomically

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = "--users 3 --think-time 1s --duration 3s --warmup 0 --out r".split()


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def on_call(number: int, original: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Return `original`, except that its call `number` (from 0) raises."""
    calls = iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return original(*args, **kwargs)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The result folder of one run, and what another would leave there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        patch.setattr(REPORT, one_line)
        main([*SMALL, "--seed", "2"])
        other = contents("r")
        shutil.rmtree("r")
        main([*SMALL, "--seed", "1"])
        return Path("r").absolute(), other


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(
    ("owner", "name", "error", "code"),
    [
        (Path, "replace", KeyboardInterrupt(), 130),
        (os, "fsync", KeyboardInterrupt(), 130),
        (os, "fsync", OSError(28, "No space left"), 2),
    ],
    ids=["interrupted at the end", "interrupted while writing", "disk full"],
)
def test_whatever_stops_writing_leaves_whole_files(
    owner: Any,
    name: str,
    error: BaseException,
    code: int,
    number: int,
    whole: tuple[Path, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, new = whole
    shutil.copytree(written, "r")
    old = contents("r")
    monkeypatch.setattr(owner, name, on_call(number, getattr(owner, name), error))
    with pytest.raises(SystemExit) as exit:
        main([*SMALL, "--seed", "2", "--overwrite"])
    assert exit.value.code == code
    after = contents("r")
    assert after.keys() == old.keys()  # nothing half-written lies about
    assert sum(after[file] == new[file] for file in FILES) == number
    assert all(after[file] in (old[file], new[file]) for file in FILES)


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit):
        main(SMALL)
    assert contents("r") == {}
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"error: cannot write {os.path.join('r', 'config.toml')!r}: No space left on device"  # noqa: PTH118


def test_a_new_file_has_the_permissions_of_any_other(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(folder / "x", "text")
    finally:
        os.umask(before)
    assert (folder / "x").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_made_or_refused(folder: Path) -> None:
    prepare_folder(folder / "a" / "b")
    assert list((folder / "a" / "b").iterdir()) == []
    (folder / "file").write_text("")
    for bad in (folder / "file", folder / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"cannot write results to '{bad}': .*Give --out a folder that you may write to"):
            prepare_folder(bad)


def test_a_pipe_stays_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(folder / "pipe", "text")
    except ConfigError:
        pass
    finally:
        os.close(reader)
    assert (folder / "pipe").is_fifo()
