"""Numbers with a unit, as a datasheet writes them: "31.36 GiB", "273 GB/s", "125 TFLOPS", "3 ms"."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pagedkv.errors import ConfigError
from pagedkv.units import GIB, KIB, MIB

_NUMBER_AND_UNIT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*(.*?)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """What a number measures, and the units that it may be written in."""

    name: str
    """What a reader calls it, with its article."""
    example: str
    """One that is written well."""
    units: Mapping[str, float]
    """Size of every unit in the base unit."""


_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": GIB * 2**10}
_FLOPS = {"GFLOPS": 1e9, "TFLOPS": 1e12, "PFLOPS": 1e15, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15}

DIMENSIONS: Mapping[str, Dimension] = MappingProxyType(
    {
        "bytes": Dimension(name="a size", example="31.36 GiB", units=_BYTES),
        "bytes/s": Dimension(name="a bandwidth", example="273 GB/s", units={f"{u}/s": scale for u, scale in _BYTES.items()}),
        "flop/s": Dimension(name="a dense compute rate", example="125 TFLOPS", units=_FLOPS),
        "s": Dimension(name="a time", example="0.2 ms", units={"s": 1.0, "ms": 1e-3, "us": 1e-6}),
    }
)
"""What can be written, by base unit."""


def parse_quantity(text: str, unit: str, *, name: str) -> float:
    """Return the number that `text` writes, in the base unit `unit`, a key of `DIMENSIONS`.

    Units are read as written: GB is a gigabyte, Gb would be a gigabit and is refused.

    Args:
        text: E.g. "273 GB/s".
        unit: The base unit of what is needed, e.g. "bytes/s".
        name: The field it was given for, for the message.

    Raises:
        ConfigError: If it is no number with a unit, or if the unit measures something else; with what is needed.

    Example:
        >>> parse_quantity("1.5 TB/s", "bytes/s", name="memory_bandwidth")
        1500000000000.0
    """
    needed = DIMENSIONS[unit]
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ConfigError(f'{name} {text!r} is not a number with a unit: write {needed.name} such as "{needed.example}"')
    written = match[2]
    if written not in needed.units:
        raise ConfigError(f'{name} {text!r} {_complaint(written, needed)}: write {needed.name} such as "{needed.example}"')
    value = float(match[1]) * needed.units[written]
    if not math.isfinite(value):
        raise ConfigError(f"{name} {text!r} is too large")
    return value


def _complaint(unit: str, needed: Dimension) -> str:
    if not unit:
        return "has no unit"
    for dimension in DIMENSIONS.values():
        if unit in dimension.units:
            return f"is {dimension.name}"
    return f"has the unknown unit {unit!r} (known: {', '.join(needed.units)})"
