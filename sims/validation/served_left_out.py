"""How near loads of a model come if no row of the model was seen: constants fitted without it, its loads simulated.

`python -m pagedkv.sims.validation.served_left_out ../shared/data` takes about two minutes.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from pagedkv.catalogue import load_hardware
from pagedkv.sims.fit_step_time import MACHINE, ROWS, fit_all
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.sims.validation.benchmark_rows import FURTHER, read_rows
from pagedkv.sims.validation.fitting import fit, without
from pagedkv.sims.validation.points import points_of
from pagedkv.sims.validation.row_models import RowModel, model_of
from pagedkv.sims.validation.served_loads import served_loads
from pagedkv.sims.validation.served_section import ENGINE, LABELS, Compared, mean_errors, simulated, why_not_compared


def left_out(data: Path) -> Iterator[tuple[str, list[Compared]]]:
    """Yield each model, and its loads by constants that saw none of its rows; `data` is a folder like shared/data."""
    hardware = load_hardware(MACHINE)
    points, _ = points_of([*read_rows(data / ROWS), *read_rows(FURTHER)])
    (whole,) = (each for each in fit_all(points, hardware) if each.plan.engine == ENGINE)
    subjects = {load.source: model_of(load.model, load.weight_dtype, ENGINE) for load in served_loads()}
    known = {source: subject for source, subject in subjects.items() if isinstance(subject, RowModel)}
    for model in {subject.model.name: subject.model for subject in known.values()}.values():
        fitted = fit(whole.plan, hardware, *without(whole.work, whole.points, model.name), near=whole.fit)
        its = []
        for load in served_loads():
            fmt = known[load.source].weight_format
            if known[load.source].model.name == model.name and not why_not_compared(load):
                its.append(simulated(load, hardware, constants=fitted.constants(catalogue_constants(hardware, fmt), fmt.name)))
        if its:
            yield model.title, its


def main() -> None:
    """Print mean absolute errors by model and of all."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pagedkv.sims.validation.served_left_out DATA")
    everything: list[Compared] = []
    for title, its in left_out(Path(sys.argv[1])):
        everything += its
        sys.stdout.write(_line(title, its))
    sys.stdout.write(_line("all", everything))


def _line(title: str, its: list[Compared]) -> str:
    errors = mean_errors(its)
    figures = ", ".join(f"{label} {errors[name]:5.1%}" for name, label in LABELS.items())
    return f"{title:28} {len(its):4} loads: {figures}\n"


if __name__ == "__main__":
    main()
