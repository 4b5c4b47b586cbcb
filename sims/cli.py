"""The command line: the composition root. It parses, runs, shows; everything else is elsewhere.

Heavy modules (numba, plotly) are imported inside functions, so that `simulate --help` stays quick.
"""

import os
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter, convert
from cyclopts.config import Toml

from pagedkv import __version__
from pagedkv.errors import ConfigError
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig

INTERRUPTED, BAD_INPUT = 130, 2


def _whole(kind: Any, text: str) -> Any:
    """Convert as cyclopts would, but take only whole numbers for whole numbers: it would round 5.5 users to 6."""
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
    return convert(kind, [text])


def _converted(kind: Any, tokens: Sequence[Any]) -> Any:
    return convert(kind, tokens, converter=_whole)


app = App(
    name="simulate",
    help="How many people can this machine serve, and where does the KV-cache memory go? Try: simulate --users 100",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=(), converter=_converted),
    suppress_keyboard_interrupt=False,
)

_LOAD = Group("Load: give one of users, request-rate, trace", sort_key=0)
_SERVING = Group("Machine, model and engine", sort_key=1)
_MEASUREMENT = Group("Measurement", sort_key=2)
_OUTPUT = Group("Output", sort_key=3)


@app.default
def simulate(
    *,
    load: Annotated[LoadConfig, Parameter(name="*", group=_LOAD)] = LoadConfig(),  # noqa: B008
    serving: Annotated[ServingConfig, Parameter(name="*", group=_SERVING)] = ServingConfig(),  # noqa: B008
    measurement: Annotated[MeasurementConfig, Parameter(name="*", group=_MEASUREMENT)] = MeasurementConfig(),  # noqa: B008
    json: Annotated[str | None, Parameter(group=_OUTPUT, allow_leading_hyphen=True)] = None,
    out: Annotated[str | None, Parameter(group=_OUTPUT)] = None,
    report: Annotated[str | None, Parameter(group=_OUTPUT)] = None,
    config: Annotated[Path | None, Parameter(group=_OUTPUT)] = None,
) -> None:
    """Serve simulated users with paged and with contiguous KV allocation, and say where the memory goes.

    Args:
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
        out: Write config.toml, summary.json, requests.csv, timeline.csv and report.html to this folder.
        report: Write report.html, one offline page with the pictures, to this file.
        config: Take settings from a config.toml; flags override it.
    """
    from pagedkv.sims.export import prepare_file, prepare_folder, to_json, write, write_atomically
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.results import simulate as run_all
    from pagedkv.sims.scenario import resolve

    del config  # read by cyclopts before the other flags: see main
    scenario = resolve(SimulationConfig(load=load, serving=serving, measurement=measurement))
    folder = _path(out, "--out")
    files = {"--json": _path(None if json == "-" else json, "--json"), "--report": _path(report, "--report")}
    if folder is not None:
        prepare_folder(folder)
    for flag, file in files.items():
        if file is not None:
            prepare_file(file, flag=flag)
    with ProgressOnStderr(scenario.allocators, repeats=measurement.repeats) as progress:
        results = run_all(scenario, progress=progress)
    if folder is not None:
        write(results, folder)
    if (file := files["--report"]) is not None:
        from pagedkv.sims.report import html

        write_atomically(file, html(results))
    if (file := files["--json"]) is not None:
        write_atomically(file, to_json(results.document()))
    if json == "-":
        for warning in scenario.deployment.budget.warnings:
            print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
        sys.stdout.write(to_json(results.document()))
        return
    from rich.console import Console

    from pagedkv.sims.console import show

    console = Console(highlight=False)
    with console.capture() as answer:  # rich would end the program itself on a closed pipe
        show(results, console)
    sys.stdout.write(answer.get())
    for path in (folder, *files.values()):
        if path is not None:
            print(f"Written: {path}", file=sys.stderr)  # noqa: T201


def _path(text: str | None, flag: str) -> Path | None:
    if text == "":
        raise ConfigError(f"{flag} is '': give it the name of a {'folder' if flag == '--out' else 'file'}")
    return None if text is None else Path(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake in what was asked, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["simulate"]:  # `pagedkv simulate --users 100`
        del arguments[0]
    try:
        app.config = _config_files(arguments)
        app(_joined(arguments), exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except (ConfigError, CycloptsError) as error:
        _exit(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        _exit("interrupted: nothing was written", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(f"error: cannot write the answer: {error.strerror}", BAD_INPUT)


def _joined(arguments: list[str]) -> list[str]:
    """Return `arguments` with negative values joined to their flags, so that "-5s" is a value and is refused as one."""
    joined: list[str] = []
    for word in arguments:
        if joined and re.match(r"--[a-z-]+$", joined[-1]) and re.match(r"-\.?[0-9]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _config_files(arguments: list[str]) -> tuple[Toml, ...]:
    """Return the reader of the file that --config names: it gives every flag that `arguments` do not give."""
    paths = [value for flag, value in zip(arguments, arguments[1:], strict=False) if flag == "--config"]
    paths += [flag.removeprefix("--config=") for flag in arguments if flag.startswith("--config=")]
    for path in paths:
        try:
            tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the configuration {path!r}: {error}") from error
    return tuple(Toml(path, must_exist=True) for path in paths)


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)  # noqa: T201
    sys.exit(code)
