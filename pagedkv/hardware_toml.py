"""Machines as TOML writes them: which fields a table must have, how numbers are written, and what is assumed of the rest.

A number is a table with a value, a tag and a source, or in a user's file just the value. A value has a unit; a share has none:

    memory_kind = "discrete"
    visible = "47.4 GiB"
    memory_bandwidth = { value = "960 GB/s", tag = "spec", source = "datasheet" }
    spec_flops.bf16 = "91 TFLOPS"
    default_utilization = 0.9

Rates by rows are two lists, `linear_by_rows.fp32 = { rows = [1, 2, 8], rates = ["10 GFLOPS", "20 GFLOPS", "60 GFLOPS"] }`.

Those first four fields are enough. Everything else is estimated: rates as shares of the datasheet's, sizes and times as on a
machine of the same kind that somebody measured. Each estimate says so in its source.

With `like = "dgx-spark"` no field is needed: what the file does not give is as on that machine, sources and all. A file may carry
step times that were fitted on the machine, `[[step_constants]]`, as `simulate calibrate` writes them.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, get_args

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import Figure, HardwareSpec, Tag
from pagedkv.quantity import DIMENSIONS, parse_quantity
from pagedkv.row_rates import RowRates

READ_SHARE = 0.85
"""Of the datasheet's bandwidth, what a kernel that streams weights reaches. Source: 232 of 273 GB/s on dgx-spark."""
KV_READ_SHARE = 0.70
"""The same for decode attention. Source: 190 of 273 GB/s on dgx-spark, 690 of 1,008 on rtx-4090."""
FLOPS_SHARES: Mapping[str, float] = MappingProxyType({"bf16": 0.65, "fp8": 0.50, "fp4": 0.30})
"""Of the datasheet's dense rate, what a prefill reaches. Source: bf16 from 0.65 (h100, estimated) to 0.90 (rtx-4090); fp8 0.45 and
fp4 0.30 on dgx-spark, fp8 0.76 on rtx-4090."""
MODEL_MACHINES: Mapping[str, str] = MappingProxyType({"unified": "dgx-spark", "discrete": "h100"})
"""The machine of each kind whose figures stand in for those that a table does not give."""

_UNITS = {spec.name: spec.metadata["unit"] for spec in fields(HardwareSpec) if spec.metadata}
_BY_DTYPE = ("spec_flops", "reached_flops")
AS_STORED = ("fp32", "bf16", "fp16")
"""Weight types that are multiplied as they are stored: rates by rows are of these."""
_UNIFIED_ONLY = ("os_reserve", "memory_floor", "nvcc_jobs")
_NEVER_ESTIMATED = ("disk_read_bandwidth", "disk_read_latency")
"""Where a table does not give it, it is not known: disks have little to do with the device."""
_TYPES = {"title": str, "small_compute_device": bool}
_OF_ONE_MACHINE = ("name", "aliases", "like", "step_constants")
"""Fields that a machine does not take from the one that it is like."""


def hardware_from_table(
    name: str,
    table: Mapping[str, Any],
    *,
    model_machine: HardwareSpec | None = None,
    like: HardwareSpec | None = None,
    unsourced: str | None = None,
) -> HardwareSpec:
    """Return the machine that a table describes.

    Args:
        name: Its name, with which messages begin.
        table: The fields of `HardwareSpec`.
        model_machine: Where the figures come from that the table does not give; None: the table must give all.
        like: The machine that the table says it is like: whatever it does not give is as on that one, and no field is needed.
        unsourced: The source of numbers that name none, e.g. the name of a user's file; None: every number must name one.

    Raises:
        ConfigError: If a field is missing or unknown, or a value has the wrong unit or type; with the value and what is needed.
    """
    known = {spec.name for spec in fields(HardwareSpec)} - {"name"}
    for key in table:
        if key not in known:
            raise unknown_name("field", f"{name}.{key}", (f"{name}.{each}" for each in known))
    given: dict[str, Any] = {"title": name}
    for key, value in table.items():
        where = f"{name}.{key}"
        if key in _BY_DTYPE:
            given[key] = {dtype: _figure(row, _UNITS[key], f"{where}.{dtype}", unsourced) for dtype, row in _rates(value, where)}
        elif key == "linear_by_rows":
            given[key] = _rates_by_rows(value, where, unsourced)
        elif key in _UNITS:
            given[key] = _figure(value, _UNITS[key], where, unsourced)
        else:
            given[key] = _plain(key, value, where)
    if like is not None:
        return _made(name, _with_those_of(like, given, titled="title" in table))
    if given.get("memory_kind") not in MODEL_MACHINES:
        raise ConfigError(
            f"{name}.memory_kind is {given.get('memory_kind')!r}: it must be {' or '.join(map(repr, MODEL_MACHINES))}"
        )
    for key in ("visible", "memory_bandwidth"):
        if key not in given:
            dimension = DIMENSIONS[_UNITS[key]]
            raise ConfigError(f'{name}.{key} is missing: write {dimension.name} such as {key} = "{dimension.example}"')
    if "bf16" not in given.get("spec_flops", {}):
        raise ConfigError(f'{name}.spec_flops.bf16 is missing: write the dense rate such as spec_flops.bf16 = "125 TFLOPS"')
    return _made(name, _with_estimates(name, given, model_machine))


def _made(name: str, complete: Mapping[str, Any]) -> HardwareSpec:
    try:
        return HardwareSpec(name=name, **complete)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _with_those_of(like: HardwareSpec, given: Mapping[str, Any], *, titled: bool) -> dict[str, Any]:
    """Return all fields: those given, and the rest as `like` has them; rates type by type."""
    theirs = {spec.name: getattr(like, spec.name) for spec in fields(HardwareSpec) if spec.name not in _OF_ONE_MACHINE}
    rates = {key: {**getattr(like, key), **given.get(key, {})} for key in (*_BY_DTYPE, "linear_by_rows")}
    return theirs | dict(given) | rates | {"like": like.name} | ({} if titled else {"title": like.title})


def _with_estimates(name: str, given: Mapping[str, Any], model_machine: HardwareSpec | None) -> dict[str, Any]:
    """Return all fields: those given, rates by their shares, and the rest as on `model_machine`."""
    complete = dict(given)
    bandwidth: float = given["memory_bandwidth"].value
    for key, share, measured in (
        ("read_bandwidth", READ_SHARE, "dgx-spark (232 of 273)"),
        ("kv_read_bandwidth", KV_READ_SHARE, "dgx-spark (190 of 273) and rtx-4090 (690 of 1,008)"),
    ):
        complete.setdefault(
            key, Figure(bandwidth * share, "estimated", f"{share:.0%} of memory_bandwidth, as measured on {measured}")
        )
    complete["reached_flops"] = {
        dtype: Figure(
            figure.value * FLOPS_SHARES[dtype], "estimated", f"{FLOPS_SHARES[dtype]:.0%} of spec_flops: see docs/hardware.md"
        )
        for dtype, figure in given["spec_flops"].items()
    } | given.get("reached_flops", {})
    for key in sorted(_UNITS.keys() - complete.keys() - {*_NEVER_ESTIMATED}):
        if key in _UNIFIED_ONLY and given["memory_kind"] == "discrete":
            continue
        if model_machine is None:
            raise ConfigError(f"{name}.{key} is missing")
        figure: Figure = getattr(model_machine, key)
        complete[key] = Figure(figure.value, "estimated", f"as on {model_machine.name}: {figure.source}")
    return complete


def _rates(value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f'{where} must be a table by compute dtype, such as {{ bf16 = "125 TFLOPS" }}, not {value!r}')
    for dtype in value:
        if dtype not in FLOPS_SHARES:
            raise unknown_name("compute dtype", f"{where}.{dtype}", FLOPS_SHARES)
    return value.items()


def _plain(key: str, value: object, where: str) -> object:
    if key == "aliases":
        if not isinstance(value, list) or not all(isinstance(alias, str) for alias in value):
            raise ConfigError(f"{where} must be a list of names, not {value!r}")
        return tuple(value)
    if key == "step_constants":
        if not isinstance(value, list) or not all(isinstance(group, dict) for group in value):
            raise ConfigError(
                f"{where} must be tables, each headed [[step_constants]] as simulate calibrate writes them, not {value!r}"
            )
        return tuple(value)
    expected = _TYPES.get(key, str)
    if type(value) is not expected:
        raise ConfigError(f"{where} must be {'text' if expected is str else 'true or false'}, not {value!r}")
    return value


def _figure(value: object, unit: str, where: str, unsourced: str | None) -> Figure:
    row = value if isinstance(value, Mapping) else {"value": value}
    tag, source = _provenance(row, ("value",), where, unsourced)
    number = _number(row["value"], unit, where)
    try:
        return Figure(number, tag, source)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _provenance(row: Mapping[str, Any], values: tuple[str, ...], where: str, unsourced: str | None) -> tuple[Tag, str]:
    """Return (tag, source) of a row that must have these `values`, and nothing else."""
    for key in row:
        if key not in (*values, "tag", "source"):
            raise unknown_name("field", f"{where}.{key}", (f"{where}.{each}" for each in (*values, "tag", "source")))
    for key in values:
        if key not in row:
            raise ConfigError(f"{where}.{key} is missing")
    if unsourced is None or ("tag" in row) != ("source" in row):
        for key in ("tag", "source"):
            if key not in row:
                raise ConfigError(f"{where}.{key} is missing: a number says where it comes from")
    # A number whose owner does not say how it is known counts as an estimate.
    tag, source = row.get("tag", "estimated"), row.get("source", f"{unsourced} gives no source")
    if not isinstance(tag, str) or not isinstance(source, str):
        raise ConfigError(f"{where}.tag and .source must be text, not {tag!r} and {source!r}")
    return tag, source  # type: ignore[return-value]


def _rates_by_rows(value: object, where: str, unsourced: str | None) -> dict[str, RowRates]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be tables by weight type, such as fp32 = {{ rows = [...], rates = [...] }}, not {value!r}")
    found = {}
    for dtype, row in value.items():
        its = f"{where}.{dtype}"
        if dtype not in AS_STORED:
            raise unknown_name("weight type", its, (f"{where}.{each}" for each in AS_STORED))
        if not isinstance(row, Mapping):
            raise ConfigError(f"{its} must be a table with rows and rates, not {row!r}")
        tag, source = _provenance(row, ("rows", "rates"), its, unsourced)
        if tag not in get_args(Tag):
            raise unknown_name("tag", f"{its}: {tag}", (f"{its}: {each}" for each in get_args(Tag)))
        rows, rates = row["rows"], row["rates"]
        if not isinstance(rows, list) or any(type(each) is not int for each in rows):
            raise ConfigError(f"{its}.rows must be a list of whole numbers such as [1, 2, 4], not {rows!r}")
        if not isinstance(rates, list):
            raise ConfigError(f'{its}.rates must be a list of compute rates such as ["10 GFLOPS", "20 GFLOPS"], not {rates!r}')
        flops = tuple(_number(rate, "flop/s", f"{its}.rates[{i}]") for i, rate in enumerate(rates))
        try:
            found[dtype] = RowRates(rows=tuple(rows), flops=flops, tag=tag, source=source)
        except ConfigError as error:
            raise ConfigError(f"{its}: {error}") from error
    return found


def _number(value: object, unit: str, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if unit not in DIMENSIONS:
        if not is_number:
            needed = "a whole number such as 20" if unit == "processes" else "a share such as 0.9"
            raise ConfigError(f"{where} must be {needed}, not {value!r}")
        return float(value)  # type: ignore[arg-type]
    dimension = DIMENSIONS[unit]
    if is_number:
        raise ConfigError(f'{where} {value!r} has no unit: write {dimension.name} such as "{dimension.example}"')
    if not isinstance(value, str):
        raise ConfigError(f'{where} must be {dimension.name} such as "{dimension.example}", not {value!r}')
    number = parse_quantity(value, unit, name=where)
    return float(round(number)) if unit == "bytes" else number
