"""A sweep in words: what it was asked, and what was found along its flags; the same in the terminal and on its page."""

import shlex

from pagedkv.sims.command import command_line
from pagedkv.sims.sweep import Sweep, labels, value_text
from pagedkv.sims.sweep_findings import Anomaly, Cliff
from pagedkv.sims.sweep_grid import Axis

_SURE = {True: "beyond the 95 % intervals", False: "within the 95 % intervals", None: "perhaps noise"}


def flag_of(axis: Axis) -> str:
    """Return the name of a swept flag as it is typed, without its dashes."""
    return axis.name.replace("_", "-")


def cliff_text(cliff: Cliff) -> str:
    """Return where preemption begins."""
    axis = cliff.axis.replace("_", "-")
    begins = f"Preemption begins between {axis} {cliff.calm} and {cliff.preempting} ({cliff.num_preemptions:,} preemptions)"
    return begins + _at(labels(cliff.others))


def anomaly_text(anomaly: Anomaly) -> str:
    """Return what moves the wrong way."""
    moves = f"{anomaly.figure} goes from {anomaly.figure_before:,.4g} to {anomaly.figure_after:,.4g}"
    axis = f"{anomaly.axis.replace('_', '-')} goes from {anomaly.before} to {anomaly.after}"
    return f"Anomaly: {moves} as {axis}{_at(labels(anomaly.others))}; {_SURE[anomaly.sure]}"


def sweep_command(sweep: Sweep) -> str:
    """Return the command that asks for this sweep, but for its folder."""
    swept = {flag_of(axis) for axis in sweep.grid.axes}
    fixed: list[str] = []
    skipping = False
    for word in shlex.split(command_line(sweep.grid.base))[1:]:  # swept flags have their first value among the others
        if word.startswith("--"):
            skipping = word.removeprefix("--") in swept or word.removeprefix("--no-") in swept
        if not skipping:
            fixed.append(word)
    axes = [word for axis in sweep.grid.axes for word in (f"--{flag_of(axis)}", *_values(axis))]
    return shlex.join(["simulate", "sweep", *fixed, *axes, "--out", "FOLDER"])


def _values(axis: Axis) -> list[str]:
    if any(isinstance(value, tuple | list) for value in axis.values):  # sets of words
        return ",".join(str(value_text(value)) for value in axis.values).split(" ")
    return [",".join(str(value).lower() if isinstance(value, bool) else str(value).replace(",", "\\,") for value in axis.values)]


def _at(others: str) -> str:
    return f", at {others}" if others else ""
