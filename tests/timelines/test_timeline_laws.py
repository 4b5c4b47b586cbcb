"""Laws of every timeline of a start, and of what is advised for it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from starts import phase, request

from pagedkv.budget_advice import Suggestions
from pagedkv.catalogue import hardware_names, model_names
from pagedkv.errors import ConfigError
from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import TIMELINE_PARTS, VERDICTS, MemoryTimeline
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy, memory_request
from pagedkv.sims.run_texts import kv_equation
from pagedkv.start_timeline import memory_timeline
from pagedkv.start_up import Guest, StartOptions
from pagedkv.timeline_advice import advise_start
from pagedkv.units import GIB

ENGINES = ("vllm", "vllm@0.19", "sglang", "tensorrt-llm", "llama-cpp", "ollama", "naive", "orca", "vattention")
SERVING = st.fixed_dictionaries(
    {
        "engine": st.sampled_from(ENGINES),
        "model": st.sampled_from(model_names()),
        "hardware": st.one_of(st.just("dgx-spark"), st.sampled_from(hardware_names())),
    },
    optional={"quantization": st.sampled_from(["fp8", "nvfp4", "q4_k_m"]), "other_programs": st.sampled_from(["8GiB", "30GiB"])},
)
SIZES = st.integers(0, 20).map(lambda n: n * GIB)
GUESTS = st.builds(Guest, name=st.just("x"), num_bytes=SIZES, during=st.sampled_from(["loading", "serving"]))
OPTIONS = st.builds(
    StartOptions,
    drops_caches=st.booleans(),
    warm_compile_caches=st.booleans(),
    compile_jobs=st.none() | st.integers(1, 40),
    host_tier_bytes=SIZES,
    guests=st.lists(GUESTS, max_size=2).map(tuple),
)


@pytest.fixture(scope="module", autouse=True)
def refusals_without_proposals() -> Iterator[None]:
    """What does not fit is passed over here: looking for what would takes longer than all else, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagedkv.memory_plan.settings_that_fit", lambda request: Suggestions(fit=(), dangerous=None))
        yield


def told_or_none(asked: MemoryRequest, options: StartOptions) -> MemoryTimeline | None:
    try:
        return memory_timeline(asked, options)
    except ConfigError:
        return None


def asked_or_none(chosen: dict[str, Any]) -> MemoryRequest | None:
    try:
        return request(**chosen, max_model_len=2048)
    except ConfigError:
        return None


def asked_and_told(chosen: dict[str, Any], options: StartOptions) -> tuple[MemoryRequest, MemoryTimeline]:
    """What can be asked and has an answer; other examples are passed over."""
    asked = asked_or_none(chosen)
    told = None if asked is None else told_or_none(asked, options)
    assume(told is not None)
    assert asked is not None
    assert told is not None
    return asked, told


@given(chosen=SERVING, options=OPTIONS)
@settings(max_examples=250)
def test_every_moment_adds_up_and_serving_is_the_ledger_s(chosen: dict[str, Any], options: StartOptions) -> None:
    asked, told = asked_and_told(chosen, options)
    visible = asked.hardware.visible_bytes
    for each in told.phases:
        for moment in (each.worst, each.end):
            assert tuple(moment.parts) == TIMELINE_PARTS
            assert sum(moment.parts.values()) == visible
            assert all(size >= 0 for part, size in moment.parts.items() if part != "unassigned")
            assert moment.mem_free <= moment.mem_available
            if not asked.hardware.unified:
                assert moment.parts["page_cache"] == moment.parts["compilers"] == moment.parts["host_tier"] == 0
        assert each.worst.mem_available <= each.end.mem_available
        assert each.verdict.kind in VERDICTS
        assert bool(each.verdict.text) is (each.verdict.kind != "ok")
    if told.budget is None:
        assert told.phases[-1].verdict.kind == "refused"
        return
    serving = phase(told, "serving").end
    ledger = told.budget.parts
    tier = options.host_tier_bytes if asked.hardware.unified else 0
    assert {part: serving.parts[part] for part in ledger if part != "unassigned"} == {
        part: size for part, size in ledger.items() if part != "unassigned"
    }
    assert serving.mem_available + tier == ledger["unassigned"]
    assert told.least_blocks is not None
    assert 0 <= told.least_blocks <= told.budget.num_blocks


@given(chosen=SERVING, options=OPTIONS, free=st.tuples(st.integers(0, 122), st.integers(0, 122)).map(sorted))
@settings(max_examples=150)
def test_more_free_memory_gives_no_fewer_blocks_and_no_worse_verdict(
    chosen: dict[str, Any], options: StartOptions, free: list[int]
) -> None:
    chosen.pop("other_programs", None)
    asked = asked_or_none(chosen)
    assume(asked is not None)
    assert asked is not None
    visible = asked.hardware.visible_bytes
    less, more = (told_or_none(replace(asked, free_memory_bytes=min(n * GIB, visible)), options) for n in free)
    if less is None or less.budget is None:
        return
    assert more is not None
    assert more.budget is not None, "what starts with less free memory starts with more"
    assert less.least_blocks is not None
    assert more.least_blocks is not None
    assert more.budget.num_blocks >= less.budget.num_blocks
    assert more.least_blocks >= less.least_blocks


@pytest.mark.parametrize("engine", ENGINES)
@given(chosen=SERVING, lost=SIZES)
@settings(max_examples=25)
def test_blocks_are_counted_alike_by_budget_timeline_and_allocator(engine: str, chosen: dict[str, Any], lost: int) -> None:
    serving = ServingConfig(**(chosen | {"engine": engine}), max_model_len=2048)
    try:
        deployment = deploy(serving)
    except ConfigError:
        assume(False)
    budget, asked = deployment.budget, memory_request(serving)
    assert deployment.pool_of(deployment.own_allocator).num_blocks == budget.num_blocks
    assert budget.block_bytes == asked.block_bytes
    assert asked.ledger.starved_blocks(asked, budget, 0) == budget.num_blocks
    fewer = (budget.num_blocks - asked.ledger.starved_blocks(asked, budget, lost)) * budget.block_bytes
    assert fewer == 0 or 0 < fewer <= lost + budget.block_bytes


@pytest.mark.parametrize(("model", "apart"), [("gpt-oss-20b", True), ("gemma-3-27b", True), ("llama-3.1-8b", False)])
def test_a_starved_cache_is_told_in_the_blocks_of_the_waterfall(model: str, apart: bool) -> None:
    serving = ServingConfig(model=model)
    told, (_, blocks) = memory_timeline(memory_request(serving)), kv_equation(deploy(serving))
    assert told.budget is not None
    assert told.request.layers_apart == apart
    assert f"of {told.budget.num_blocks:,} blocks" in phase(told, "kv_cache").verdict.text
    assert blocks.startswith(f"{told.budget.num_blocks:,} blocks")


@given(chosen=SERVING, options=OPTIONS)
@settings(max_examples=60)
def test_advice_that_says_it_avoids_everything_does(chosen: dict[str, Any], options: StartOptions) -> None:
    asked, told = asked_and_told(chosen, options)
    advice = advise_start(told)
    if told.worst.verdict.kind == "ok":
        assert advice is None
    if advice is None:
        return
    assert advice.settings
    again = memory_timeline(advice.timeline.request, advice.timeline.options)
    assert again == advice.timeline
    assert again.worst.verdict.severity <= told.worst.verdict.severity
    assert again.budget is not None
    if advice.solved:
        floor = asked.hardware.memory_floor.value
        assert all(each.worst.mem_available >= floor for each in again.phases)
        assert again.budget is not None
        assert again.least_blocks == again.budget.num_blocks
