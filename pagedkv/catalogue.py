"""The models and machines that pagedkv knows by name. The only module that reads files."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import Figure, HardwareSpec
from pagedkv.kv_spec import LayerGroup
from pagedkv.model_spec import ModelSpec
from pagedkv.weight_format import load_weight_format

Table = Mapping[str, Any]
Spec = TypeVar("Spec")

_FOLDER = Path(__file__).parent


def model_names() -> tuple[str, ...]:
    """Return the names of all models, in the catalogue's order."""
    return tuple(_read("models.toml"))


def hardware_names() -> tuple[str, ...]:
    """Return the names of all machines, in the catalogue's order."""
    return tuple(_read("hardware.toml"))


@cache
def load_model(name: str) -> ModelSpec:
    """Return a model by its catalogue name or Hugging Face id, in any case.

    Raises:
        ConfigError: If there is no such model, with the nearest names.
    """
    key = name.lower()
    for entry, table in _read("models.toml").items():
        if key in (entry, str(table.get("hf_id")).lower(), *(alias.lower() for alias in table.get("aliases", ()))):
            return model_from_table(entry, table)
    raise unknown_name("model", name, model_names())


@cache
def load_hardware(name: str) -> HardwareSpec:
    """Return a machine by its catalogue name, in any case.

    Raises:
        ConfigError: If there is no such machine, with the nearest names.
    """
    table = _read("hardware.toml").get(name.lower())
    if table is None:
        raise unknown_name("hardware", name, hardware_names())
    return hardware_from_table(name.lower(), table)


def model_from_table(name: str, table: Table) -> ModelSpec:
    """Return the model that a table of models.toml describes.

    Raises:
        ConfigError: If a field is missing, unknown or of the wrong type; the message names it.
    """
    converted: dict[str, Any] = {"name": name}
    for key, value in table.items():
        if key == "layer_groups":
            where = f"{name}.layer_groups"
            converted[key] = tuple(_build(LayerGroup, _as_table(group, where), where) for group in value)
        elif key == "native_format":
            converted[key] = load_weight_format(value)
        elif key == "aliases":
            converted[key] = tuple(value)
        else:
            converted[key] = value
    return _build(ModelSpec, converted, name)


def hardware_from_table(name: str, table: Table) -> HardwareSpec:
    """Return the machine that a table of hardware.toml describes.

    Raises:
        ConfigError: If a field is missing, unknown or of the wrong type; the message names it.
    """
    converted: dict[str, Any] = {"name": name}
    for key, value in table.items():
        where = f"{name}.{key}"
        if not isinstance(value, Mapping):
            converted[key] = value
        elif "value" in value:
            converted[key] = _figure(value, where)
        else:
            converted[key] = {dtype: _figure(_as_table(row, where), f"{where}.{dtype}") for dtype, row in value.items()}
    return _build(HardwareSpec, converted, name)


@cache
def _read(filename: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads((_FOLDER / filename).read_text(encoding="utf-8"))


def _as_table(value: object, where: str) -> Table:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a table, not {value!r}")
    return value


def _figure(table: Table, where: str) -> Figure:
    value = table.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}.value must be a number, not {value!r}")
    return _build(Figure, {**table, "value": float(value)}, where)


def _build(spec_type: type[Spec], values: Table, where: str) -> Spec:
    """Return `spec_type(**values)` after a check of the names and of the types that TOML can get wrong."""
    known = {spec.name: spec for spec in fields(spec_type)}  # type: ignore[arg-type]
    required = {name for name, spec in known.items() if spec.default is MISSING and spec.default_factory is MISSING}
    if missing := sorted(required - values.keys()):
        raise ConfigError(f"{where}.{missing[0]} is missing")
    for key, value in values.items():
        if key not in known:
            raise unknown_name("field", f"{where}.{key}", (f"{where}.{name}" for name in known))
        expected = known[key].type
        if expected == Mapping[str, Figure]:
            expected = dict
        if expected in (str, int, float, bool, dict, Figure) and type(value) is not expected:
            raise ConfigError(f"{where}.{key} must be of type {expected.__name__}, not {value!r}")
    try:
        return spec_type(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
