"""The command line: the composition root. It parses, runs, shows; everything else is elsewhere.

Heavy modules (numba, plotly) are imported inside functions, so that `simulate --help` stays quick.
"""

import io
import os
import re
import sys
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from pagedkv import __version__
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.sims.cli_calibrate import calibrate
from pagedkv.sims.cli_engines import compare_engines
from pagedkv.sims.cli_generate import generate
from pagedkv.sims.cli_output import (
    INTERRUPTED,
    LOAD,
    MEASUREMENT,
    OUTPUT,
    SERVING,
    check_json,
    output_path,
    print_view,
    say_size,
    say_warnings,
    write_json,
)
from pagedkv.sims.cli_reality import reality
from pagedkv.sims.cli_report import made_report
from pagedkv.sims.cli_serve import serve
from pagedkv.sims.cli_tools import fit, tools
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.config_file import ASKED_FOR, given, read_settings, with_files, without_other_loads
from pagedkv.sims.config_words import DEFAULT_PARAMETER
from pagedkv.sims.plain_signs import PLAIN

if TYPE_CHECKING:
    from pagedkv.sims.pipe_console import PipeConsole

BAD_INPUT = 2
_NEAR = 0.65
"""How alike an unknown flag and the one proposed must be without their dashes, which all have in common."""


app = App(
    name="simulate",
    help="How many people can this machine serve, and where does the KV-cache memory go? Try: simulate --users 100",
    help_epilogue="Other commands, each with --help: simulate max-users | max-context | sweep | compare | advise | fit | "
    "budget | prefix-cache TRACE | models | hardware | explain WORD | from-vllm COMMAND | validate | calibrate | reality | "
    "generate | serve | fuzz | bench-kernels",
    version=__version__,
    default_parameter=DEFAULT_PARAMETER,
    suppress_keyboard_interrupt=False,
)


@app.default
def simulate(
    *,
    load: Annotated[LoadConfig, Parameter(name="*", group=LOAD)] = LoadConfig(),  # noqa: B008
    serving: Annotated[ServingConfig, Parameter(name="*", group=SERVING)] = ServingConfig(),  # noqa: B008
    measurement: Annotated[MeasurementConfig, Parameter(name="*", group=MEASUREMENT)] = MeasurementConfig(),  # noqa: B008
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
    out: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    overwrite: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False,
    report: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    images: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    watch: Annotated[bool, Parameter(group=OUTPUT)] = False,
    config: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
) -> None:
    """Serve simulated users with paged and with contiguous KV allocation, and say where the memory goes.

    Args:
        json: Write the result document to this file (as for all that is written, its folder is made if there is none); - prints
            it, and nothing else, to stdout.
        out: Write to this folder: config.toml, summary.json, requests.csv, timeline.csv, report.html, metrics.prom (vLLM's metrics
            for Prometheus) and trace.json (for Perfetto). A folder that holds another run is left as it is: see overwrite.
        overwrite: Replace the run that the folder of --out holds, whatever it is.
        report: Write report.html, one offline page with the pictures, to this file.
        images: Write every picture of the report to this folder, as SVG and PNG (pip install 'pagedkv[images]').
        watch: Before the answer, show the first allocator's memory block by block while simulated time runs.
        config: Take settings from a config.toml, such as --out writes; flags override it, and its paths are relative to it.
    """
    from pagedkv.sims.export import keep_other_runs, prepare_file, prepare_folder, to_json, write, write_atomically
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.results import simulate as run_all
    from pagedkv.sims.scenario import resolve

    del config  # read by cyclopts before the other flags: see main
    asked = SimulationConfig(load=load, serving=serving, measurement=measurement)
    if "," in serving.engine:
        if watch:
            raise ConfigError("--watch shows one engine: name one with --engine")
        compare_engines(asked, json=json, out=out, report=report or images, overwrite=overwrite)
        return
    scenario = resolve(asked)
    say_size([scenario])
    folder, _ = output_path(out, "--out"), output_path(images, "--images")
    files = {"--json": output_path(None if json == "-" else json, "--json"), "--report": output_path(report, "--report")}
    if folder is not None and not overwrite:
        keep_other_runs(scenario, folder)
    if images is not None:
        from pagedkv.sims.figure_files import check_images

        check_images()
    for place, flag in ((out, "--out"), (images, "--images")):
        if place is not None:
            prepare_folder(Path(place), flag=flag)
    for flag, file in files.items():
        if file is not None:
            prepare_file(file, flag=flag)
    if watch:
        from pagedkv.sims.live_view import check_watchable, watch_run
        from pagedkv.sims.pipe_console import PipeConsole

        if json == "-":
            raise ConfigError("--watch and --json - both write to stdout: leave one out, or give --json a file")
        watch_run(scenario, check_watchable(scenario), PipeConsole(highlight=False))
    with ProgressOnStderr(scenario.allocators, repeats=measurement.repeats) as progress:
        results = run_all(scenario, progress=progress)
    page, drawn = made_report(results, images) if images is not None or files["--report"] is not None else (None, True)
    if folder is not None:
        write(results, folder, page=page)
    if (file := files["--report"]) is not None and page is not None:
        write_atomically(file, page)
    if (file := files["--json"]) is not None:
        write_atomically(file, to_json(results.document()))
    if json == "-":
        say_warnings(scenario.deployment)
        sys.stdout.write(to_json(results.document()))
    else:
        from pagedkv.sims.console import show

        print_view(lambda console: show(results, console))
        for path in (folder, *files.values()):
            if path is not None:
                print(f"Written: {path}", file=sys.stderr)  # noqa: T201
    if not drawn:  # all else is there, and what was asked is not
        sys.stdout.flush()
        sys.exit(BAD_INPUT)


@tools.command
def from_vllm(
    command: str,
    *,
    users: Annotated[int | None, Parameter(group=LOAD)] = None,
    serving: Annotated[ServingConfig, Parameter(name="*", group=SERVING)] = ServingConfig(),  # noqa: B008
) -> None:
    """Read a `vllm serve` command: say what it means here, what is left out, and what fits.

    Args:
        command: The command, in quotes.
        users: Simulate so many users with it.
    """
    from pagedkv.sims.command import command_line
    from pagedkv.sims.console_static import show_vllm_command
    from pagedkv.sims.from_vllm import parse_vllm_command, with_vllm_defaults

    read = parse_vllm_command(command, base=serving)
    serving, defaults = with_vllm_defaults(read.serving)
    config = SimulationConfig(load=LoadConfig(users=users), serving=serving)
    words = command_line(config) if users is not None else command_line(config).replace("simulate", "simulate fit", 1)
    print_view(lambda console: show_vllm_command(read, defaults, words, console))
    if users is None:
        fit(serving=serving)
    else:
        simulate(load=config.load, serving=serving)


@tools.command
def bench_kernels(
    *,
    dry_run: bool = False,
    quick: bool = False,
    time_limit_s: float | None = None,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Measure the attention kernels against the memory's bandwidth and against others, losses too. Exit status 1 if one is wrong.

    Args:
        dry_run: Run everything on tiny shapes: says that it works, the times mean nothing.
        quick: A first look on a GPU: three shapes, few samples, and nothing that compiles for minutes.
        time_limit_s: Begin no further row after so many seconds.
        json: Write the result document to this file, from the first row on; - prints it, and nothing else, to stdout.
    """
    from pagedkv.kernels.bench import BenchOptions, run_bench
    from pagedkv.kernels.bench_report import found_wrong, render

    check_json(json)
    options = BenchOptions(dry_run=dry_run, quick=quick, time_limit_s=time_limit_s)
    file = None if json == "-" else json
    try:
        result = run_bench(options, keep=lambda so_far: write_json(so_far, file) if file is not None else None)
    except KeyboardInterrupt:
        if file is not None:
            _exit(f"interrupted: {file} holds what was measured, if anything was", INTERRUPTED)
        raise
    if json is None:
        print(render(result))  # noqa: T201
    elif json == "-":
        write_json(result, json)
    if found_wrong(result["rows"]):
        sys.exit(1)


tools.command(calibrate)
tools.command(reality)
tools.command(generate)
tools.command(serve)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake in what was asked, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show "×" shows "x"
            stream.reconfigure(errors=PLAIN)
    if arguments[:1] == ["simulate"]:  # `pagedkv simulate --users 100`
        del arguments[0]
    try:
        if arguments and arguments[0] in ASKED_FOR:
            arguments = _question(arguments)
        else:
            app.config = _config_files(arguments)
        console = _help_console() if {"--help", "-h"} & set(arguments) else None
        _app_for(arguments)(
            _joined(arguments), console=console, exit_on_error=False, print_error=False, result_action="return_value"
        )
        sys.stdout.flush()
    except (ConfigError, CycloptsError) as error:
        _exit(f"error: {_without_far_proposal(str(error))}", BAD_INPUT)
    except KeyboardInterrupt:
        _exit("interrupted: nothing was written", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has left
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(0)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(f"error: cannot write the answer: {error.strerror}", BAD_INPUT)


def _without_far_proposal(message: str) -> str:
    """Return cyclopts' message of an unknown option without its proposal if that is near only by its dashes."""
    match = re.fullmatch(r"(Unknown option: -*([^\s=]+?)(?:=.*)?\.) Did you mean -*(\S+)\?", message)
    return match[1] if match and SequenceMatcher(None, match[2], match[3]).ratio() < _NEAR else message


def _help_console() -> "PipeConsole":
    from pagedkv.sims.pipe_console import PipeConsole

    return PipeConsole()


def _app_for(arguments: list[str]) -> App:
    if not arguments or arguments[0].startswith("-"):
        return app
    commands = [name for name in tools if not name.startswith("-")]
    if arguments[0] not in commands:
        raise unknown_name("command", arguments[0], commands, hint="To simulate, give flags: simulate --users 100.")
    return tools


def _joined(arguments: list[str]) -> list[str]:
    """Return `arguments` with negative values joined to their flags, so that "-5s" is a value and is refused as one."""
    joined: list[str] = []
    for word in arguments:
        if joined and re.match(r"--[a-z-]+$", joined[-1]) and re.match(r"-\.?[0-9]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _config_files(arguments: list[str]) -> tuple[Dict, ...]:
    """Return the files that --config names: they give every flag that `arguments` do not give.

    A load on the command line replaces a file's load of another kind, with what belongs to it.
    """
    _, paths = _without_config(arguments)
    return tuple(Dict(without_other_loads(read_settings(path), given(arguments)), source=path) for path in paths)


def _question(arguments: list[str]) -> list[str]:
    """Return the words of a question with the flags of the files that --config names."""
    command, *words = arguments
    if {"--help", "-h"} & set(words):
        return arguments
    words, paths = _without_config(words)
    words, notes = with_files(command, words, paths)
    for note in notes:
        print(note, file=sys.stderr)  # noqa: T201
    return [command, *words]


def _without_config(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return `arguments` without --config, and the files that it names."""
    rest: list[str] = []
    paths: list[str] = []
    words = iter(arguments)
    for word in words:
        if word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        elif word == "--config" and (path := next(words, None)) is not None:
            paths.append(path)
        else:
            rest.append(word)
    return rest, paths


def _exit(message: str, code: int) -> None:
    try:
        print(message, file=sys.stderr, flush=True)  # noqa: T201
    except BrokenPipeError:  # nobody reads it; the status still says so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(code)
