"""What the commands of the terminal share: groups of flags, and where answers go."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Group

from pagedkv.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from pagedkv.sims.deployment import Deployment
    from pagedkv.sims.scenario import Scenario

LOAD = Group("Load: give one of users, request-rate, trace", sort_key=0)
SERVING = Group("Machine, model and engine", sort_key=1)
MEASUREMENT = Group("Measurement", sort_key=2)
OUTPUT = Group("Output", sort_key=3)

INTERRUPTED = 130
"""Exit status, as shells give it."""
BAR_MISSED = 3
"""Exit status of a comparison with reality that missed a bar."""


def print_view(show: "Callable[[Console], None]") -> None:
    """Write what `show` prints to stdout, without trailing blanks."""
    from rich.console import Console as RichConsole

    console = RichConsole(highlight=False)
    with console.capture() as answer:  # rich would end the program itself on a closed pipe
        show(console)
    sys.stdout.write("\n".join(line.rstrip() for line in answer.get().split("\n")))


def check_json(json: str | None) -> None:
    """Make sure that the answer can be written, before anything is computed.

    Raises:
        ConfigError: If it cannot.
    """
    from pagedkv.sims.export import prepare_file

    if json != "-" and (path := output_path(json, "--json")) is not None:
        prepare_file(path, flag="--json")


def say_warnings(deployment: "Deployment") -> None:
    """Write to stderr what its budget and its start are warned of."""
    from pagedkv.sims.start_check import start_warnings

    for warning in (*deployment.budget.warnings, *start_warnings(deployment.config)):
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201


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
        raise ConfigError(f"{flag} is '': give it the name of a {'folder' if flag in ('--out', '--images') else 'file'}")
    return None if text is None else Path(text)


def say_size(scenarios: "Iterable[Scenario]") -> None:
    """Say on stderr what these runs take of this computer, if that is much.

    Raises:
        ConfigError: If it is more memory than there is.
    """
    from pagedkv.sims.run_size import check_size

    if (note := check_size(scenarios)) is not None:
        print(note, file=sys.stderr)  # noqa: T201
