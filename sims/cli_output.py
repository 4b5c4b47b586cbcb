"""What the commands of the terminal share: how values are read, and where answers go."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Group, Parameter, convert

from pagedkv.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

LOAD = Group("Load: give one of users, request-rate, trace", sort_key=0)
SERVING = Group("Machine, model and engine", sort_key=1)
MEASUREMENT = Group("Measurement", sort_key=2)
OUTPUT = Group("Output", sort_key=3)


def _whole(kind: Any, text: str) -> Any:
    """Convert as cyclopts would, but take only whole numbers for whole numbers: it would round 5.5 users to 6.

    As in vLLM, 16k is 16,000 and 16K is 16,384.
    """
    if kind is int:
        scale = {"k": 1000, "K": 1024}.get(text[-1:], 1)
        try:
            return int(text[:-1] if scale > 1 else text) * scale
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
    return convert(kind, [text])


def converted(kind: Any, tokens: Sequence[Any]) -> Any:
    """Return the value of type `kind` that `tokens` spell."""
    return convert(kind, tokens, converter=_whole)


DEFAULT_PARAMETER = Parameter(consume_multiple=True, negative_iterable=(), converter=converted)


def print_view(show: "Callable[[Console], None]") -> None:
    """Write what `show` prints to stdout, without trailing blanks."""
    from rich.console import Console as RichConsole

    console = RichConsole(highlight=False)
    with console.capture() as answer:  # rich would end the program itself on a closed pipe
        show(console)
    sys.stdout.write("\n".join(line.rstrip() for line in answer.get().split("\n")))


def write_json(document: dict[str, Any], where: str) -> None:
    """Write `document` to stdout ("-") or to a file.

    Raises:
        ConfigError: If the file cannot be written.
    """
    from pagedkv.sims.export import prepare_file, to_json, write_atomically

    if where == "-":
        sys.stdout.write(to_json(document))
        return
    path = output_path(where, "--json")
    assert path is not None
    prepare_file(path, flag="--json")
    write_atomically(path, to_json(document))


def output_path(text: str | None, flag: str) -> Path | None:
    """Return the path that `flag` names, None if it is not given.

    Raises:
        ConfigError: If the name is empty.
    """
    if text == "":
        raise ConfigError(f"{flag} is '': give it the name of a {'folder' if flag == '--out' else 'file'}")
    return None if text is None else Path(text)
