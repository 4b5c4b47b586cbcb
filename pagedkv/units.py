"""Sizes as people write and read them. Inside the program everything is bytes and seconds."""

import re

from pagedkv.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
GB = 10**9
TB = 10**12
MAX_BYTES = 1 << 60
"""A larger number is a mistake."""

_SUFFIXES = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": TB}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str, *, name: str) -> int:
    """Return the bytes in `text`: a number with one of B, kB, MB, GB, TB (decimal), KiB, MiB, GiB, TiB (binary), or none.

    Args:
        text: E.g. "8GiB", "16 GB", "17179869184".
        name: The setting it was given for, for the message.

    Raises:
        ConfigError: If it is not a size, or more than `MAX_BYTES` of its unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _SUFFIXES or float(match[1]) > MAX_BYTES:
        raise ConfigError(f"{name} {text!r} is not a size: write a number with a unit, such as 8GiB, 512MiB or 16GB")
    if match[2] == "" and 0 < float(match[1]) < MIB:
        raise ConfigError(f"{name} {text!r} would be {text.strip()} bytes: write a unit, such as {text.strip()}GiB")
    return round(float(match[1]) * _SUFFIXES[match[2].lower()])


def gib(size_bytes: float) -> str:
    """Return `size_bytes` for a reader, in GiB with two decimals."""
    return f"{size_bytes / GIB:,.2f} GiB"


def size_bytes(text: str | None, name: str) -> int | None:
    """Return the bytes that `text` says, None where it says nothing.

    Raises:
        ConfigError: As `parse_bytes`.
    """
    return None if text is None else parse_bytes(text, name=name)
