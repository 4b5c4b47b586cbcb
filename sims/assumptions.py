"""Every number that an answer rests on, with its source: the table behind docs/assumptions.md.

`python -m pagedkv.sims.assumptions` prints the generated part of that page.
"""

from collections.abc import Iterator

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.weight_format import WEIGHT_FORMATS

_UNITS = (("bytes/s)", 1e9, "GB/s"), ("(bytes)", 2**30, "GiB"), ("flop/s)", 1e12, "TFLOPS"), ("(s)", 1e-3, "ms"))


def machine_rows(name: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (what, value with unit, tag, source) for every figure of a machine."""
    for label, figure in load_hardware(name).figures():
        what, _, _ = label.partition(" (")
        scale, unit = next(((s, u) for mark, s, u in _UNITS if mark in label), (1.0, ""))
        yield what, f"{figure.value / scale:,.4g} {unit}".strip(), figure.tag, figure.source


def markdown() -> str:
    """Return the generated part of docs/assumptions.md."""
    lines = []
    for name in hardware_names():
        lines += [f"### {load_hardware(name).title} (`{name}`)", "", "| what | value | tag | source |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in machine_rows(name)]
        lines.append("")
    lines += ["### Weight formats", "", "| format | bits per weight | the rest | source |", "|---|---|---|---|"]
    lines += [f"| {f.name} | {f.bits_per_weight:g} | {f.wide_bits} bits | {f.source} |" for f in WEIGHT_FORMATS.values()]
    lines += ["", "### Models", "", "| model | parameters | KV bytes per token, 16 bits | source |", "|---|---|---|---|"]
    for name in model_names():
        model = load_model(name)
        kv = model.kv_spec("auto").bytes_per_token
        lines.append(f"| {name} | {model.params_total:,} | {kv:,} | {model.source} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
