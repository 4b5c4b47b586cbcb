"""config.toml: settings in a file, as `simulate --out` writes them. Its paths are relative to it: it can be read from anywhere."""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts import CycloptsError

from pagedkv.catalogue import USERS_UTF_8
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.sims.command import to_toml
from pagedkv.sims.config import DEFAULT_ALLOCATORS, GOES_WITH, LOAD_KINDS, ServingConfig, SimulationConfig, parse_seconds
from pagedkv.sims.config_words import FIELD_TYPES, parse_config

PATHS = ("trace", "lengths", "workload", "model", "hardware")
"""Settings that may name a file."""
ASKED_FOR: dict[str, tuple[str, ...]] = {
    "max-users": ("users",),
    "max-context": ("lengths", "workload", "random_input_len", "random_range_ratio"),
    "sweep": (),
    "advise": (),
}
"""By command that takes --config besides `simulate` itself: settings that it looks for, which a file's do not answer."""


def file_text(settings: dict[str, Any], folder: Path) -> str:
    """Return `settings` as the text of a file in `folder`."""
    return to_toml(settings | {name: _from(settings.get(name), folder) for name in PATHS})


def read_settings(path: str) -> dict[str, Any]:
    """Return the settings of the file `path` as its keys have them, its paths as this process would open them.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        settings = tomllib.loads(Path(path).read_text(encoding=USERS_UTF_8))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path!r}: {error}") from error
    if "config" in settings:
        raise ConfigError(f"{path!r} names another configuration in 'config': give --config on the command line, once for each")
    folder = os.path.realpath(Path(path).parent)
    return settings | {name: _here(settings[name], folder) for name in PATHS if isinstance(settings.get(name), str)}


def without_other_loads(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Return `settings` without a load of another kind than the flags `given`, and what belongs to it.

    To it belong a warm-up and a duration that say no more than that load's default: for a load that ends they are others.
    """
    kinds = given & set(LOAD_KINDS)
    if kinds or "num_prompts" in given:
        settings = _without_usual_window(settings)
    if not kinds:
        return settings
    others = {name for name, loads in GOES_WITH.items() if not kinds & set(loads)} | set(LOAD_KINDS) - kinds
    return {name: value for name, value in settings.items() if name.replace("-", "_") not in others}


def _without_usual_window(settings: dict[str, Any]) -> dict[str, Any]:
    from pagedkv.sims.scenario import DEFAULT_DURATION_S, DEFAULT_WARMUP_S  # noqa: PLC0415 (numba takes a while to import)

    ends = "trace" in settings or any(name in settings for name in ("num-prompts", "num_prompts"))
    usual = {"warmup": 0.0} if ends else {"warmup": DEFAULT_WARMUP_S, "duration": DEFAULT_DURATION_S}
    return {name: value for name, value in settings.items() if name not in usual or not _lasts(value, usual[name])}


def _lasts(value: Any, seconds: float) -> bool:
    try:
        return parse_seconds(str(value), name="time") == seconds
    except ConfigError:  # said where the setting is read
        return False


def with_files(command: str, words: Sequence[str], paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of `command`, those of the files `paths` behind `words`, and notes on settings that are left aside.

    Flags win, then earlier files. A setting that says what would be so anyway is not taken: it would count as the user's wish.

    Raises:
        ConfigError: If a file cannot be read, or has a key that there is not or that `command` does not use.
    """
    words, notes = list(words), []
    for path in paths:
        settings = {name.replace("-", "_"): value for name, value in without_other_loads(read_settings(path), given(words)).items()}
        config = _checked(command, path, settings)
        aside = [name for name in ASKED_FOR[command] if name in settings]
        notes += [f"{path!r}: {_key(name)} {settings[name]} is left aside: {command} looks for it" for name in aside]
        usual = _says_nothing(config)
        for name, value in settings.items():
            if name not in (*given(words), *aside, *usual):
                words += _words(name, value, escape=command == "sweep")
    return words, notes


def given(words: Sequence[str]) -> set[str]:
    """Return the field names of the flags among `words`."""
    names = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names if name.startswith("no_")}


def _checked(command: str, path: str, settings: dict[str, Any]) -> SimulationConfig:
    for name, value in settings.items():
        if name not in FIELD_TYPES:
            raise unknown_name(f"key of {path!r}", _key(name), [_key(each) for each in FIELD_TYPES])
        other_load = (name in LOAD_KINDS and name != "users") or "users" not in GOES_WITH.get(name, ("users",))
        if command != "sweep" and other_load and value not in (False, None):
            raise ConfigError(
                f"{path!r} has {_key(name)} = {value}, which {command} does not use: its load is users. "
                "Give it a copy without that line"
            )
    try:
        return parse_config([word for name, value in settings.items() for word in _words(name, value, escape=False)])
    except CycloptsError as error:
        raise ConfigError(f"{path!r}: {error}") from error


def _says_nothing(config: SimulationConfig) -> set[str]:
    """Return the settings of machine, model and engine, and the allocators, that say what would be so without them."""
    from pagedkv.sims.deployment import deploy  # noqa: PLC0415 (numba takes a while to import)
    from pagedkv.sims.scenario import asked_allocators  # noqa: PLC0415

    usual = {"allocator"} if asked_allocators(config.measurement, usual=()) == DEFAULT_ALLOCATORS else set()
    try:
        left, defaults = deploy(config.serving).config, ServingConfig()
    except ConfigError:  # perhaps a flag mends it
        return usual
    return usual | {f.name for f in fields(left) if getattr(left, f.name) == getattr(defaults, f.name)}


def _words(name: str, value: Any, *, escape: bool) -> list[str]:
    flag = f"--{_key(name)}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{_key(name)}"]
    if isinstance(value, list):
        return [f"{flag}={','.join(map(str, value))}"] if name == "allocator" else [flag, *map(str, value)] if value else []
    return [f"{flag}={str(value).replace(',', chr(92) + ',') if escape else value}"]


def _key(name: str) -> str:
    return name.replace("_", "-")


def _from(value: Any, folder: Path) -> Any:
    """Return a path to what `value` names, if it names a file, as seen from `folder`."""
    if not isinstance(value, str) or not _is_file(value) or Path(value).is_absolute():
        return value
    path = Path(value)
    return os.path.relpath(Path(os.path.realpath(path.parent)) / path.name, os.path.realpath(folder))


def _here(value: str, folder: str) -> str:
    """Return a path to what `value` names, if it names a file as seen from `folder`, as seen from here."""
    there = os.path.join(folder, value)  # noqa: PTH118 (an absolute path stays as it is)
    return os.path.relpath(there) if not Path(value).is_absolute() and _is_file(there) else value


def _is_file(text: str) -> bool:
    path = Path(text)
    try:
        return path.is_file() or (path / "config.json").is_file()
    except (OSError, ValueError):
        return False
