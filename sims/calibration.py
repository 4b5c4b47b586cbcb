"""Which constants apply to a machine, an engine, a weight type and a KV type, how well they are known, and what they rest on."""

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.certainty import Certainty, spreads_of, unknown_spreads
from pagedkv.sims.constant_sources import CARRIED, FAMILIES, FAMILY_WORDS, carried_constants, families_of
from pagedkv.sims.step_constants import NUMBERS, StepConstants, catalogue_constants
from pagedkv.sims.step_groups import OF_WEIGHTS, checked_groups
from pagedkv.weight_format import WeightFormat

FILE = Path(__file__).with_name("step_constants.toml")
"""What `python -m pagedkv.sims.fit_step_time` writes."""

Status = Literal["validated", "not validated"]
_NOT_QUANTIZED_BITS = 16
"""Weights as wide as this are multiplied by the vendor's library, not by an engine's kernels for quantized ones."""
_SAME_CODE = {"ollama": "llama-cpp"}
"""Engines that run another's kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Constants, and what is known of them."""

    constants: StepConstants
    basis: str
    """The rows or figures that they come from."""
    status: Status
    """Whether rows of several models with this weight type confirm them."""
    why: str
    """Why they are not validated, and what stands in; empty if they are."""
    num_figures: int
    """Published figures that they were fitted to."""
    num_models: int
    """Models that those are of."""
    date: str
    """When they were fitted; empty for a machine's own figures."""
    decode_spread: float
    """How far a decode rate may be off, as a logarithm: from / e^x to × e^x; nine of ten figures of models left out lay within."""
    prefill_spread: float
    """The same for a prefill rate."""

    def document(self) -> dict[str, Any]:
        """Return what the result document says of it."""
        return {
            "status": self.status,
            "basis": self.basis,
            "why": self.why or None,
            "num_figures": self.num_figures,
            "num_models": self.num_models,
            "date": self.date or None,
            "decode_factor": math.exp(self.decode_spread),
            "prefill_factor": math.exp(self.prefill_spread),
        }


_OF_MEMORY = ("weight_read_bytes_per_s", "kv_read_bytes_per_s", "state_bytes_per_s", "further_state_bytes_per_s")
"""Constants that fall with the memory's bandwidth."""


def calibration_for(
    hardware: HardwareSpec,
    engine: str,
    weight_format: WeightFormat,
    kv_cache_dtype: str,
    *,
    model: ModelSpec,
    clock: float = 1.0,
    bandwidth: float = 1.0,
    build: str = "",
) -> Calibration:
    """Return what applies: the group of this very kind, else the nearest, else the machine's own figures, with wider spreads.

    Groups that the machine's file carries count as much as those that are shipped; for models that were measured there, so do the
    spreads of their own rates.

    Args:
        hardware: The machine, derated or not.
        engine: The preset's name, such as vllm@0.19.
        weight_format: How the weights are stored.
        kv_cache_dtype: How the cache is stored.
        model: What runs: models with states are known less well.
        clock: The share of its compute clock at which the machine runs.
        bandwidth: The share of its memory's bandwidth that others leave to the GPU.
        build: Older builds of the engine, by the name that the constants' file has for them; empty: current ones.

    Raises:
        ConfigError: If the machine's file carries a group that cannot be read.
    """
    families = families_of(model)
    base_engine = _SAME_CODE.get(engine, engine)
    prior = catalogue_constants(replace(hardware, linear_by_rows={}), weight_format)  # groups were fitted without rates by rows
    for group, other_engine in _groups(hardware, engine):
        weights = group["weights"].get(weight_format.name)
        if weights is None and not group["any_weights"]:
            continue
        doubts = _doubts(group, weights, engine, weight_format, kv_cache_dtype, other_engine=other_engine)
        why = [*doubts, *_unknown_family(group, model)]
        its = group["any_weights"] if weights is None else weights
        if weights is None and weight_format.bits_per_weight >= _NOT_QUANTIZED_BITS:
            its = {**its, "linear_flops": prior.linear_flops / clock}
        values = {**group["constants"], **{name: its[name] for name in OF_WEIGHTS}}
        values |= {name: values[name] * factor for name, factor in group.get("versions", {}).get(build, {}).items()}
        values |= {name: values[name] * clock for name in ("linear_flops", "attention_flops") if name in values}
        values |= {name: values[name] * bandwidth for name in _OF_MEMORY if name in values}
        measured = model.name in group.get("models", ()) and not other_engine and weights is not None
        measured = measured and kv_cache_dtype in group["kv_cache_dtypes"]
        certainty: Certainty = "measured" if measured else "doubted" if why else "known"
        spreads = spreads_of(group, certainty, families=families)
        return Calibration(
            constants=replace(prior, **values),
            basis=f"{group['engine']} on {group['machine']}: {group['source']}",
            status="not validated" if why else "validated",
            why="; ".join(why),
            num_figures=group["num_figures"],
            num_models=group["num_models"],
            date=group["date"],
            decode_spread=spreads["decode"],
            prefill_spread=spreads["prefill"],
        )
    unknown = _table()["catalogue"]
    everywhere = [*checked_groups(hardware.step_constants, hardware.name), *_table()["group"]]
    spreads = unknown_spreads(everywhere, base_engine, unknown, families=families)
    carried = carried_constants(everywhere, (hardware.name, hardware.like), base_engine) if model.num_experts else {}
    told: dict[str, Any] = {name: each.value for name, each in carried.items()}
    return Calibration(
        constants=replace(catalogue_constants(hardware, weight_format), **told),
        basis=f"the catalogue's figures of {hardware.name}",
        status="not validated",
        why=f"no published rows of {engine} with {weight_format.name} weights on {hardware.name} to fit to or compare with; "
        f"the interval is at least as wide as that of the nearest fit, and as such figures are off on {unknown['machine']}"
        + "".join(f"; {name} as of {each.whose}" for name, each in carried.items()),
        num_figures=0,
        num_models=0,
        date="",
        decode_spread=spreads["decode"],
        prefill_spread=spreads["prefill"],
    )


def fitted_groups() -> list[Mapping[str, Any]]:
    """Return every group of fitted constants, as the file has it."""
    return list(_table()["group"])


def _groups(hardware: HardwareSpec, engine: str) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yield the groups of a machine from the nearest on, and whether they are of another engine or version.

    Those that its file carries come before those of the machine that it is like.
    """
    own = checked_groups(hardware.step_constants, hardware.name)
    of_machine = [*own, *(group for group in _table()["group"] if group["machine"] in (hardware.name, hardware.like))]
    name = _SAME_CODE.get(engine, engine)
    base = name.partition("@")[0]
    yield from ((group, False) for group in of_machine if group["engine"] == engine)
    yield from ((group, True) for group in of_machine if group["engine"] == name != engine)
    others = (group for group in of_machine if group["engine"] not in (name, engine))
    yield from ((group, True) for group in others if group["engine"].partition("@")[0] == base)


def _doubts(
    group: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    engine: str,
    weight_format: WeightFormat,
    kv_cache_dtype: str,
    *,
    other_engine: bool,
) -> Iterator[str]:
    """Yield why constants of `group` are less than validated for what is asked."""
    if other_engine:
        yield f"no rows of {engine} here: those of {group['engine']} stand in"
    if weights is None:
        stand_in = f"the mean of {', '.join(group['weights'])} stands in"
        if weight_format.bits_per_weight >= _NOT_QUANTIZED_BITS:
            stand_in += ", but for arithmetic, where the catalogue's figure does"
        yield f"no rows with {weight_format.name} weights: {stand_in}"
    elif weights["num_models"] < 2:
        yield f"its rows with {weight_format.name} weights are of a single model"
    elif group["too_few"]:
        yield f"its {group['num_figures']} figures are too few for {group['num_constants']} constants"
    if group.get("doubt"):
        yield group["doubt"]
    if kv_cache_dtype not in group["kv_cache_dtypes"]:
        yield f"its rows have a KV cache in {' or '.join(group['kv_cache_dtypes'])}, not {kv_cache_dtype}"


def _unknown_family(group: Mapping[str, Any], model: ModelSpec) -> Iterator[str]:
    """Yield for which of a model's families the rows of `group` hold no model, and where what these would tell comes from."""
    for family in families_of(model):
        if "families" in group and family not in group["families"]:
            carried = [f"{name} {group['assumed'][name]}" for name in FAMILIES[family] if name in CARRIED]
            yield f"its rows have no {FAMILY_WORDS[family]}" + "".join(f"; {each}" for each in carried)


@cache
def _table() -> Mapping[str, Any]:
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))
    assert all(set(group["constants"]) < set(NUMBERS) for group in table["group"])
    return table
