"""`simulate calibrate`: which constants measurements identify, and that known ones are found again."""

from dataclasses import replace

import numpy as np
import pytest
from calibrations import SERVING, SPARK, SWEEP, decode, fitted, made_of, prefill, study
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pagedkv.catalogue import load_model
from pagedkv.sims.calibrate.identified import identify, peaks_of
from pagedkv.sims.calibrate.identified import rates as rates_of
from pagedkv.sims.calibration import calibration_for
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.sims.validation.work import Work
from pagedkv.weight_format import load_weight_format


def test_one_decode_rate_says_how_fast_weights_are_read_and_nothing_else() -> None:
    found = study(decode(22.0))
    assert fitted(found) == ("weight_read_bytes_per_s",)
    assert found.speed is not None
    assert "hardly depend" in found.speed.found.kept["linear_flops"]
    assert "weight_read_bytes_per_s can change too" in found.speed.found.kept["step_overhead_s"]
    assert found.speed.errors == [pytest.approx(0, abs=1e-3)]
    before = calibration_for(SPARK, "vllm", load_weight_format("fp8"), "auto", model=load_model("llama-3.1-8b")).constants
    assert replace(found.speed.found.constants, weight_read_bytes_per_s=before.weight_read_bytes_per_s) == before


def test_a_prefill_rate_says_how_fast_it_multiplies() -> None:
    assert fitted(study(prefill(5000.0))) == ("linear_flops",)


@pytest.mark.parametrize(
    ("model", "made", "read"), [("gpt-oss-120b", 33.0, 1700.0), ("qwen3-30b-a3b", 33.0, 3000.0), ("qwen3.5-35b-a3b", 28.0, 2500.0)]
)
def test_a_mixture_s_prefill_says_how_fast_it_multiplies_though_reading_hid_it(model: str, made: float, read: float) -> None:
    """A prefill reads all experts, which takes longer than multiplying at the catalogue's rate: a slow one is slow arithmetic."""
    found = study(decode(made), prefill(read), serving=ServingConfig(model=model))
    assert set(fitted(found)) == {"weight_read_bytes_per_s", "linear_flops"}
    assert found.speed is not None
    assert found.speed.errors == [pytest.approx(0, abs=5e-3)] * 2
    assert found.speed.found.constants.weight_read_bytes_per_s > 0.6 * SPARK.read_bandwidth.value


def test_a_large_batch_at_a_long_context_says_how_fast_keys_are_read() -> None:
    assert fitted(study(decode(150.0, batch=64, depth=8192)))[0] == "kv_read_bytes_per_s"


def test_batches_at_one_context_say_what_a_sequence_costs_and_not_how_fast_keys_are_read() -> None:
    rates = [decode(rate, batch=batch) for batch, rate in ((1, 22.0), (8, 160.0), (32, 500.0))]
    assert set(fitted(study(*rates))) == {"weight_read_bytes_per_s", "sequence_overhead_s"}


def test_contexts_at_batch_one_say_how_fast_keys_are_read() -> None:
    rates = [decode(rate, depth=depth) for depth, rate in ((16, 22.5), (32_768, 14.5), (65_536, 10.5))]
    assert set(fitted(study(*rates))) == {"weight_read_bytes_per_s", "kv_read_bytes_per_s"}


@given(
    factors=st.fixed_dictionaries(
        {
            "weight_read_bytes_per_s": st.floats(0.75, 1.1),
            "linear_flops": st.floats(0.6, 1.3),
            "kv_read_bytes_per_s": st.floats(0.7, 1.05),
            "sequence_overhead_s": st.floats(0.5, 4.0),
        }
    )
)
@examples(max_examples=12)
def test_constants_that_are_known_are_found_again(factors: dict[str, float]) -> None:
    base = calibration_for(SPARK, "vllm", load_weight_format("fp8"), "auto", model=load_model("llama-3.1-8b")).constants
    truth = replace(base, **{name: getattr(base, name) * factor for name, factor in factors.items()})
    measured = made_of(truth, SWEEP)
    found = study(*measured)
    assert found.speed is not None
    assert max(map(abs, found.speed.errors)) < 0.02
    for name in set(fitted(found)) & {"weight_read_bytes_per_s", "linear_flops", "kv_read_bytes_per_s"}:
        assert getattr(found.speed.found.constants, name) == pytest.approx(getattr(truth, name), rel=0.08)


def test_a_rate_is_held_at_the_datasheet_and_a_fixed_cost_gives_way() -> None:
    """52 tokens/s of Llama-3.1-8B in NVFP4 read 263 of 273 GB/s; with 3 ms of overhead in each step it would have to be 312."""
    serving = replace(SERVING, quantization="nvfp4")
    found = study(decode(52.0), serving=serving)
    assert found.speed is not None
    assert found.speed.found.at_the_peak == ("weight_read_bytes_per_s",)
    assert found.speed.found.constants.weight_read_bytes_per_s == SPARK.memory_bandwidth.value
    assert fitted(found) == ("step_overhead_s",)
    assert found.speed.errors == [pytest.approx(0, abs=1e-3)]
    assert "datasheet's limit" in " ".join(found.speed.notes)


BATCHES = (1, 2, 4, 8, 16, 32)
PUBLISHED = (57.5, 78.4, 107.9, 153.5, 218.5, 318.7)
"""Decode tokens/s of gpt-oss-120b on one Spark, vLLM, prompts of 1,024: kubis.ai, gpt-oss-120b-topology-benchmark (2026-03-22)."""


@pytest.mark.parametrize("weights", ["mxfp4", "mxfp4+fp8", "mxfp4-all"])
def test_batches_of_a_mixture_say_how_many_experts_they_touch(weights: str) -> None:
    rates = [decode(rate, batch=batch, depth=1088) for batch, rate in zip(BATCHES, PUBLISHED, strict=True)]
    found = study(*rates, serving=ServingConfig(model="gpt-oss-120b", quantization=weights))
    assert "routing_exponent" in fitted(found)
    assert found.speed is not None
    assert 0.5 < found.speed.found.constants.routing_exponent < 0.85
    assert set(found.speed.found.at_the_peak) <= {"weight_read_bytes_per_s"}  # 16 bits beside the experts would be read at 290 GB/s
    assert max(map(abs, found.speed.errors)) < 0.12


@given(exponent=st.floats(0.5, 0.95), before=st.sampled_from([0.6, 0.8, 1.0]))
@examples(max_examples=8)
def test_the_exponent_of_routing_is_found_from_wherever_it_begins(exponent: float, before: float) -> None:
    model, fmt = load_model("gpt-oss-120b"), load_weight_format("mxfp4")
    rates = [decode(1.0, batch=batch, depth=1088) for batch in BATCHES]
    subject_figures = study(*rates, serving=ServingConfig(model=model.name, quantization=fmt.name)).speed
    assert subject_figures is not None
    points = [figure.point for figure in subject_figures.figures]
    work, prior = Work.of(points), replace(catalogue_constants(SPARK, fmt), routing_exponent=before)
    measured = rates_of(work, replace(prior, routing_exponent=exponent))
    found = identify(work, measured, np.zeros(len(points), np.bool_), prior, peaks_of(SPARK, fmt))
    assert found.constants.routing_exponent == pytest.approx(exponent, abs=0.03)
