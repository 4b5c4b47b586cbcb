"""The errors a user can cause, and the one that means a bug.

A shortage of memory is not an error: allocators answer it with a value.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A setting that cannot work. The message says what, the value, why, and what would work."""


class TraceFormatError(ConfigError):
    """A trace or length file that cannot be read. The message names file, line, column and value."""


class IntegrityError(AssertionError):
    """State that breaks an invariant: a bug in pagedkv or in a plug-in. The message dumps the state."""


_SHOWN = 20
"""Names that a message lists at most."""


def unknown_name(kind: str, name: str, choices: Iterable[str], *, hint: str = "") -> ConfigError:
    """Return the error for a name that is not among `choices`, with the nearest ones first.

    Args:
        kind: What the name stands for, e.g. "model".
        name: What the user wrote.
        choices: The names that would work.
        hint: One more sentence, e.g. how to list the choices.
    """
    known = sorted(choices)
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
    suggestion = f"did you mean {' or '.join(near)}?" if near else f"known: {shown}."
    return ConfigError(f"unknown {kind} {name!r}: {suggestion}{' ' + hint if hint else ''}")


def expect_one_or_more(settings: object, *names: str, flag: str = "") -> None:
    """Refuse `settings` if one of its whole numbers with these names is below 1; `flag` is what stands before a name, e.g. "--".

    Raises:
        ConfigError: With the first of them.
    """
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise ConfigError(f"{flag}{name.replace('_', '-')} is {value}: needs 1 or more")
