"""What is less known is never stated more surely: over every machine, engine, weight type, cache and kind of model."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest

from pagedkv.catalogue import hardware_names, load_hardware, load_model
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.calibration import Calibration, calibration_for, fitted_groups
from pagedkv.sims.certainty import spreads_of
from pagedkv.sims.constant_sources import CARRIED, FAMILIES, carried_constants, families_of
from pagedkv.sims.engines import ENGINES
from pagedkv.weight_format import WEIGHT_FORMATS

MODELS = [load_model(name) for name in ("llama-3.1-8b", "gpt-oss-120b", "qwen3.6-27b", "qwen3.6-35b-a3b", "glm-4.7-flash")]
SPARK = load_hardware("dgx-spark")
RANK = {"known": 0, "doubted": 1, "unknown": 2}


class Stated(NamedTuple):
    engine: str
    """Without its version."""
    rank: int
    spreads: tuple[float, float]


def known(machine: HardwareSpec, engine: str, weights: str, model: ModelSpec, kv: str = "auto") -> Calibration:
    return calibration_for(machine, engine, WEIGHT_FORMATS[weights], kv, model=model)


def rank(found: Calibration) -> int:
    if found.num_figures == 0:
        return RANK["unknown"]
    return RANK["doubted" if found.why else "known"]


def everything(model: ModelSpec) -> Iterator[Stated]:
    for name, engine, weights, kv in product(hardware_names(), ENGINES.names(), WEIGHT_FORMATS, ("auto", "fp8")):
        found = known(load_hardware(name), engine, weights, model, kv)
        base = {"ollama": "llama-cpp"}.get(engine, engine.partition("@")[0])
        yield Stated(base, rank(found), (found.decode_spread, found.prefill_spread))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_what_is_less_known_is_never_stated_more_surely(model: ModelSpec) -> None:
    stated = set(everything(model))
    assert {each.rank for each in stated} >= {RANK["doubted"], RANK["unknown"]}
    for better, worse in product(stated, stated):
        if better.engine == worse.engine and better.rank < worse.rank:
            assert all(a <= b for a, b in zip(better.spreads, worse.spreads, strict=True)), (better, worse)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_an_engine_without_any_rows_is_stated_less_surely_than_every_other(model: ModelSpec) -> None:
    stated = set(everything(model))
    for none in (each for each in stated if each.engine in ("tensorrt-llm", "naive")):
        assert all(a <= b for each in stated for a, b in zip(each.spreads, none.spreads, strict=True))


@pytest.mark.parametrize(("engine", "weights"), [("vllm", "fp8"), ("vllm", "bf16"), ("llama-cpp", "q8_0"), ("sglang", "fp8")])
def test_a_model_of_more_families_is_never_stated_more_surely(engine: str, weights: str) -> None:
    by_families = {families_of(model): known(SPARK, engine, weights, model) for model in MODELS}
    plain = by_families[()]
    for found in by_families.values():
        assert found.decode_spread >= plain.decode_spread
        assert found.prefill_spread >= plain.prefill_spread


def group(own: float, spread: float) -> dict[str, Any]:
    """A group as `simulate calibrate` writes it: a model measured to within `own`, others known to within `spread`."""
    its = {f"{prefix}{kind}": spread for prefix in ("", "state_", "experts_") for kind in ("decode", "prefill")}
    return {"engine": "vllm", "widened": 1.0, "spread": its, "own_spread": {"decode": own}}


@pytest.mark.parametrize(("own", "spread"), [(0.05, 0.4), (0.5, 0.2)])
def test_no_model_is_known_better_than_one_that_was_measured(own: float, spread: float) -> None:
    widths = [spreads_of(group(own, spread), each, families=())["decode"] for each in ("measured", "known", "doubted", "unknown")]
    assert widths[0] == own
    assert widths == sorted(widths)


def test_a_mixture_under_an_engine_without_rows_of_one_is_doubted_and_takes_its_routing_from_kernels_alike() -> None:
    groups = {each["engine"]: each for each in fitted_groups()}
    dense, mixture = (known(SPARK, "sglang", "fp8", load_model(name)) for name in ("qwen3-14b", "qwen3-30b-a3b"))
    assert dense.status == "validated"
    assert mixture.status == "not validated"
    assert "its rows have no mixture of experts" in mixture.why
    assert mixture.decode_spread >= 2 * dense.decode_spread
    assert groups["vllm"]["constants"]["routing_exponent"] > groups["llama-cpp"]["constants"]["routing_exponent"]
    for name in groups["vllm"]["fitted"]:
        if name in groups["sglang"]["assumed"]:
            assert getattr(mixture.constants, name) == groups["vllm"]["constants"][name]
            assert "as of vllm on dgx-spark" in groups["sglang"]["assumed"][name]
    assert set(CARRIED) < set(groups["sglang"]["assumed"])


@pytest.mark.parametrize(
    ("hardware", "engine", "weights", "whose"),
    [("h100", "vllm", "fp8", "vllm"), ("h100", "sglang", "fp8", "vllm"), ("dgx-spark", "tensorrt-llm", "nvfp4", "llama-cpp")],
)
def test_without_rows_a_mixture_takes_its_routing_from_its_kernels_elsewhere_or_from_rows_of_most_models(
    hardware: str, engine: str, weights: str, whose: str
) -> None:
    machine = load_hardware(hardware)
    mixture, dense = (known(machine, engine, weights, load_model(name)) for name in ("qwen3-30b-a3b", "qwen3-8b"))
    groups = {each["engine"]: each for each in fitted_groups()}
    assert mixture.constants.routing_exponent == groups[whose]["constants"]["routing_exponent"]
    assert f"routing_exponent as of {whose} on dgx-spark" in mixture.why
    assert "routing_exponent" not in dense.why
    unshared = {name for name in groups["vllm"]["fitted"] if name not in CARRIED}
    assert all(f"{name} as of" not in mixture.why for name in unshared), "another machine's rates are not this one's"


def test_rows_of_the_same_engine_on_the_machine_come_first() -> None:
    groups = fitted_groups()
    told = carried_constants(groups, ("dgx-spark",), "vllm@0.19")
    assert {each.whose for each in told.values()} == {"vllm on dgx-spark"}
    elsewhere = carried_constants(groups, ("h100", ""), "vllm")
    assert set(elsewhere) == set(CARRIED)
    assert {each.whose for each in elsewhere.values()} == {"vllm on dgx-spark"}


def test_every_constant_of_a_group_is_told_by_its_rows_or_has_an_origin() -> None:
    for each in fitted_groups():
        assert set(each["fitted"]) | set(each["assumed"]) == set(each["constants"])
        assert not set(each["fitted"]) & set(each["assumed"])
        for family, names in FAMILIES.items():
            if family not in each["families"]:
                assert not set(names) & set(each["fitted"])


def test_a_measured_model_with_another_cache_is_known_like_any_other() -> None:
    shipped = next(each for each in fitted_groups() if each["engine"] == "vllm")
    numbers = {name: value for name, value in shipped["weights"]["fp8"].items() if name != "fitted"}
    its = {
        **shipped,
        "weights": {"fp8": numbers},
        "machine": "mine",
        "models": ["llama-3.1-8b"],
        "own_spread": {"decode": 0.05, "prefill": 0.05},
        "kv_cache_dtypes": ["auto"],
    }
    mine = replace(SPARK, name="mine", like="dgx-spark", step_constants=(its,))
    same, other = (known(mine, "vllm", "fp8", MODELS[0], kv) for kv in ("auto", "fp8"))
    assert same.decode_spread == 0.05 < other.decode_spread
