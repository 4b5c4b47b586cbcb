"""The fit: it finds constants that are known, prices as a simulation does, and wrote the committed file."""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.sims.calibration import FILE
from pagedkv.sims.fit_step_time import LOG, MACHINE, ROWS, catalogue_spread, document, fit_all
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.sims.step_formula import overlapped, touched_experts
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.sims.validation.benchmark_rows import FURTHER, BenchmarkRow, read_rows
from pagedkv.sims.validation.fitting import PLANS, Plan, fit
from pagedkv.sims.validation.least_error import least_mean_error
from pagedkv.sims.validation.least_squares import least_squares, softened
from pagedkv.sims.validation.points import Point, points_of
from pagedkv.sims.validation.work import Work, as_row

SPARK = load_hardware("dgx-spark")
ENGINE = "SGLang"


def rows(models: tuple[str, ...] = ("llama-3.1-8b", "qwen2.5-14b", "gpt-oss-20b")) -> list[BenchmarkRow]:
    """Rows of prefill and decode, to be given rates."""
    return [
        BenchmarkRow(
            line=line,
            source="made",
            engine=ENGINE,
            model=model,
            weight_dtype=weights,
            batch=batch,
            prompt_tokens=prompt,
            context_depth=0,
            prefill_tok_s=1.0,
            decode_tok_s=1.0,
            note="tg128",
            verified=True,
        )
        for line, (model, weights, batch, prompt) in enumerate(
            (model, weights, batch, prompt)
            for model in models
            for weights in ("fp8", "bf16")
            for batch in (1, 8, 32)
            for prompt in (512, 4096)
        )
    ]


def points() -> list[Point]:
    return points_of(rows())[0]


def at_rates(made: list[Point], **factors: float) -> list[Point]:
    """The same figures as a machine would have measured whose constants are these multiples of the catalogue's."""
    work = Work.of(made)
    constants = []
    for point in made:
        prior = catalogue_constants(SPARK, point.subject.weight_format)
        constants.append(as_row(replace(prior, **{name: getattr(prior, name) * factor for name, factor in factors.items()})))
    return [replace(point, measured_tok_s=float(rate)) for point, rate in zip(made, work.rates(np.stack(constants)), strict=True)]


def test_a_figure_is_priced_as_a_simulation_prices_its_steps() -> None:
    made = points_of(rows(("llama-3.1-8b", "gpt-oss-20b", "glm-4.7-flash", "nemotron-3-nano-4b")))[0]
    constants = [catalogue_constants(SPARK, point.subject.weight_format) for point in made]
    constants = [
        replace(each, overlap=2.5, routing_exponent=0.7, batched_layer_overhead_s=1e-4, expert_rate=0.6, latent_attention=1.0)
        for each in constants
    ]
    rates = Work.of(made).rates(np.stack([as_row(each) for each in constants]))
    for point, its, rate in zip(made, constants, rates, strict=True):
        model = point.subject.model
        step_time = RooflineStepTime(
            model,
            SPARK,
            weight_format=point.subject.weight_format,
            kv_spec=model.kv_spec(point.kv_cache_dtype),
            constants=its,
        )
        seconds = sum(steps.count * step_time.cost(steps.batch, steps.batch.size).total_s for steps in point.steps)
        assert rate == pytest.approx(point.tokens / seconds)


@pytest.mark.parametrize(
    ("model", "constant", "slower"),
    [
        ("gpt-oss-20b", "expert_rate", True),
        ("llama-3.1-8b", "expert_rate", False),
        ("glm-4.7-flash", "latent_attention", True),
        ("gpt-oss-20b", "latent_attention", False),
    ],
)
def test_experts_and_latents_cost_only_models_that_have_them(model: str, constant: str, slower: bool) -> None:
    (point,) = (each for each in points_of(rows((model,))[1:2])[0] if each.kind == "prefill")
    prior = catalogue_constants(SPARK, point.subject.weight_format)
    changed = replace(prior, **{constant: 0.5})
    before, after = (Work.of([point]).rates(as_row(each)[None])[0] for each in (prior, changed))
    assert (after < before) if slower else (after == before)


def test_no_fit_comes_below_the_least_error() -> None:
    plan = Plan(engine="sglang")
    made = [point for point in at_rates(points(), weight_read_bytes_per_s=0.8) if point.subject.weight_format.name == "fp8"]
    assert least_mean_error(plan, SPARK, made) < 0.02
    torn = [replace(point, measured_tok_s=point.measured_tok_s * (1 + i % 2)) for i, point in enumerate([made[1]] * 4)]
    least = least_mean_error(plan, SPARK, torn)
    assert least == pytest.approx(0.25, abs=0.01)  # half of the figures exact, the others half too low
    work = Work.of(torn)
    rates = work.rates(fit(plan, SPARK, torn, work).rows(torn))
    assert float(np.mean([abs(rate / point.measured_tok_s - 1) for rate, point in zip(rates, torn, strict=True)])) >= least - 0.01
    assert least_mean_error(PLANS[0], SPARK, torn) is None  # too many constants to try all


def test_the_fit_finds_the_constants_that_made_the_rates() -> None:
    made = at_rates(points(), weight_read_bytes_per_s=0.8, kv_read_bytes_per_s=0.7, sequence_overhead_s=10.0)
    plan = Plan(engine="sglang", shared=("kv_read_bytes_per_s", "sequence_overhead_s"), by_format=("weight_read_bytes_per_s",))
    found = fit(plan, SPARK, made, Work.of(made))
    constants = found.constants(catalogue_constants(SPARK, made[0].subject.weight_format), "fp8")
    assert constants.weight_read_bytes_per_s == pytest.approx(0.8 * SPARK.read_bandwidth_bytes_per_s, rel=0.02)
    assert constants.kv_read_bytes_per_s == pytest.approx(0.7 * SPARK.kv_read_bandwidth_bytes_per_s, rel=0.05)
    assert constants.sequence_overhead_s == pytest.approx(10 * SPARK.sequence_overhead_s, rel=0.15)
    assert found.num_constants == 4


def test_one_wrong_row_does_not_decide() -> None:
    made = at_rates(points(), weight_read_bytes_per_s=0.8)
    spoilt = [replace(made[1], measured_tok_s=made[1].measured_tok_s * 20), *made[:1], *made[2:]]
    plan = Plan(engine="sglang", by_format=("weight_read_bytes_per_s",))
    found = fit(plan, SPARK, spoilt, Work.of(spoilt))
    constants = found.constants(catalogue_constants(SPARK, made[0].subject.weight_format), "fp8")
    assert constants.weight_read_bytes_per_s == pytest.approx(0.8 * SPARK.read_bandwidth_bytes_per_s, rel=0.05)


def test_a_weight_type_without_rows_gets_the_mean_of_the_others() -> None:
    made = at_rates(points(), weight_read_bytes_per_s=0.8)
    found = fit(PLANS[-1], SPARK, made, Work.of(made))
    prior = catalogue_constants(SPARK, made[0].subject.weight_format)
    fp8, bf16, other = (found.constants(prior, fmt).weight_read_bytes_per_s for fmt in ("fp8", "bf16", "int4"))
    assert min(fp8, bf16) * 0.99 <= other <= max(fp8, bf16) * 1.01


def test_least_squares_finds_a_minimum() -> None:
    def rosenbrock(x: Any) -> Any:
        return np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    assert least_squares(rosenbrock, np.array([-1.2, 1.0]), iterations=300) == pytest.approx([1, 1], abs=1e-3)


@given(size=st.floats(0.01, 50))
def test_softened_residuals_grow_slower_beyond_the_threshold(size: float) -> None:
    (soft,) = softened(np.array([size]), 3.0)
    assert 0 < soft <= size + 1e-12
    assert (soft == pytest.approx(size)) == (size <= 3.0 or size == pytest.approx(3.0, rel=1e-2))
    assert softened(np.array([-size]), 3.0)[0] == -soft


@given(memory=st.floats(0, 10), compute=st.floats(0, 10), p=st.floats(1, 20))
def test_overlap_lies_between_the_longer_part_and_the_sum(memory: float, compute: float, p: float) -> None:
    took = overlapped(memory, compute, p)
    assert max(memory, compute) <= took * (1 + 1e-9)
    assert took <= (memory + compute) * (1 + 1e-9)
    assert took == pytest.approx(overlapped(compute, memory, p))
    assert overlapped(memory, compute, np.inf) == max(memory, compute)
    assert overlapped(memory, compute, 1.0) == pytest.approx(memory + compute)
    assert overlapped(memory, compute, 2 * p) <= took * (1 + 1e-9)


@given(tokens=st.integers(1, 5000), exponent=st.floats(0.3, 1.0))
def test_more_tokens_touch_more_experts_and_a_smaller_exponent_fewer(tokens: int, exponent: float) -> None:
    share = 4 / 32
    assert share - 1e-12 <= touched_experts(share, tokens, exponent) <= touched_experts(share, tokens, 1.0) + 1e-12 <= 1 + 1e-9
    assert touched_experts(share, 1, exponent) == pytest.approx(share)
    assert touched_experts(share, tokens, exponent) <= touched_experts(share, tokens + 1, exponent)


def test_a_step_of_one_token_does_not_pay_for_launching_a_batch() -> None:
    model = load_model("llama-3.1-8b")
    prior = catalogue_constants(SPARK, model.native_format)
    costs = []
    for extra in (0.0, 1e-3):
        step_time = RooflineStepTime(
            model,
            SPARK,
            weight_format=model.native_format,
            kv_spec=model.kv_spec("auto"),
            constants=replace(prior, batched_layer_overhead_s=extra),
        )
        costs.append([step_time.prefill_cost(n, max_num_batched_tokens=64).overhead_s for n in (1, 2, 128)])
    differences = [after - before for before, after in zip(*costs, strict=True)]
    assert differences == pytest.approx([0.0, 1e-3 * model.num_layers, 2e-3 * model.num_layers])


def numbers_of(table: Any, path: str = "") -> Mapping[str, Any]:
    if isinstance(table, Mapping):
        return {k: v for name, each in table.items() for k, v in numbers_of(each, f"{path}.{name}").items()}
    if isinstance(table, list) and table and isinstance(table[0], Mapping):
        return {k: v for i, each in enumerate(table) for k, v in numbers_of(each, f"{path}[{i}]").items()}
    return {path: table}


def test_the_committed_constants_are_what_the_script_writes(shared_data: Path) -> None:
    hardware = load_hardware(MACHINE)
    found, _ = points_of([*read_rows(shared_data / ROWS), *read_rows(FURTHER)])
    fitted = fit_all(found, hardware)
    lines = document(fitted, catalogue_spread(found, fitted, hardware), hardware, "", shared_data / LOG)
    fresh = numbers_of(tomllib.loads("\n".join(lines)))
    committed = numbers_of(tomllib.loads(FILE.read_text(encoding="utf-8")))
    assert fresh.keys() == committed.keys()
    for name, value in committed.items():
        if not name.endswith(".date"):
            # Another processor's rounding may end the search elsewhere; what the rows decide stays.
            assert fresh[name] == (pytest.approx(value, rel=0.1, nan_ok=True) if isinstance(value, float) else value), name
