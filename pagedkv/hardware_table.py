"""All machines of the catalogue at a glance: the table in docs/hardware.md, which `python -m pagedkv.hardware_table` prints."""

from collections.abc import Iterator

from pagedkv.catalogue import hardware_names, load_hardware
from pagedkv.hardware_spec import Figure, HardwareSpec
from pagedkv.units import GIB

_HEADER = (
    "`--hardware`",
    "machine",
    "memory",
    "visible, GiB",
    "bandwidth, GB/s",
    "weights read, GB/s",
    "KV read, GB/s",
    "prefill bf16 / fp8 / fp4, TFLOPS",
    "default utilization",
)


def markdown() -> str:
    """Return the table; a number that nobody measured or printed has a ~."""
    rows = (_row(load_hardware(name)) for name in hardware_names())
    return "".join(f"| {' | '.join(row)} |\n" for row in (_HEADER, ["---"] * len(_HEADER), *rows))


def _row(hardware: HardwareSpec) -> Iterator[str]:
    yield ", ".join(f"`{name}`" for name in (hardware.name, *hardware.aliases))
    yield hardware.title
    yield hardware.memory_kind
    yield _number(hardware.visible, GIB, ".2f")
    for figure in (hardware.memory_bandwidth, hardware.read_bandwidth, hardware.kv_read_bandwidth):
        yield _number(figure, 1e9, ",.0f")
    reached = (hardware.reached_flops.get(dtype) for dtype in ("bf16", "fp8", "fp4"))
    yield " / ".join("–" if figure is None else _number(figure, 1e12, ",.0f") for figure in reached)
    yield _number(hardware.default_utilization, 1, "g")


def _number(figure: Figure, unit: float, spec: str) -> str:
    return ("~" if figure.tag == "estimated" else "") + format(figure.value / unit, spec)


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
