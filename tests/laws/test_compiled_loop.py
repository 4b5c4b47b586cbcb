"""Law 14 on paged memory: the compiled loop and the step-by-step engine leave the same tables, records and figures, bit for bit."""

from typing import Any

import numpy as np
import pytest
from cases import Case, cases, served
from chats import records_agree
from compiled_cases import STEPS_AT_ONCE, agree
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.offload_steps import OffloadStepAllocator
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import run

CLOSED = st.builds(
    lambda users, think: {"users": users, "think_time": f"{think}s"}, st.integers(1, 40), st.sampled_from([0.1, 1.0, 20.0])
)

OPEN = st.builds(
    lambda rate, burst, number: {"request_rate": rate, "burstiness": burst, "num_prompts": number},
    st.sampled_from([0.2, 3.0, 50.0]),
    st.sampled_from([0.3, 1.0]),
    st.none() | st.integers(1, 60),
)


def scenario(load: dict[str, Any], lengths: dict[str, Any], serving: dict[str, Any]) -> Scenario:
    timed = {} if load.get("num_prompts") else {"duration": "25s", "warmup": "5s"}
    return resolve(
        SimulationConfig(
            load=LoadConfig(**load, **lengths),
            serving=ServingConfig(**serving),
            measurement=MeasurementConfig(allocator=("paged",), **timed),
        )
    )


@given(cases("vllm", "paged-offload"))
@settings(max_examples=40)
def test_law_14_with_a_second_tier(case: Case) -> None:
    compiled, slow = served(case, step_by_step=False), served(case, step_by_step=True)
    records_agree(compiled, slow)
    for run_ in (compiled, slow):
        assert isinstance(run_.allocator, OffloadStepAllocator)
    for name in ("pool", "tier"):
        for mine, other in zip(getattr(compiled.allocator.arrays, name), getattr(slow.allocator.arrays, name), strict=True):
            np.testing.assert_array_equal(mine, other)
    event(f"loads: {compiled.allocator.num_loaded > 0}")


@given(cases("vllm", "hybrid"))
@settings(max_examples=60)
def test_law_14_with_blocks_per_layer_group(case: Case) -> None:
    compiled, slow = served(case, step_by_step=False), served(case, step_by_step=True)
    records_agree(compiled, slow)
    for run_ in (compiled, slow):
        assert isinstance(run_.allocator, HybridStepAllocator)
    for mine, other in zip(compiled.allocator.arrays, slow.allocator.arrays, strict=True):
        np.testing.assert_array_equal(mine, other)
    event(f"hits: {compiled.log.num_cached_tokens.sum() > 0}, preempted: {compiled.log.num_preemptions.sum() > 0}")


@given(
    load=CLOSED | OPEN,
    mean=st.sampled_from([40, 300, 600]),
    output=st.sampled_from([1, 30, 200]),
    num_blocks=st.integers(101, 260),
    max_num_seqs=st.sampled_from([1, 4, 64]),
    max_num_batched_tokens=st.sampled_from([64, 512]),
    engine=st.sampled_from(["vllm", "vllm@0.19"]),
    watermark=st.sampled_from([0.0, 0.1]),
    reserve_full_isl=st.none() | st.booleans(),
    steps_at_once=STEPS_AT_ONCE,
    seed=st.integers(0, 3),
)
@settings(max_examples=40)
def test_law_14_compiled_or_step_by_step_it_is_the_same(
    load: dict[str, Any],
    mean: int,
    output: int,
    num_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    engine: str,
    watermark: float,
    reserve_full_isl: bool | None,
    steps_at_once: int,
    seed: int,
) -> None:
    case = scenario(
        load,
        {"random_input_len": mean, "random_output_len": output, "random_range_ratio": 0.9},
        {
            "num_gpu_blocks_override": num_blocks,
            "max_model_len": 1600,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "engine": engine,
            "watermark": watermark if engine == "vllm" else 0.0,  # 0.19 has none
            "scheduler_reserve_full_isl": reserve_full_isl,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledEngine, "steps_at_once", steps_at_once)
        compiled = run(case, "paged", seed=seed)
    agree(compiled, run(case, "paged", seed=seed, step_by_step=True))


def test_the_compiled_loop_is_what_a_simulation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = CompiledEngine.__init__
    monkeypatch.setattr(CompiledEngine, "__init__", lambda self, *given: (made.append(self), original(self, *given))[1])
    simulate(scenario({"users": 3, "think_time": "1s"}, {}, {}))
    assert len(made) == 1
