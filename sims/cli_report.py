"""What max-users and max-context do with --report: the run at what they found, as a page, with their curve."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pagedkv.sims.cli_output import output_path
from pagedkv.sims.config import ATTAIN, SimulationConfig

if TYPE_CHECKING:
    from pagedkv.sims.capacity_answer import CapacityAnswer
    from pagedkv.sims.results import Results

_REPEATS = 5
"""From which on the interval of an answer says something."""


def report_file(report: str | None) -> Path | None:
    """Return the file that --report names, and make sure that it can be written, before anything is computed.

    Raises:
        ConfigError: If it cannot.
    """
    from pagedkv.sims.export import prepare_file

    if (path := output_path(report, "--report")) is not None:
        prepare_file(path, flag="--report")
    return path


def made_report(results: "Results", images: str | None) -> tuple[str, bool]:
    """Return the page of `results`, and whether its pictures were written to the folder `images`, if one is given; say why not."""
    from pagedkv.sims.figure_files import write_images
    from pagedkv.sims.report import report

    made, why_not = report(results), None
    if images is not None:
        why_not = write_images(made.figures, Path(images))
        print(why_not or f"Written: {images}", file=sys.stderr)  # noqa: T201
    return made.html(), why_not is None


def question_command(question: str, asked: SimulationConfig, *, attain: float) -> str:
    """Return the command line of a question about `asked`."""
    from pagedkv.sims.command import command_line

    words = command_line(asked).replace("simulate", f"simulate {question}", 1)
    return words if attain == ATTAIN else f"{words} --attain {attain:g}"


def further_command(question: str, asked: SimulationConfig, found: "CapacityAnswer", *, attain: float) -> str | None:
    """Return the same question with what would help beyond the answer `found`, or with repeats; None if neither is to be had."""
    from pagedkv.sims.command import changed

    if found.remedy is not None:
        return question_command(question, changed(asked, **found.remedy), attain=attain)
    if asked.measurement.repeats > 1:
        return None
    return question_command(question, changed(asked, repeats=_REPEATS), attain=attain)


def write_capacity_report(
    path: Path,
    config: SimulationConfig,
    answers: "Sequence[CapacityAnswer]",
    *,
    unit: str,
    attain: float,
    command: str,
    further: str | None,
) -> None:
    """Run `config`, the load that was found, and write its report with the search that found it."""
    from pagedkv.sims.export import write_atomically
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.report import html
    from pagedkv.sims.reporting.capacity_section import Capacity
    from pagedkv.sims.results import simulate
    from pagedkv.sims.scenario import resolve

    scenario = resolve(config)
    with ProgressOnStderr(scenario.allocators, repeats=config.measurement.repeats) as progress:
        results = simulate(scenario, attain=attain, progress=progress)
    write_atomically(path, html(results, Capacity(unit=unit, answers=answers, attain=attain, command=command, further=further)))
    print(f"Written: {path}", file=sys.stderr)  # noqa: T201
