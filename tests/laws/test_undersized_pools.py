"""Law 11: an undersized pool ends with a verdict, and nobody waits for ever."""

from dataclasses import replace
from typing import Any

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tight_scenarios import LENGTHS, scenario

from pagedkv.allocators import ALLOCATORS
from pagedkv.heaps import HEAPS
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.sims.config import LoadConfig
from pagedkv.sims.engine import Engine
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario


@pytest.fixture(scope="module")
def small() -> Scenario:
    """The fewest blocks with which the engine starts."""
    return scenario(LoadConfig(request_rate=1.0, num_prompts=12, **LENGTHS), num_blocks=58)


@pytest.mark.parametrize("name", ALLOCATORS.names())
@given(
    num_blocks=st.integers(2, 57),
    rate_per_s=st.sampled_from([0.1, 5.0, 100.0]),
    watermark=st.sampled_from([0.0, 0.5]),
    reserve_full_isl=st.booleans(),
    heap=st.sampled_from(HEAPS.names()),
    max_num_seqs=st.sampled_from([2, 256]),
)
@settings(max_examples=20)
def test_law_11_an_undersized_pool_ends_with_a_verdict(
    name: str,
    small: Scenario,
    num_blocks: int,
    rate_per_s: float,
    watermark: float,
    reserve_full_isl: bool,
    heap: str,
    max_num_seqs: int,
) -> None:
    pool = replace(
        small.deployment.pool,
        num_blocks=num_blocks,
        watermark=watermark,
        reserve_full_isl=reserve_full_isl,
        contiguous_heap=heap,
        max_num_seqs=max_num_seqs,
        page_tokens=16,
    )
    deployment = replace(small.deployment, pool=pool, scheduler=replace(small.deployment.scheduler, max_num_seqs=max_num_seqs))
    load: Any = replace(small.load, request_rate_per_s=rate_per_s)  # type: ignore[type-var]
    result = simulate(replace(small, deployment=deployment, load=load, allocators=(name,))).by_allocator[name]
    assert result.figures["num_finished"] + result.figures["num_rejected"] == 12
    assert (result.verdict.status == "rejecting") == (result.figures["num_rejected"] > 0)
    assert result.verdict.status != "failed"


class Overpromising(PagedStepAllocator):
    """Says of every request that it will fit."""

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        return 0


@pytest.mark.parametrize("reserve_full_isl", [True, False])
def test_law_11_who_cannot_go_on_though_alone_is_given_up(small: Scenario, reserve_full_isl: bool) -> None:
    pool = replace(small.deployment.pool, num_blocks=20, reserve_full_isl=reserve_full_isl)
    env = simpy.Environment(initial_time=0.0)
    scheduler = Scheduler(small.deployment.scheduler, Overpromising(pool))
    recorder = Recorder(scheduler, warmup_s=0.0, end_s=float("inf"))
    engine = Engine(env, scheduler, small.deployment.step_time, recorder)
    ended = [engine.submit(prompt, output) for prompt, output in ((100, 10), (400, 10), (290, 100), (100, 10))]
    env.run()
    assert all(event is not None and event.processed for event in ended)
    fates = [Outcome.FINISHED, Outcome.FAILED, Outcome.FAILED, Outcome.FINISHED]
    assert recorder.log().outcome.tolist() == fates
    assert scheduler.allocator.free_slots == scheduler.allocator.usable_slots
    scheduler.check_integrity()
