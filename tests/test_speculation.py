"""Speculative decoding in the simulator: tokens per step, what drafts hold and cost, and that all of it adds up."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.scheduling.waiting import NUM_ACCEPTED, NUM_DRAFTED
from pagedkv.sims.advise import advise
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.drafting import Acceptance, accept_drafts, drafting_of
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import run
from pagedkv.sims.speculation_gain import speculation_gain
from pagedkv.step_batch import StepBatch, empty_batch

ONE = LoadConfig(request_rate=1e-3, num_prompts=1, random_input_len=100, random_output_len=2001)
MANY = LoadConfig(
    request_rate=20.0, num_prompts=60, random_input_len=120, random_output_len=80, random_range_ratio=0.5, prefix_len=50
)


def scenario(load: LoadConfig, **serving: Any) -> Scenario:
    return resolve(
        SimulationConfig(load=load, serving=ServingConfig(**serving), measurement=MeasurementConfig(allocator=("paged",)))
    )


def drafts(rate: float, number: int, **more: Any) -> dict[str, Any]:
    return {"speculative_method": "ngram", "num_speculative_tokens": number, "acceptance_rate": rate, **more}


def decode_steps(**serving: Any) -> int:
    """Steps for 2,000 tokens behind the first one."""
    return run(scenario(ONE, **serving), "paged", seed=0).recorder.iterations - 1


@pytest.mark.parametrize("number", [1, 3, 7])
def test_all_drafts_accepted_give_one_token_more_than_there_are_drafts(number: int) -> None:
    assert decode_steps(**drafts(1.0, number)) == -(-2000 // (number + 1))


def test_no_draft_accepted_gives_one_token() -> None:
    assert decode_steps(**drafts(0.0, 4)) == decode_steps() == 2000


@pytest.mark.parametrize(("rate", "number"), [(0.3, 4), (0.7, 3), (0.9, 8)])
def test_tokens_per_step_are_as_leviathan_says(rate: float, number: int) -> None:
    expected = (1 - rate ** (number + 1)) / (1 - rate)
    assert 2000 / decode_steps(**drafts(rate, number)) == pytest.approx(expected, rel=0.08)
    serving = ServingConfig(**drafts(rate, number))
    model = load_model(serving.model)
    drafting = drafting_of(serving, model, model.native_format)
    assert drafting is not None
    assert drafting.expected_tokens() == pytest.approx(expected)


def test_the_gain_of_a_draft_model_is_as_leviathan_says() -> None:
    """Speed-up (1 - a^(k+1)) / ((1 - a) (k c + 1)), c = a step of the draft model / a step of the target, both reading weights."""
    rate, number = 0.8, 3
    by_model = {"speculative_model": "llama-3.2-1b", "num_speculative_tokens": number, "acceptance_rate": rate}
    e2e = [simulate(scenario(ONE, **serving)).document()["results"][0]["e2e_s"]["mean"] for serving in ({}, by_model)]
    target, draft = load_model("llama-3.1-8b"), load_model("llama-3.2-1b")
    c = draft.dense_streamed_bytes(draft.native_format) / target.dense_streamed_bytes(target.native_format)
    gain = (1 - rate ** (number + 1)) / ((1 - rate) * (number * c + 1))
    assert e2e[0] / e2e[1] == pytest.approx(gain, rel=0.06)


def test_a_draft_is_accepted_by_its_place_in_the_text_not_by_the_step_that_verifies_it() -> None:
    acceptance = Acceptance(np.array([0.6]), 3)

    def accepted(known: int, number: int) -> int:
        batch: StepBatch = empty_batch(1)
        batch["request"][0], batch["num_known_tokens"][0], batch["num_slots_needed"][0] = 5, known, known + number
        accept_drafts(acceptance, batch, 1)
        return int(batch["num_accepted_tokens"][0])

    good = [accepted(known, 1) for known in range(200)]
    assert 90 < sum(good) < 150
    for known in range(150):
        run_of_good = next(k for k in range(50) if not good[known + k])
        assert accepted(known, 6) == min(run_of_good, 6)


@given(
    rate=st.floats(0, 1),
    number=st.integers(1, 6),
    blocks=st.integers(30, 200),
    caching=st.booleans(),
    chunk=st.sampled_from([16, 64, 2048]),
)
@settings(max_examples=25)
def test_compiled_or_step_by_step_is_the_same_and_everybody_is_served(
    rate: float,
    number: int,
    blocks: int,
    caching: bool,
    chunk: int,
) -> None:
    serving = drafts(rate, number, num_gpu_blocks_override=blocks, enable_prefix_caching=caching, max_model_len=400)
    setup = scenario(MANY, max_num_batched_tokens=chunk, **serving)
    one, other = (run(setup, "paged", seed=1, step_by_step=slow) for slow in (False, True))
    for name in ("arrival_s", "scheduled_s", "first_token_s", "last_token_s", "num_output_tokens", "num_preemptions", "outcome"):
        assert np.array_equal(getattr(one.log, name), getattr(other.log, name), equal_nan=True), name
    assert np.array_equal(one.recorder.integrals.gauges, other.recorder.integrals.gauges)
    assert (one.log.num_output_tokens == one.log.output_tokens).all()
    one.allocator.check_integrity()
    assert one.allocator.free_slots == one.allocator.usable_slots


@given(rate=st.floats(0, 1), number=st.integers(1, 6), page=st.sampled_from([1, 4, 16]), slots=st.integers(500, 3000))
@settings(max_examples=25)
def test_sglang_gives_the_slots_of_refused_drafts_back(rate: float, number: int, page: int, slots: int) -> None:
    deployment = deploy(ServingConfig(engine="sglang", page_size=page, max_model_len=400, **drafts(rate, number)))
    pool = replace(deployment.pool, num_blocks=slots // page)
    one = deployment.engine.scheduler(deployment.config, deployment.scheduler, pool, "radix")
    acceptance, chance = Acceptance(np.array([rate]), 1), Random(number)
    asked = {}
    for _ in range(12):
        prompt, output = chance.randint(1, 150), chance.randint(1, 80)
        if (request := one.add(prompt_tokens=prompt, output_tokens=output)) is not None:
            asked[request] = prompt, output
    got: dict[int, int] = {}
    for _ in range(3000):
        if not one.num_running + one.num_waiting:
            break
        step = one.schedule()
        assert step.num_entries > 0
        accept_drafts(acceptance, step.batch, step.num_entries)
        before = one.requests.arrays["num_known_tokens"].copy()
        one.complete()
        one.check_integrity()
        made = one.requests.arrays["num_known_tokens"][: before.size] - before
        assert made.sum() == one.num_output_tokens
        for request in one.sampled.tolist():
            got[request] = got.get(request, 0) + int(made[request])
        requests = one.requests.arrays[one.arrays.running[: one.num_running]]
        held = one.allocator.units_held[requests["row"]]
        assert (held <= -(-requests["num_known_tokens"] // page)).all()  # nothing is kept for drafts
    assert got == {request: output for request, (_, output) in asked.items()}
    assert one.allocator.free_slots == one.allocator.usable_slots


def test_drafts_make_sglang_as_much_faster_as_vllm() -> None:
    gains = []
    for engine in ("vllm", "sglang"):
        setups = [{"engine": engine}, {"engine": engine, **drafts(0.8, 3)}]
        columns = [
            simulate(resolve(SimulationConfig(load=ONE, serving=ServingConfig(**each)))).document()["results"][0]
            for each in setups  # type: ignore[arg-type]
        ]
        gains.append(columns[0]["e2e_s"]["mean"] / columns[1]["e2e_s"]["mean"])
    assert gains[0] == pytest.approx(gains[1], rel=0.02)


def test_drafts_are_counted() -> None:
    setup = scenario(MANY, **drafts(0.5, 3))
    scheduler = setup.deployment.scheduler_over("paged")
    assert scheduler.arrays.counts[[NUM_DRAFTED, NUM_ACCEPTED]].tolist() == [0, 0]
    column = simulate(setup).document()["results"][0]
    assert 0 < column["num_accepted_tokens"] < column["num_draft_tokens"]
    share = column["num_accepted_tokens"] / column["num_draft_tokens"]
    assert share == pytest.approx((0.5 + 0.25 + 0.125) / 3, rel=0.1)
    assert simulate(scenario(MANY)).document()["results"][0]["num_draft_tokens"] is None


def test_requests_of_different_rates_have_the_mean_rate_together() -> None:
    setup = ServingConfig(**drafts(0.6, 2, acceptance_spread=0.2))
    model = load_model(setup.model)
    drafting = drafting_of(setup, model, model.native_format)
    assert drafting is not None
    rates = Acceptance.of(drafting, 0).rates
    assert rates.mean() == pytest.approx(0.6, abs=0.02)
    assert rates.std() == pytest.approx(0.2, abs=0.01)
    assert np.array_equal(rates, Acceptance.of(drafting, 0).rates)
    assert not np.array_equal(rates, Acceptance.of(drafting, 1).rates)


def test_what_drafts_lives_in_the_same_memory() -> None:
    target, draft = load_model("llama-3.1-8b"), load_model("llama-3.2-1b")
    alone = deploy(ServingConfig()).budget
    budget = deploy(ServingConfig(speculative_model="llama-3.2-1b", num_speculative_tokens=3)).budget
    assert budget.weights - alone.weights == draft.weight_bytes(draft.native_format)
    assert budget.kv_bytes_per_token == sum(m.kv_spec("auto").bytes_per_token for m in (target, draft))
    assert budget.num_blocks < alone.num_blocks
    layer = deploy(ServingConfig(speculative_method="eagle", num_speculative_tokens=1)).budget
    assert layer.kv_bytes_per_token * 32 == alone.kv_bytes_per_token * 33
    grown = layer.weights - alone.weights
    assert grown == pytest.approx((target.linear_params / 32 + 2 * 4096**2) * 2, rel=0.01)
    heads = deploy(ServingConfig(speculative_method="medusa", num_speculative_tokens=4)).budget
    assert heads.weights - alone.weights == 4 * (4096**2 + 4096 * target.vocab_size) * 2
    assert heads.kv_bytes_per_token == alone.kv_bytes_per_token
    assert deploy(ServingConfig(**drafts(0.5, 4))).budget == alone


def test_a_draft_model_that_does_not_fit_beside_its_target_is_left_out() -> None:
    """Both take 60 GiB of a card of 47; the target alone fits."""
    serving = ServingConfig(
        model="qwen2.5-14b", hardware="l40s", max_model_len=4096, speculative_model="qwen2.5-7b", num_speculative_tokens=3
    )
    with pytest.raises(ConfigError, match=r"What fits: no speculative decoding; or "):
        deploy(serving)
    assert deploy(replace(serving, speculative_model=None, num_speculative_tokens=None))


def test_speculation_stops_paying_when_the_batch_is_large() -> None:
    """Verifying drafts of many requests is arithmetic that a small batch has for nothing; the draft model reads keys, too."""
    drafting: dict[str, Any] = {"speculative_model": "llama-3.2-1b", "num_speculative_tokens": 5, "acceptance_rate": 0.6}
    found = speculation_gain(ServingConfig(hardware="h100", **drafting), 1000)
    assert found is not None
    gains = [gain for _, gain in found.by_batch]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1.2 > 1 > gains[-1]
    assert found.stops_at is not None
    before = max(batch for batch, gain in found.by_batch if gain > 1)
    assert before < found.stops_at <= 2 * before
    assert speculation_gain(ServingConfig(), 1000) is None


def test_advice_says_where_speculation_stops_paying() -> None:
    serving = ServingConfig(speculative_model="llama-3.2-1b", num_speculative_tokens=3, acceptance_rate=0.2)
    brief = MeasurementConfig(duration="20s", warmup="10s")
    advice = advise(SimulationConfig(load=LoadConfig(users=4, think_time="2s"), serving=serving, measurement=brief), attain=0.99)
    assert advice.speculation is not None
    assert "3 drafts a step by Llama 3.2 1B" in advice.speculation
    assert "does not pay" in advice.speculation or "stops paying" in advice.speculation
    config = advice.serve.split("--speculative-config ")[1]
    assert json.loads(shlex.split(config)[0]) == {
        "method": "draft_model",
        "model": "meta-llama/Llama-3.2-1B",
        "num_speculative_tokens": 3,
    }


@pytest.mark.parametrize(
    ("serving", "says"),
    [
        ({"num_speculative_tokens": 3}, "nothing drafts; add --speculative-model"),
        ({"acceptance_rate": 0.5}, "nothing drafts"),
        ({"speculative_method": "ngram"}, "give --num-speculative-tokens, e.g. 3"),
        ({"speculative_method": "magic", "num_speculative_tokens": 1}, "draft-model"),
        ({"speculative_method": "draft-model", "num_speculative_tokens": 1}, "needs --speculative-model MODEL"),
        (
            {"speculative_method": "mtp", "speculative_model": "llama-3.2-1b", "num_speculative_tokens": 1},
            "leave --speculative-model out",
        ),
        (
            {"speculative_method": "mtp", "num_speculative_tokens": 1},
            "Use --speculative-model llama-3.2-1b, --speculative-method ngram",
        ),
        ({"speculative_method": "mtp", "num_speculative_tokens": 1, "model": "kimi-k2", "hardware": "gb200"}, "bring no layer"),
        (drafts(0.5, 0), "needs 1 to 64"),
        (drafts(1.5, 2), "acceptance-rate is 1.5: needs 0 to 1"),
        (drafts(0.5, 2, acceptance_spread=0.5), "needs 0 to below 0.5"),
        ({"speculative_model": "qwen3-0.6b", "num_speculative_tokens": 2}, "needs the vocabulary of its target"),
        ({"speculative_model": "llama-3.1-70b", "num_speculative_tokens": 2}, "GiB of weights"),
        ({"engine": "tensorrt-llm", **drafts(0.5, 2)}, "it is for --engine vllm or sglang"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(serving: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        deploy(ServingConfig(**serving))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("model", "drafts_itself"),
    [("glm-4.7-flash", True), ("qwen3.6-35b-a3b", True), ("gpt-oss-20b", False), ("qwen3-8b", False)],
)
def test_a_model_drafts_by_its_own_layer_if_it_brings_one(model: str, *, drafts_itself: bool) -> None:
    assert bool(load_model(model).draft_layers) == drafts_itself
    serving = ServingConfig(model=model, speculative_method="mtp", num_speculative_tokens=1, max_model_len=4096)
    if drafts_itself:
        assert deploy(serving).drafting is not None
        return
    with pytest.raises(ConfigError, match="bring no layer for drafting"):
        deploy(serving)
    assert deploy(replace(serving, speculative_method="eagle")).drafting is not None


def test_a_config_says_whether_there_is_a_layer(shared_data: Path) -> None:
    """Published files name it in three ways; Kimi K2's says 0."""
    found = {}
    for path in sorted((shared_data / "hf_configs").glob("*.json")):
        found[path.name.partition("--")[2].removesuffix("_config.json")] = load_model(str(path)).draft_layers
    assert {name for name, layers in found.items() if layers} == {
        "DeepSeek-V3", "DeepSeek-V4-Flash", "GLM-5", "MiniMax-M2.7", "Qwen3.5-27B", "Qwen3.6-35B-A3B-NVFP4",
    }  # fmt: skip
