"""How busy the machine is: bytes and operations of every step, counted again from its batch, over what the datasheet allows."""

from dataclasses import replace
from typing import Any

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.hardware_spec import Figure
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.metrics import measure
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.shared_machine import SharedMachine
from pagedkv.sims.simulation import run
from pagedkv.sims.step_time import RooflineStepTime, StepCost
from pagedkv.step_batch import StepBatch, empty_batch
from pagedkv.weight_format import load_weight_format

LLAMA, SPARK = load_model("llama-3.1-8b"), load_hardware("dgx-spark")


def scenario(serving: dict[str, Any] | None = None, **load: Any) -> Scenario:
    drained = {} if load.get("num_prompts") else {"duration": "20s", "warmup": "4s"}
    return resolve(
        SimulationConfig(
            load=LoadConfig(**load),
            serving=ServingConfig(**(serving or {})),
            measurement=MeasurementConfig(allocator=("paged",), **drained),
        )
    )


class Counting:
    """Prices steps as `step_time` does, and counts the bytes and operations of Llama-3.1-8B in bf16 by hand."""

    def __init__(self, step_time: RooflineStepTime) -> None:
        self.step_time, self.num_bytes, self.operations, self.step_s = step_time, 0.0, 0.0, 0.0

    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        cost = self.step_time.cost(batch, num_entries)
        self.step_s += cost.total_s
        self.num_bytes += 2.0 * (LLAMA.params_total - LLAMA.embedding_params)
        for new, context in batch[["num_scheduled_tokens", "num_slots_needed"]][:num_entries].tolist():
            self.num_bytes += (context - new + 2 * new) * LLAMA.kv_spec("auto").bytes_per_token
            self.operations += 2 * new * (LLAMA.params_total - LLAMA.embedding_params - LLAMA.head_params) + 2 * LLAMA.head_params
            pairs = sum(range(context - new + 1, context + 1))
            self.operations += pairs * 2 * LLAMA.num_layers * LLAMA.num_attention_heads * (128 + 128)
        return cost


def test_shares_are_bytes_and_operations_over_the_datasheets_rates() -> None:
    one = scenario(request_rate=2.0, num_prompts=20, random_input_len=900, random_output_len=40)
    counting = Counting(one.deployment.step_time)
    counted = replace(one, deployment=replace(one.deployment, step_time=counting))  # type: ignore[arg-type]
    done = run(counted, "paged", seed=0)
    figures, watched_s = measure(done, ()), float(done.recorder.integrals.observed_s[0])
    assert counting.step_s < watched_s  # the machine is idle at first
    assert figures["busy_share"] == pytest.approx(counting.step_s / watched_s)
    assert figures["memory_bandwidth_share"] == pytest.approx(counting.num_bytes / (watched_s * 273e9), rel=1e-3)
    assert figures["compute_share"] == pytest.approx(counting.operations / (watched_s * 125e12), rel=1e-3)


@settings(max_examples=25)
@given(
    users=st.sampled_from([1, 8, 200]),
    serving=st.sampled_from(
        [
            {},
            {"hardware": "rtx-4090", "model": "qwen2.5-7b"},
            {"quantization": "nvfp4", "kv_cache_dtype": "fp8"},
            {"hardware": "h100", "model": "gpt-oss-20b"},
            {"clock_derate": 0.3},
            {"speculative_model": "llama-3.2-1b", "num_speculative_tokens": 3},
        ]
    ),
)
def test_no_share_is_more_than_the_machine_reaches_while_it_is_busy(users: int, serving: dict[str, Any]) -> None:
    one = scenario(serving, users=users, think_time="3s")
    figures = measure(run(one, "paged", seed=0), ())
    reach = one.deployment.step_time.coefficients.model
    assert 0 < figures["busy_share"] <= 1 + 1e-12
    assert 0 < figures["memory_bandwidth_share"] <= figures["busy_share"] * max(reach.weights_reach, reach.kv_reach) * (1 + 1e-12)
    assert 0 < figures["compute_share"] <= figures["busy_share"] * max(reach.linear_reach, reach.attention_reach) * (1 + 1e-12)


def test_a_window_without_requests_is_idle() -> None:
    figures = measure(run(scenario(users=1, think_time="1h"), "paged", seed=0), ())
    assert figures["num_injected"] == 0
    assert figures["error_rate"] is None
    assert [figures[f"{name}_share"] for name in ("busy", "memory_bandwidth", "compute")] == [0.0, 0.0, 0.0]


def test_the_error_rate_is_of_all_that_arrive() -> None:
    one = scenario({"max_model_len": 1000}, users=40, think_time="1s")
    done = run(one, "paged", seed=0)
    figures, refused = measure(done, ()), int((done.measured.outcome == Outcome.REJECTED).sum())
    assert 0 < refused < len(done.measured)
    assert figures["error_rate"] == pytest.approx(refused / len(done.measured))


def test_peaks_are_the_datasheets_for_the_type_that_multiplies() -> None:
    assert SPARK.peak_flops(None) == SPARK.spec_flops["bf16"].value
    assert SPARK.peak_flops(load_weight_format("nvfp4")) == SPARK.spec_flops["fp4"].value
    ada = load_hardware("rtx-4090")  # has no FP4 units
    assert ada.peak_flops(load_weight_format("nvfp4")) == ada.spec_flops["fp8"].value
    slower = SPARK.derated(0.5)
    assert slower.peak_flops(None) == SPARK.peak_flops(None) > 2.5 * slower.effective_flops(None)


def test_a_type_that_the_datasheet_leaves_out_counts_as_reached() -> None:
    figure = Figure(1e14, "measured", "a test")
    odd = replace(SPARK, spec_flops={"bf16": figure}, reached_flops={"bf16": figure, "fp8": figure})
    assert odd.peak_flops(load_weight_format("fp8")) == 1e14


def test_what_is_reached_of_two_rates_adds_up() -> None:
    """Weights and KV are read at different rates: each counts with its own."""
    step_time = RooflineStepTime(LLAMA, SPARK, weight_format=LLAMA.native_format, kv_spec=LLAMA.kv_spec("auto"))
    batch = empty_batch(1)
    batch["num_scheduled_tokens"], batch["num_slots_needed"], batch["num_known_tokens"] = 1, 50_000, 50_000
    cost = step_time.cost(batch, 1)
    kv_bytes = 50_001 * LLAMA.kv_spec("auto").bytes_per_token
    assert cost.traffic_s == pytest.approx((LLAMA.dense_streamed_bytes(LLAMA.native_format) + kv_bytes) / 273e9)
    assert cost.traffic_s < cost.memory_s


@settings(max_examples=8, deadline=None)
@given(users=st.integers(2, 8), seed=st.integers(0, 3), warmup_s=st.floats(0.5, 30.0))
def test_processes_that_share_a_machine_use_no_more_than_all_of_it(users: int, seed: int, warmup_s: float) -> None:
    one = resolve(
        SimulationConfig(
            load=LoadConfig(users=users, think_time="100ms"),
            serving=ServingConfig(engine="ollama", model="llama-3.1-8b,qwen3-32b", quantization="q4_k_m"),
            measurement=MeasurementConfig(allocator=("ollama",), warmup=f"{warmup_s}s", duration="7s"),
        )
    )
    figures = measure(run(one, "ollama", seed=seed), ())
    assert 0 <= figures["busy_share"] <= 1 + 1e-9
    reach = max(
        max(reaches.weights_reach, reaches.kv_reach) for reaches in (each.step_time.coefficients.model for each in one.deployments)
    )
    assert figures["memory_bandwidth_share"] <= figures["busy_share"] * reach * (1 + 1e-9)


def test_a_shared_machine_counts_work_from_the_moment_that_it_is_watched() -> None:
    env = simpy.Environment()
    machine = SharedMachine(env, from_s=1.0)
    long, short = machine.work(4.0), machine.work(1.0)  # half the speed each until 2, then one has it all
    env.run(until=1.5)
    assert (machine.measured_s(long), machine.measured_s(short)) == (0.25, 0.25)
    env.run(until=3.0)
    assert (machine.measured_s(long), machine.measured_s(short)) == (1.5, 0.5)
    env.run(until=long)
    assert env.now == 5.0
    assert machine.measured_s(long) + machine.measured_s(short) == 4.0
