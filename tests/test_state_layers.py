"""Models with linear-attention or Mamba layers: every running request holds state of fixed size, whoever hands out the memory."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.heaps import HEAPS
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Step
from pagedkv.sims import simulation
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.engine import Engine
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import KV_KINDS, RUNNING, STATE
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.step_time import StepCost
from pagedkv.step_allocation import StepAllocator, step_allocator
from pagedkv.step_batch import empty_batch

CONTIGUOUS = ("contiguous-max", "contiguous-oracle", "contiguous-pow2")
PLACEMENTS = [("paged", "buddy"), *product(CONTIGUOUS, HEAPS.names())]
MODELS = [name for name in model_names() if load_model(name).kv_spec("auto").state_bytes_per_sequence]


def held_for_state(allocator: StepAllocator) -> int:
    """Return the slots that are neither free nor held for tokens nor lost to rounding, as the pool or the heap counts them."""
    tokens = int(allocator.units_held.sum()) * allocator.unit_slots
    return allocator.usable_slots - allocator.free_slots - tokens - allocator.rounding_slots


# --- a whole simulation ---------------------------------------------------------------------------------------------


def scenario(name: str, heap: str) -> Scenario:
    load = LoadConfig(request_rate=2.0, num_prompts=25, random_input_len=600, random_output_len=150, random_range_ratio=0.9)
    serving = ServingConfig(
        model="qwen3.5-27b",
        num_gpu_blocks_override=700,
        max_model_len=1500,
        disable_hybrid_kv_cache_manager=True,
        contiguous_heap=heap,
    )
    return resolve(SimulationConfig(load=load, serving=serving, measurement=MeasurementConfig(allocator=(name,))))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Check the books after every decision; how many requests ran then."""
    running: list[int] = []
    step = Recorder.step

    def checked(self: Recorder, decided: Step, start_s: float, cost: StepCost) -> None:
        step(self, decided, start_s, cost)
        allocator, scheduler, gauges = self._scheduler.allocator, self._scheduler, self.arrays.gauges
        assert gauges[: len(KV_KINDS)].sum() == allocator.usable_slots
        assert (gauges >= 0).all()
        assert gauges[STATE] == held_for_state(allocator) == scheduler.num_running * allocator.state_units * allocator.unit_slots
        if len(running) % 16 == 0:
            scheduler.check_integrity()
        running.append(scheduler.num_running)

    monkeypatch.setattr(Recorder, "step", checked)
    for name in ("Engine", "CompiledEngine"):
        monkeypatch.setattr(simulation, name, Engine)
    yield running
    assert max(running) > 1


@pytest.mark.parametrize(("name", "heap"), PLACEMENTS)
def test_every_slot_is_accounted_for_at_every_step(name: str, heap: str, steps: list[int]) -> None:
    one = scenario(name, heap)
    result = simulate(one).by_allocator[name]
    (run,) = result.runs
    allocator, kv = run.allocator, result.figures["kv"]
    assert result.figures["num_finished"] == 25
    assert (result.figures["num_preemptions"] > 0) == (name == "paged")
    each = allocator.state_units * allocator.unit_slots
    spec = one.deployment.model.kv_spec("auto")
    assert 0 <= each * spec.bytes_per_token - spec.state_bytes_per_sequence < spec.bytes_per_token * allocator.unit_slots
    assert kv["state"] == pytest.approx(result.figures["running_mean"] * each / allocator.usable_slots)
    assert kv["state"] > 0.2
    assert run.recorder.integrals.gauges[STATE] == pytest.approx(each * run.recorder.integrals.gauges[RUNNING])
    assert allocator.free_slots == allocator.usable_slots
    assert held_for_state(allocator) == 0
    assert len(steps) == result.figures["iterations"]


@pytest.mark.parametrize(("name", "heap"), [("paged", "buddy"), ("contiguous-oracle", "first-fit")])
def test_a_pool_too_small_for_the_state_rejects_everybody(name: str, heap: str) -> None:
    # A budget would refuse it: 130 blocks hold 2,064 tokens; the state alone takes as much as 2,340.
    enough = scenario(name, heap)
    few = replace(enough.deployment, pool=replace(enough.deployment.pool, num_blocks=130))
    result = simulate(replace(enough, deployment=few)).by_allocator[name]
    assert result.figures["num_rejected"] == len(result.runs[0].log.of(Outcome.REJECTED)) == 25
    assert result.verdict.status == "rejecting"
    assert result.verdict.binding == "kv_memory"


# --- one decision ---------------------------------------------------------------------------------------------------


SMALL = KVPoolSettings(num_blocks=11, block_size=4, max_num_seqs=4, max_model_len=16, state_slots=12)


def pool(heap: str = "buddy", **changes: Any) -> KVPoolSettings:
    return replace(SMALL, contiguous_heap=heap, **changes)


def admit(allocator: StepAllocator, number: int, *, tokens: int) -> int:
    batch = empty_batch(4)
    batch["row"][:] = range(4)
    batch["num_slots_needed"][:] = batch["num_known_tokens"][:] = batch["num_scheduled_tokens"][:] = tokens
    slots = allocator.admission_slots(tokens - 1, 1)
    assert slots is not None
    batch["admission_slots"][:] = slots
    return allocator.allocate_slots(batch, 0, number, 0)


@pytest.mark.parametrize(("name", "heap"), [("paged", "buddy"), ("contiguous-oracle", "buddy"), ("contiguous-oracle", "first-fit")])
@pytest.mark.parametrize("reserve_full_isl", [True, False])
def test_who_fits_with_tokens_but_not_with_state_is_not_admitted(name: str, heap: str, reserve_full_isl: bool) -> None:
    allocator = step_allocator(name, pool(heap, reserve_full_isl=reserve_full_isl))
    assert admit(allocator, 4, tokens=4) == 2  # 16 slots each of 40 or 44
    assert allocator.free_slots >= 4
    assert held_for_state(allocator) == 24
    allocator.check_integrity()
    without_state = step_allocator(name, pool(heap, state_slots=0))
    assert admit(without_state, 4, tokens=4) == 4


@pytest.mark.parametrize(("name", "heap"), PLACEMENTS)
def test_who_could_only_run_without_state_is_refused_at_arrival(name: str, heap: str) -> None:
    tight = {"num_blocks": 5, "max_model_len": 8}  # 16 usable slots, 20 with the null block
    assert step_allocator(name, pool(heap, state_slots=0, **tight)).admission_slots(7, 1) is not None
    assert step_allocator(name, pool(heap, state_slots=4, **tight)).admission_slots(7, 1) is not None
    assert step_allocator(name, pool(heap, state_slots=13, **tight)).admission_slots(7, 1) is None


def test_who_is_preempted_gives_its_state_back_and_takes_it_again() -> None:
    allocator = step_allocator("paged", pool(num_blocks=12))  # 11 blocks: two requests of 3 + 2, and one to grow into
    scheduler = Scheduler(SchedulerSettings(max_num_seqs=4, max_model_len=16), allocator)
    for _ in range(2):
        assert scheduler.add(prompt_tokens=7, output_tokens=9) is not None
    preempted, running = 0, []
    while scheduler.num_running or scheduler.num_waiting:
        step = scheduler.schedule()
        preempted += step.num_preempted
        running.append(scheduler.num_running)
        assert held_for_state(allocator) == 12 * scheduler.num_running
        scheduler.check_integrity()
        scheduler.complete()
    assert preempted > 0
    assert running[0] == 2
    assert 1 in running[1:-1]
    assert allocator.free_slots == allocator.usable_slots


@given(
    state_slots=st.integers(0, 40),
    num_blocks=st.integers(2, 30),
    block_size=st.sampled_from([1, 4, 16]),
    heap=st.sampled_from(HEAPS.names()),
)
@settings(max_examples=60)
def test_more_state_never_admits_more(state_slots: int, num_blocks: int, block_size: int, heap: str) -> None:
    for name in ("paged", *CONTIGUOUS):
        admitted = []
        for slots in (state_slots, state_slots + 1):
            small = pool(heap, state_slots=slots, num_blocks=num_blocks, block_size=block_size)
            allocator = step_allocator(name, small)
            admitted.append(admit(allocator, 4, tokens=5) if allocator.admission_slots(4, 1) is not None else 0)
            assert held_for_state(allocator) == admitted[-1] * -(-slots // allocator.unit_slots) * allocator.unit_slots
        assert admitted[0] >= admitted[1]


# --- budgets --------------------------------------------------------------------------------------------------------


def test_there_are_models_with_state() -> None:
    assert {"qwen3.5-27b", "nemotron-3-nano-30b-a3b", "qwen3-next-80b-a3b"} <= set(MODELS)


@pytest.mark.parametrize(
    "name", [*(name for name in MODELS if load_model(name).params_total < 300e9), "llama-3.1-8b", "gpt-oss-20b"]
)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_the_pool_sets_slots_for_the_bytes_of_the_state_aside(name: str, kv_cache_dtype: str) -> None:
    serving = ServingConfig(model=name, kv_cache_dtype=kv_cache_dtype, quantization="nvfp4", hardware="gb200", max_model_len=1024)
    spec = load_model(name).kv_spec(kv_cache_dtype)
    slots = deploy(serving).pool.state_slots
    assert slots == int(np.ceil(spec.state_bytes_per_sequence / spec.bytes_per_token))
    assert (slots > 0) == (name in MODELS)


def test_narrower_keys_and_values_do_not_make_the_state_smaller() -> None:
    wide, narrow = (deploy(ServingConfig(model="qwen3.5-27b", kv_cache_dtype=dtype)).pool.state_slots for dtype in ("auto", "fp8"))
    assert narrow == pytest.approx(2 * wide, abs=1)


def test_an_engine_that_starts_can_serve_the_longest_request() -> None:
    # 128 blocks for 2,048 tokens, 147 for the state, and the null block.
    serving = ServingConfig(
        model="qwen3.5-27b", max_model_len=2048, num_gpu_blocks_override=276, disable_hybrid_kv_cache_manager=True
    )
    with pytest.raises(ConfigError, match="--max-model-len 2048"):
        deploy(replace(serving, num_gpu_blocks_override=275))
    deployment = deploy(serving)
    assert step_allocator("paged", deployment.pool).admission_slots(2047, 1) is not None
    # Three blocks of 784 tokens in the layers of attention, three with a state, and the null block.
    apart = replace(serving, disable_hybrid_kv_cache_manager=False, num_gpu_blocks_override=7)
    with pytest.raises(ConfigError, match="--max-model-len 2048"):
        deploy(replace(apart, num_gpu_blocks_override=6))
    deployment = deploy(apart)
    assert step_allocator("hybrid", deployment.pool_of("hybrid")).admission_slots(2047, 1) is not None
