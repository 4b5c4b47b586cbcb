"""Law 14: the compiled loop and the step-by-step engine leave the same tables, records and figures, bit for bit."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.metrics import measure
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run

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


def agree(compiled: Run, slow: Run) -> None:
    assert isinstance(compiled.allocator, PagedStepAllocator)
    assert isinstance(slow.allocator, PagedStepAllocator)
    compiled.allocator.check_integrity()
    for mine, other in zip(compiled.allocator.arrays, slow.allocator.arrays, strict=True):
        np.testing.assert_array_equal(mine, other)
    for name in ("sums", "itl_bins", "counters"):
        np.testing.assert_array_equal(getattr(compiled.recorder.arrays, name), getattr(slow.recorder.arrays, name), err_msg=name)
    for mine, other in zip(compiled.recorder.timeline, slow.recorder.timeline, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert compiled.end_s == slow.end_s
    for name in ("arrival_s", "scheduled_s", "first_token_s", "last_token_s", "num_output_tokens", "num_preemptions", "outcome"):
        np.testing.assert_array_equal(getattr(compiled.log, name), getattr(slow.log, name), err_msg=name)
    assert measure(compiled, ()) == measure(slow, ()) or compiled.log.arrival_s.size == 0


@given(
    load=CLOSED | OPEN,
    mean=st.sampled_from([40, 300, 600]),
    output=st.sampled_from([1, 30, 200]),
    num_blocks=st.integers(101, 260),
    max_num_seqs=st.sampled_from([1, 4, 64]),
    max_num_batched_tokens=st.sampled_from([64, 512]),
    watermark=st.sampled_from([0.0, 0.1]),
    reserve_full_isl=st.booleans(),
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
    watermark: float,
    reserve_full_isl: bool,
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
            "watermark": watermark,
            "scheduler_reserve_full_isl": reserve_full_isl,
        },
    )
    agree(run(case, "paged", seed=seed), run(case, "paged", seed=seed, step_by_step=True))


def test_the_compiled_loop_is_what_a_simulation_runs(monkeypatch: Any) -> None:
    made = []
    original = CompiledEngine.__init__
    monkeypatch.setattr(CompiledEngine, "__init__", lambda self, *given: (made.append(self), original(self, *given))[1])
    simulate(scenario({"users": 3, "think_time": "1s"}, {}, {}))
    assert len(made) == 1
