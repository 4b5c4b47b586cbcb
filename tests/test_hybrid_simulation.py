"""The hybrid allocator in the simulator: what windows leave behind is somebody else's room, and every slot is counted."""

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest

from pagedkv.allocation import NO_SLOT
from pagedkv.catalogue import load_model, model_names
from pagedkv.layer_groups import plan_layer_groups
from pagedkv.scheduling.scheduler_memory import memory_of
from pagedkv.scheduling.step import Step, StepScheduler
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.metrics import measure
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import INTERNAL, RESERVED, TOKENS
from pagedkv.sims.records import RequestLog
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.sims.step_time import StepCost

LONG = LoadConfig(request_rate=50.0, num_prompts=60, random_input_len=1500, random_output_len=500, random_range_ratio=0.9)
WINDOWED = [
    model.name
    for model in map(load_model, model_names())
    if {group.kind for group in model.layer_groups} & {"sliding_window", "chunked"} and model.params_total < 150e9
]


def scenario(model: str, num_blocks: int | None = None) -> Scenario:
    serving = ServingConfig(model=model, hardware="h200", num_gpu_blocks_override=num_blocks, max_model_len=4096)
    return resolve(SimulationConfig(load=LONG, serving=serving, measurement=MeasurementConfig(allocator=("hybrid", "paged"))))


def occupied(scheduler: StepScheduler, decided: Step, final: dict[int | str, int]) -> tuple[int, int, int]:
    """Slots with tokens, those that await some, and others, from what a memory map says of each slot; shared ones count once."""
    memory = memory_of(scheduler)
    bound = {int(entry["request"]): int(entry["num_slots_needed"]) for entry in decided.batch[: decided.num_entries]}
    tokens, reserved, held = np.zeros((3, memory.num_slots), np.bool_)
    for request in memory.live_requests():
        computed = bound.get(int(request.request_id), request.num_computed_tokens)
        for group in range(memory.num_groups):
            slots = memory.slots_held(request, group)
            end = final[request.request_id]
            for kind, some in ((held, slots), (tokens, slots[: min(computed, end)]), (reserved, slots[computed:end])):
                kind[some[some != NO_SLOT]] = True
    num_tokens, num_reserved = int(tokens.sum()), int(reserved.sum())
    return num_tokens, num_reserved, int(held.sum()) - num_tokens - num_reserved


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count slots one by one at every seventh step; how many preempted requests had been seen by then."""
    seen: list[int] = []
    step, number = Recorder.step, 0

    def checked(self: Recorder, decided: Step, start_s: float, cost: StepCost) -> None:
        nonlocal number
        step(self, decided, start_s, cost)
        number += 1
        if number % 7:
            return
        scheduler = self._scheduler
        requests = scheduler.requests.arrays
        final = dict(enumerate((requests["prompt_tokens"] + requests["output_tokens"] - 1).tolist()))
        gauges = self.arrays.gauges
        assert (gauges[TOKENS], gauges[RESERVED], gauges[INTERNAL]) == occupied(scheduler, decided, final)
        seen.append(int(requests["num_preemptions"].sum()))

    monkeypatch.setattr(Recorder, "step", checked)
    yield seen
    assert len(seen) > 20


@pytest.mark.parametrize(("model", "num_blocks"), [("gpt-oss-20b", 520), ("gemma-3-12b", 1800), ("mistral-7b-v0.1", 600)])
def test_every_slot_is_counted_as_the_allocator_tells_it(model: str, num_blocks: int, checks: list[int]) -> None:
    done = run(scenario(model, num_blocks), "hybrid", seed=3, step_by_step=True)
    assert done.drained
    assert done.allocator.free_slots == done.allocator.usable_slots
    done.allocator.check_integrity()
    assert measure(done, ())["kv"]["internal"] >= 0
    assert checks[-1] > 0


def arrays(log: RequestLog) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    return {field.name: getattr(log, field.name) for field in fields(log)}


def test_with_layers_of_one_kind_it_is_paged_memory_to_the_last_figure() -> None:
    one = scenario("llama-3.1-8b", 700)
    hybrid, paged = run(one, "hybrid", seed=0), run(one, "paged", seed=0)
    assert hybrid.allocator.usable_slots == paged.allocator.usable_slots
    assert int(paged.log.num_preemptions.sum()) > 0
    for name, column in arrays(paged.log).items():
        np.testing.assert_array_equal(arrays(hybrid.log)[name], column, err_msg=name)
    assert measure(hybrid, ()) == measure(paged, ())


@pytest.mark.parametrize(("model", "num_blocks"), [("gpt-oss-20b", 2 * 700), ("gemma-3-12b", 6 * 700)])
def test_the_same_bytes_hold_more_requests_where_windows_give_blocks_back(model: str, num_blocks: int) -> None:
    one = scenario(model, num_blocks)
    assert one.deployment.pool.num_blocks == 700, "blocks of all layers, for paged memory"

    def preemptions(done: Run) -> int:
        return int(done.log.num_preemptions.sum())

    hybrid, paged = run(one, "hybrid", seed=0), run(one, "paged", seed=0)
    assert preemptions(paged) > 2 * max(preemptions(hybrid), 1)
    assert hybrid.end_s <= paged.end_s


@pytest.mark.parametrize("model", WINDOWED)
def test_its_pool_has_the_bytes_that_the_budget_says(model: str) -> None:
    deployment = deploy(ServingConfig(model=model, hardware="b200", quantization="nvfp4", kv_cache_memory_bytes="60GiB"))
    pool = deployment.pool_of("hybrid")
    page = plan_layer_groups(pool.layer_groups, block_size=16).page_bytes
    assert (pool.num_blocks, page) == (deployment.budget.num_blocks, deployment.budget.block_bytes)
    assert deployment.budget.kv_cache == pool.num_blocks * page
    assert 0 <= (60 << 30) - deployment.budget.kv_cache < page
    assert deployment.pool_of("paged") == deployment.pool
