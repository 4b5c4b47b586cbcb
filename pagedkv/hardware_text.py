"""A machine as the text of a hardware file: what `hardware_toml` reads, written."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields

from pagedkv.hardware_spec import Figure, HardwareSpec
from pagedkv.row_rates import RowRates

_UNITS = {"bytes": ("B", 1.0), "bytes/s": ("GB/s", 1e9), "flop/s": ("TFLOPS", 1e12), "s": ("ms", 1e-3)}
"""How a figure is written, by base unit; a share has no unit."""


def hardware_lines(hardware: HardwareSpec, *, like: HardwareSpec | None = None) -> Iterator[str]:
    """Yield the lines of a file that `load_hardware` reads as `hardware`, its step constants aside.

    Args:
        hardware: The machine.
        like: The machine of the catalogue that it is like: only what differs from it is written. None: all figures are.
    """
    if like is not None:
        yield f"like = {quoted(like.name)}"
    for spec in fields(HardwareSpec):
        value, theirs = getattr(hardware, spec.name), None if like is None else getattr(like, spec.name)
        if spec.name in ("name", "aliases", "like", "step_constants") or value is None or (like is not None and value == theirs):
            continue
        if isinstance(value, Mapping):
            of_type = {} if theirs is None else theirs
            for dtype, figure in value.items():
                if figure != of_type.get(dtype):
                    written = _by_rows(figure) if isinstance(figure, RowRates) else _figure(figure, spec.metadata["unit"])
                    yield f"{spec.name}.{dtype} = {written}"
        elif isinstance(value, Figure):
            yield f"{spec.name} = {_figure(value, spec.metadata['unit'])}"
        else:
            yield f"{spec.name} = {json.dumps(value) if isinstance(value, bool) else quoted(value)}"


def quoted(text: str) -> str:
    """Return a TOML string: JSON's, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _figure(figure: Figure, unit: str) -> str:
    if unit in _UNITS:
        name, scale = _UNITS[unit]
        number = f"{figure.value:.0f}" if unit == "bytes" else f"{figure.value / scale:.10g}"
        value = quoted(f"{number} {name}")
    else:
        value = repr(figure.value)
    return f"{{ value = {value}, tag = {quoted(figure.tag)}, source = {quoted(figure.source)} }}"


def _by_rows(table: RowRates) -> str:
    rates = ", ".join(quoted(f"{rate / 1e9:.10g} GFLOPS") for rate in table.flops)
    rows = ", ".join(map(str, table.rows))
    return f"{{ rows = [{rows}], rates = [{rates}], tag = {quoted(table.tag)}, source = {quoted(table.source)} }}"
