"""The command line: the composition root. It parses, runs, shows; everything else is elsewhere.

Heavy modules (numba, plotly) are imported inside functions, so that `simulate --help` stays quick.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Toml

from pagedkv import __version__
from pagedkv.errors import ConfigError
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig

INTERRUPTED, BAD_INPUT = 130, 2

app = App(
    name="simulate",
    help="How many people can this machine serve, and where does the KV-cache memory go? Try: simulate --users 100",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
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
    out: Annotated[Path | None, Parameter(group=_OUTPUT)] = None,
    config: Annotated[Path | None, Parameter(group=_OUTPUT)] = None,
) -> None:
    """Serve simulated users with paged and with contiguous KV allocation, and say where the memory goes.

    Args:
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
        out: Write config.toml, summary.json, requests.csv and timeline.csv to this folder.
        config: Take settings from a config.toml; flags override it.
    """
    from pagedkv.sims.export import prepare_folder, to_json, write, write_atomically
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.results import simulate as run_all
    from pagedkv.sims.scenario import resolve

    del config  # read by cyclopts before the other flags: see main
    scenario = resolve(SimulationConfig(load=load, serving=serving, measurement=measurement))
    if out is not None:
        prepare_folder(out)
    if json is not None and json != "-":
        prepare_folder(Path(json).absolute().parent)
    with ProgressOnStderr(scenario.allocators, repeats=measurement.repeats) as progress:
        results = run_all(scenario, progress=progress)
    if out is not None:
        write(results, out)
    document = to_json(results.document()) if json is not None else ""
    if json == "-":
        for warning in scenario.budget.warnings:
            print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
        sys.stdout.write(document)
        return
    if json is not None:
        write_atomically(Path(json), document)
    from rich.console import Console

    from pagedkv.sims.console import show

    show(results, Console(highlight=False))
    if out is not None:
        print(f"Written to {out}: config.toml, summary.json, requests.csv, timeline.csv", file=sys.stderr)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake in what was asked, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["simulate"]:  # `pagedkv simulate --users 100`
        del arguments[0]
    try:
        app.config = _config_files(arguments)
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except (ConfigError, CycloptsError) as error:
        _exit(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        _exit("interrupted: nothing was written", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has left
        sys.stderr.close()
        sys.exit(0)


def _config_files(arguments: list[str]) -> tuple[Toml, ...]:
    """Return the reader of the file that --config names: it gives every flag that `arguments` do not give."""
    paths = [value for flag, value in zip(arguments, arguments[1:], strict=False) if flag == "--config"]
    paths += [flag.removeprefix("--config=") for flag in arguments if flag.startswith("--config=")]
    for path in paths:
        try:
            Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path!r}: {error}") from error
    return tuple(Toml(path, must_exist=True) for path in paths)


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)  # noqa: T201
    sys.exit(code)
