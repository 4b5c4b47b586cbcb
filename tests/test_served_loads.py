"""Loads that a real server served: the requests are those that were sent, and what comes out is near what was measured."""

from dataclasses import replace

import numpy as np
import pytest

from pagedkv.catalogue import load_hardware
from pagedkv.sims.validation.row_models import RowModel, model_of
from pagedkv.sims.validation.served_loads import ServedLoad, requests_of, served_loads
from pagedkv.sims.validation.served_section import ENGINE, section, simulated, why_not_compared

LOADS = served_loads()
RANDOM = [load for load in LOADS if load.input_len is not None]
BY_NAME = {load.source: load for load in LOADS}


def test_what_was_measured_is_possible() -> None:
    assert len({load.source for load in LOADS}) == len(LOADS) > 200
    for load in LOADS:
        assert 0 < load.ttft_s < load.e2e_s < load.duration_s
        assert load.num_prompts / load.request_rate_per_s < 1.02 * load.duration_s
        assert isinstance(model_of(load.model, load.weight_dtype, ENGINE), RowModel)


def test_the_requests_are_the_ones_that_were_sent() -> None:
    assert sum(not why_not_compared(load) for load in RANDOM) > 0.9 * len(RANDOM)
    for load in RANDOM:
        trace = requests_of(load)
        assert abs(int(trace.prompt_tokens.sum()) - load.total_input_tokens) < load.num_prompts, "a template adds as much to each"
        if why_not_compared(load) == "":
            assert int(trace.output_tokens.sum()) == load.total_output_tokens, "to the token"


@pytest.mark.parametrize("load", [load for load in LOADS if load.input_len is None], ids=lambda load: load.source)
def test_share_gpt_has_the_totals(load: ServedLoad) -> None:
    trace = requests_of(load)
    assert trace.prompt_tokens.min() >= 1 <= trace.output_tokens.min()
    assert int(trace.prompt_tokens.sum()) == pytest.approx(load.total_input_tokens, abs=load.num_prompts)
    assert int(trace.output_tokens.sum()) == pytest.approx(load.total_output_tokens, abs=load.num_prompts)


@pytest.mark.parametrize("load", LOADS[:10], ids=lambda load: load.source)
def test_arrivals_have_the_rate_and_the_burstiness(load: ServedLoad) -> None:
    many = requests_of(replace(load, num_prompts=20_000)).arrival_s
    gaps = np.diff(many, prepend=0.0)
    assert gaps.min() >= 0
    assert many[-1] == pytest.approx(20_000 / load.request_rate_per_s)
    assert gaps.var() * load.request_rate_per_s**2 == pytest.approx(1 / load.burstiness, rel=0.1)


@pytest.mark.parametrize(
    "source",
    [
        "qwen-3.6/qwen-3.6-27b/fp8/10-monday-peak",
        "qwen-3.5/qwen-3.5-9b/bf16/07-office-baseline",
        "qwen-3.5/qwen-3.5-9b/bf16/08-sharegpt",
    ],
)
def test_what_comes_out_is_near_and_within_its_interval(source: str) -> None:
    compared = simulated(BY_NAME[source], load_hardware("dgx-spark"))
    assert all(abs(compared.errors[name]) < 0.2 for name in ("tpot_s", "e2e_s", "duration_s"))
    assert compared.covered


def test_what_cannot_be_compared_is_named() -> None:
    whole = BY_NAME["qwen-3.5/qwen-3.5-9b/bf16/09-reasoning"]
    changed = {
        "a request failed": replace(whole, source="failed", num_failed=1),
        "answers ended before the length that was asked": replace(
            whole, source="ended", total_output_tokens=whole.total_output_tokens - 1
        ),
        "mean TPOT is above the P99: tokens came in bursts": replace(whole, source="bursts", p99_tpot_s=whole.tpot_s / 2),
    }
    found = section(load_hardware("dgx-spark"), [whole, *changed.values()])
    assert found.source.endswith("4 runs of vllm bench serve, 1 compared")
    assert found.details["not_compared"] == {load.source: why for why, load in changed.items()}
    assert all(any(why in note and load.source in note for note in found.notes) for why, load in changed.items())


def test_where_nothing_is_compared_nothing_holds() -> None:
    found = section(load_hardware("dgx-spark"), [replace(LOADS[0], num_failed=1)])
    assert [check.outcome for check in found.checks] == ["fails"]
