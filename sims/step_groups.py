"""Groups of fitted constants: how a file writes them, and what a group that a hardware file carries must have.

A group belongs to an engine on a machine: `constants` that all its weight types share, and `weights` with what each has of its own.
`simulate calibrate` adds to what the shipped groups have: `models`, those that were measured; `own_spread`, how far their own rates
may be off; `doubt`, why it is not validated; `fitted`, the constants that the data identified; `kept`, where the others come from.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_text import quoted
from pagedkv.sims.step_constants import NUMBERS

IN_GROUPS = tuple(name for name in NUMBERS if name != "token_overhead_s")
"""Constants that groups hold."""
OF_WEIGHTS = ("weight_read_bytes_per_s", "linear_flops")
"""Constants that each weight type has of its own."""
SHARED = tuple(name for name in IN_GROUPS if name not in OF_WEIGHTS)
"""Constants that all weight types share."""
_SINCE = ("expert_rate", "latent_attention")
"""Constants that groups written before they came lack: then a group has what `StepConstants` has without it."""
SPREADS = ("decode", "prefill", "state_decode", "state_prefill")
_WORDS = ("engine", "machine", "source", "date")
_COUNTS = ("num_figures", "num_models", "num_constants")


def toml_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line per value: text, numbers (four digits), true or false, lists of text."""
    for name, value in values.items():
        if isinstance(value, bool):
            yield f"{name} = {str(value).lower()}"
        elif isinstance(value, float):
            yield f"{name} = {float(f'{value:.4g}')!r}"
        elif isinstance(value, list | tuple):
            yield f"{name} = [{', '.join(map(quoted, value))}]"
        else:
            yield f"{name} = {value}" if isinstance(value, int) else f"{name} = {quoted(value)}"


def group_lines(group: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a group as a hardware file carries it."""
    yield "[[step_constants]]"
    yield from toml_lines({name: value for name, value in group.items() if not isinstance(value, Mapping)})
    for name, value in group.items():
        if isinstance(value, Mapping) and name != "weights":
            yield f"[step_constants.{name}]"
            yield from toml_lines(value)
    for fmt, its in group["weights"].items():
        yield f"[step_constants.weights.{quoted(fmt)}]"
        yield from toml_lines(its)


def checked_groups(groups: Sequence[Mapping[str, Any]], where: str) -> tuple[Mapping[str, Any], ...]:
    """Return the groups that the hardware file `where` carries, with what `calibration` reads of them.

    Raises:
        ConfigError: If one lacks something or has a value that cannot be; with the key, the value and what is needed.
    """
    return tuple(_checked(group, f"{where}.step_constants[{i}]") for i, group in enumerate(groups))


def _checked(group: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for name in (*_WORDS, *_COUNTS, "kv_cache_dtypes", "constants", "spread", "weights"):
        if name not in group:
            raise ConfigError(f"{where}.{name} is missing: simulate calibrate writes it")
    for name, kind, needed in (
        *((name, str, "text") for name in _WORDS),
        *((name, int, "a whole number") for name in _COUNTS),
        ("kv_cache_dtypes", list, "a list of names"),
        *((name, dict, "a table") for name in ("constants", "spread", "weights")),
        *((name, dict, "a table") for name in ("own_spread", "any_weights") if name in group),
    ):
        if type(group[name]) is not kind:
            raise ConfigError(f"{where}.{name} is {group[name]!r}: it must be {needed}")
    _numbers(group["constants"], [name for name in SHARED if name not in _SINCE], f"{where}.constants")
    _numbers(group["spread"], SPREADS, f"{where}.spread")
    _numbers(group.get("own_spread", {}), (), f"{where}.own_spread")
    if not group["weights"]:
        raise ConfigError(f"{where}.weights is empty: needs a table for a weight type, such as [step_constants.weights.fp8]")
    for fmt, its in group["weights"].items():
        if not isinstance(its, Mapping):
            raise ConfigError(f"{where}.weights.{fmt} is {its!r}: it must be a table")
        _numbers(its, (*OF_WEIGHTS, "num_models", "num_figures"), f"{where}.weights.{fmt}")
    return {"any_weights": {}, "widened": 1.0, "too_few": False, **group}


def _numbers(table: Mapping[str, Any], needed: Sequence[str], where: str) -> None:
    """Make sure that a table has all the numbers `needed`, and no value that is none."""
    for name in needed:
        if name not in table:
            raise ConfigError(f"{where}.{name} is missing")
    for name, value in table.items():
        if where.endswith(".constants") and name not in SHARED:
            raise unknown_name("constant", f"{where}.{name}", (f"{where}.{each}" for each in SHARED))
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
            raise ConfigError(f"{where}.{name} is {value!r}: it must be a number of 0 or more, in SI units")
        if value == 0 and name.endswith(("_per_s", "_flops", "overlap", "exponent", "_rate")):
            raise ConfigError(f"{where}.{name} is 0: it must be above 0")
