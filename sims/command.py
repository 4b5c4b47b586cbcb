"""A configuration as a command line and as TOML: what a user would type, or keep, to get the same run."""

import json
import shlex
from dataclasses import fields, replace
from typing import Any

from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig

_SECTIONS = (("load", LoadConfig), ("serving", ServingConfig), ("measurement", MeasurementConfig))


def flat(config: SimulationConfig) -> dict[str, Any]:
    """Return every setting by field name, sections joined; names are unique across sections."""
    return {f.name: getattr(getattr(config, section), f.name) for section, kind in _SECTIONS for f in fields(kind)}


def changed(config: SimulationConfig, **changes: Any) -> SimulationConfig:
    """Return `config` with the settings in `changes`, given by field name.

    Raises:
        KeyError: If there is no such setting.
    """
    if unknown := changes.keys() - flat(config).keys():
        raise KeyError(f"no such setting: {', '.join(sorted(unknown))}")
    for section, kind in _SECTIONS:
        mine = {name: value for name, value in changes.items() if name in {f.name for f in fields(kind)}}
        config = replace(config, **{section: replace(getattr(config, section), **mine)})
    return config


def command_line(config: SimulationConfig, **changes: Any) -> str:
    """Return the shortest `simulate` command for `config` with `changes`: settings that differ from their defaults."""
    defaults = flat(SimulationConfig())
    words = ["simulate"]
    for name, value in flat(changed(config, **changes)).items():
        if value != defaults[name]:
            words += _flag(name, value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, tuple):
        return [flag, ",".join(value)] if name == "allocator" else [flag, *value]
    return [flag, str(value)]


def to_toml(settings: dict[str, Any]) -> str:
    """Return `settings` as TOML, unset ones left out; `simulate --config FILE` reads it."""
    lines = (f"{name.replace('_', '-')} = {_toml(value)}" for name, value in settings.items() if value is not None)
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and arrays of them are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
