"""From a table of models.toml to a `ModelSpec`."""

from collections.abc import Mapping
from typing import Any

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hf_config import model_from_config
from pagedkv.model_spec import ModelSpec

TOLERANCE = 0.01
"""How far the counted parameters may be from the published ones, as a share."""

_FIELDS: Mapping[str, type] = {
    "title": str,
    "hf_id": str,
    "aliases": list,
    "source": str,
    "like": str,
    "params_published": float,
    "config": dict,
}
_REQUIRED = ("title", "hf_id", "source")


def model_from_table(name: str, table: Mapping[str, Any], *, like: Mapping[str, Any] | None = None) -> ModelSpec:
    """Return the model that a table of models.toml describes.

    Args:
        name: Its catalogue name.
        table: Its table.
        like: The table that its field `like` names: its config holds but for the fields of the model's own.

    Raises:
        ConfigError: If a field is missing, unknown or of the wrong type, or if the parameters counted are not those
            published; the message names it.
    """
    for key in _REQUIRED if like is not None else (*_REQUIRED, "config"):
        if key not in table:
            raise ConfigError(f"{name}.{key} is missing")
    for key, value in table.items():
        if key not in _FIELDS:
            raise unknown_name("field", f"{name}.{key}", (f"{name}.{known}" for known in _FIELDS))
        if type(value) is not _FIELDS[key]:
            raise ConfigError(f"{name}.{key} must be of type {_FIELDS[key].__name__}, not {value!r}")
    if not table["source"].strip():
        raise ConfigError(f"{name}.source is empty: say where the numbers come from")
    model = model_from_config(
        {**({} if like is None else like["config"]), **table.get("config", {})},
        name=name,
        title=table["title"],
        source=table["source"],
        hf_id=table["hf_id"],
        aliases=tuple(table.get("aliases", ())),
    )
    published = table.get("params_published", model.params_total)
    if abs(model.params_total - published) > TOLERANCE * published:
        raise ConfigError(f"{name}: {model.params_total:,} parameters counted, but params_published is {published:,.0f}")
    return model
