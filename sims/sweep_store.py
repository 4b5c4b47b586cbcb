"""The folder of a sweep: what is swept, and a line per finished run that survives whatever ends the program."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pagedkv import __version__
from pagedkv.errors import ConfigError
from pagedkv.sims.command import flat
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.export import prepare_folder, to_json, write_atomically
from pagedkv.sims.sweep_grid import Grid

SCHEMA_VERSION = 1
HEADER, LINES = "sweep.json", "results.jsonl"
RESULTS = ("results.csv", "results.json", "sweep.html")
"""What a sweep writes when all is done."""
_FILES = ("trace", "lengths", "model", "hardware")
"""Settings that may name a file, whose content then belongs to the configuration."""


def config_hash(config: SimulationConfig) -> str:
    """Return 16 hexadecimal digits that two configurations share only if they are equal."""
    return hashlib.sha256(json.dumps(flat(config), sort_keys=True).encode()).hexdigest()[:16]


def header(grid: Grid) -> dict[str, Any]:
    """Return what every run of a sweep has in common: two sweeps may share a folder if theirs are equal."""
    swept = [axis.name for axis in grid.axes]
    return {
        "schema_version": SCHEMA_VERSION,
        "pagedkv": __version__,
        "swept": swept,
        "base": json.loads(json.dumps({name: value for name, value in flat(grid.base).items() if name not in swept})),
        "files": _digests(grid),
    }


def _digests(grid: Grid) -> dict[str, str]:
    names: set[str] = set()
    for name in _FILES:
        swept = [value for axis in grid.axes if axis.name == name for value in axis.values]
        names.update(value for value in (*swept, flat(grid.base)[name]) if value)
    files = {name: Path(name) / "config.json" if Path(name).is_dir() else Path(name) for name in sorted(names)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return what differs between two headers, in words."""
    versions = [key for key in ("schema_version", "pagedkv") if there.get(key) != here[key]]
    words = [f"{key} is {there.get(key)} there, {here[key]} here" for key in versions]
    if there.get("swept") != here["swept"]:
        names = [" ".join(f"--{name.replace('_', '-')}" for name in each.get("swept", [])) for each in (there, here)]
        words.append(f"swept are {names[0]} there, {names[1]} here")
    for name in here["base"].keys() & there.get("base", {}).keys():
        if there["base"][name] != here["base"][name]:
            words.append(f"--{name.replace('_', '-')} is {_shown(there['base'][name])} there, {_shown(here['base'][name])} here")
    for name in here["files"].keys() & there.get("files", {}).keys():
        if there["files"][name] != here["files"][name]:
            words.append(f"the file {name} has changed since")
    return sorted(words)


def _shown(value: Any) -> str:
    return "unset" if value is None or value == [] else " ".join(value) if isinstance(value, list) else str(value)


class SweepStore:
    """The finished runs of a sweep, by configuration hash. One process at a time has it open; see `open_store`."""

    def __init__(self, folder: Path, file: int) -> None:
        self.folder = folder
        self.finished: dict[str, dict[str, Any]] = {}
        """By configuration hash: {"result": ...} or {"error": ...}."""
        self._file = file
        self._recover()

    def append(self, key: str, outcome: dict[str, Any]) -> None:
        """Add a run, on the disk when this returns.

        Raises:
            ConfigError: If it cannot be written, as on a full disk; what was finished before is kept.
        """
        line = json.dumps({"hash": key, **outcome}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while line:  # a disk that fills takes a part first, and refuses the rest
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            then = "make room" if full else "mend that"
            raise ConfigError(
                f"cannot write {str(self.folder / LINES)!r}: {error.strerror}. {len(self.finished):,} finished runs are kept: "
                f"{then} and repeat the command, which goes on from there"
            ) from error
        self.finished[key] = outcome

    def _recover(self) -> None:
        """Read the finished runs; cut off a last line without its end. A line that is none is ignored: its run is done again."""
        size = os.fstat(self._file).st_size
        text = os.pread(self._file, size, 0)
        while len(text) < size and (more := os.pread(self._file, size - len(text), len(text))):
            text += more
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.ftruncate(self._file, whole)
        for line in text[:whole].splitlines():
            try:
                outcome = json.loads(line)
                if "result" in outcome or "error" in outcome:
                    self.finished[outcome.pop("hash")] = outcome
            except (ValueError, KeyError, AttributeError, TypeError):
                continue


@contextmanager
def open_store(folder: Path, grid: Grid) -> Iterator[SweepStore]:
    """Open the folder of a sweep, new or interrupted, for this process alone.

    Raises:
        ConfigError: If it cannot be written, holds another sweep, or another process is at it.
    """
    prepare_folder(folder)
    here, path = header(grid), folder / HEADER
    try:
        file = os.open(folder / LINES, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write {str(folder / LINES)!r}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another sweep is writing to {str(folder)!r}: wait for it, or give --out another folder") from None
        if path.exists():
            try:
                there = json.loads(path.read_text(encoding="utf-8"))
                differences = _differences(there, here)
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise ConfigError(f"cannot read {str(path)!r}: {error}. Give --out a new folder") from error
            if differences:
                raise ConfigError(
                    f"{str(folder)!r} holds another sweep: {'; '.join(differences)}. Give --out a new folder, or the same flags"
                )
        elif others := [name for name in RESULTS if (folder / name).exists()]:
            raise ConfigError(
                f"{str(folder)!r} has a {others[0]} that is no sweep's, for it has no {HEADER}, and it would be lost: "
                "give --out a new folder"
            )
        elif os.fstat(file).st_size:
            raise ConfigError(
                f"{str(folder)!r} has a {LINES} without its {HEADER}, which says what it holds: give --out a new folder"
            )
        write_atomically(path, to_json(here))
        yield SweepStore(folder, file)
    finally:
        os.close(file)
