"""`simulate calibrate` in the terminal: what was found, how well it fits, and what stays as it was."""

from itertools import islice

from rich.console import Console
from rich.text import Text

from pagedkv.sims.calibrate.machine import MeasuredMachine, ReachedByRows
from pagedkv.sims.calibrate.memory import MemoryFound
from pagedkv.sims.calibrate.speed import SpeedFound
from pagedkv.sims.calibrate.study import CalibrationStudy
from pagedkv.sims.console_table import plain_table
from pagedkv.units import gib

_SCALES = (("_bytes_per_s", 1e9, " GB/s"), ("_flops", 1e12, " TFLOPS"), ("_s", 1e-3, " ms"))
_ROWS = 40
"""Figures that are shown one by one."""


def show_calibration(study: CalibrationStudy, console: Console) -> None:
    """Print what came of measurements."""
    request = study.subject.request
    models = [request.model] if study.speed is None else [figure.point.subject.model for figure in study.speed.figures]
    titles = ", ".join(dict.fromkeys(model.title for model in models))
    title = f"{titles} in {request.weight_format.name} on {request.hardware.title}, {study.subject.engine}"
    console.print(Text(title, "bold"), "\n", soft_wrap=True)
    if study.speed is not None:
        _show_speed(study.speed, console)
    if study.memory is not None:
        _show_memory(study.memory, console)
    if study.speed is None:
        console.print(Text("No rate was fitted: step times stay as they are.\n"), soft_wrap=True)
    for reason in dict.fromkeys(each.reason for each in study.left_out):
        places = [each.where for each in study.left_out if each.reason == reason]
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        console.print(Text(f"Not fitted: {places[0]}{more}: {reason}", "yellow"), soft_wrap=True)
    for note in (*(study.speed.notes if study.speed else ()), *study.notes):
        console.print(Text(f"Note: {note}"), soft_wrap=True)


def _show_speed(speed: SpeedFound, console: Console) -> None:
    found, before = speed.found, speed.prior.constants
    table = plain_table("identified", "now", "before")
    for name in found.fitted:
        table.add_row(name, _in_units(name, getattr(found.constants, name)), _in_units(name, getattr(before, name)))
    for name in found.at_the_peak:
        table.add_row(f"{name} (the datasheet's limit)", _in_units(name, getattr(found.constants, name)), "")
    console.print(table)
    console.print()
    if found.kept:
        console.print(Text(f"Not identified, and kept from {speed.prior.basis}:", "bold"), soft_wrap=True)
        for why in dict.fromkeys(found.kept.values()):
            names = [name for name, its in found.kept.items() if its == why]
            values = ", ".join(f"{name} {_in_units(name, getattr(found.constants, name))}" for name in names)
            console.print(Text(f"  {values}: {why}"), soft_wrap=True)
        console.print()
    _show_figures(speed, console)
    mean, largest = speed.group["mean_error"], speed.group["largest_error"]
    counted = f"{len(speed.figures)} figure{'s' if len(speed.figures) > 1 else ''}, {len(found.fitted)} fitted"
    console.print(f"{counted}: mean error {mean:.1%}, largest {largest:.1%}.", markup=False)
    for kind, spread in speed.group["own_spread"].items():
        console.print(f"Left out one by one, {kind} figures come out within {spread:.1%}.", markup=False)
    status = f"Not validated: {speed.doubts}." if speed.doubts else "Validated by several models."
    console.print(Text(status + "\n", "yellow" if speed.doubts else "green"), soft_wrap=True)


def _show_figures(speed: SpeedFound, console: Console) -> None:
    """Print the rates as wide as they are: cut cells would hide what they are about."""
    lines = [("measured", "before", "now", "off by", "tokens/s of")]
    shown = zip(speed.figures, speed.before_tok_s, speed.fitted_tok_s, speed.errors, strict=True)
    for figure, old, new, error in islice(shown, _ROWS):
        lines.append((f"{figure.point.measured_tok_s:,.5g}", f"{old:,.5g}", f"{new:,.5g}", f"{error:+.1%}", figure.what))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for n, line in enumerate(lines):
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=False))
        console.print(Text(f"{numbers}  {line[4]}", "bold" if n == 0 else ""), soft_wrap=True)
    if len(speed.figures) > _ROWS:
        console.print(f"... and {len(speed.figures) - _ROWS} more, all in --json", markup=False)
    console.print()


def _show_memory(memory: MemoryFound, console: Console) -> None:
    console.print(Text(f"Memory, from {memory.where}:", "bold"), soft_wrap=True)
    for name in memory.changed:
        console.print(f"  {name} {gib(getattr(memory.hardware, name).value)}", markup=False)
    before = "no start" if memory.blocks_before is None else f"{memory.blocks_before:,}"
    sure = "" if memory.exact else " or some more or fewer: the log rounds"
    console.print(
        f"  {memory.blocks_after:,} KV blocks, as the log has{sure}; {before} before. Beside the KV cache the engine took "
        f"{gib(memory.non_kv_bytes)}, weights included.\n",
        markup=False,
        soft_wrap=True,
    )
    for note in memory.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)


def show_machine(machine: MeasuredMachine, console: Console) -> None:
    """Print what a machine was measured to reach."""
    for device in machine.devices:
        memory = "" if device.memory_bytes is None else f", {gib(device.memory_bytes)}"
        console.print(Text(f"{device.name}{memory}", "bold"))
        for rate in device.rates:
            moved = rate in (device.read, device.copy, device.kv_read)
            scale, unit = (1e9, "GB/s") if moved else (1e12, "TFLOPS") if rate.value >= 1e12 else (1e9, "GFLOPS")
            value, low, high = (f"{each / scale:,.4g}" for each in (rate.value, rate.low, rate.high))
            line = f"  {value:>6} {unit}  {rate.what} (median of {rate.num_samples}, {low} to {high})"
            console.print(Text(line), soft_wrap=True)
        if device.by_rows is not None:
            _show_by_rows(device.by_rows, console)
        console.print()
    like = "a machine that the catalogue does not have" if machine.like is None else f"{machine.like.name} with what was measured"
    console.print(f"The hardware file: {machine.devices[0].name} as {like}.", markup=False, soft_wrap=True)
    for note in machine.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)


def _show_by_rows(measured: ReachedByRows, console: Console) -> None:
    """Print what products reach by rows: each power of two, and the last."""
    values = zip(measured.rows, (rate.value for rate in measured.rates), strict=True)
    shown = [(n, value) for n, value in values if not n & (n - 1) or n == measured.rows[-1]]
    scale, unit = (1e12, "TFLOPS") if shown[-1][1] >= 1e12 else (1e9, "GFLOPS")
    rates = ", ".join(f"{n}: {value / scale:,.4g}" for n, value in shown)
    console.print(Text(f"  {unit} by rows: {rates}  {measured.rates[0].what}"), soft_wrap=True)


def _in_units(name: str, value: float) -> str:
    scale, unit = next(((s, u) for ending, s, u in _SCALES if name.endswith(ending)), (1.0, ""))
    return f"{value / scale:,.4g}{unit}"
