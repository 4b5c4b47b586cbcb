"""Law 14: the compiled loop and the step-by-step engine leave the same tables, records and figures, bit for bit."""

import importlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases import MEMORIES, VARIANTS, Case, cases, served
from chats import MAX_MODEL_LEN, QUESTIONS, Question, records_agree, step_time, user
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.offload_steps import OffloadStepAllocator
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Step
from pagedkv.sims.clock import Clock
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engine import Engine
from pagedkv.sims.engines import load_engine
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import CACHED, EXTERNAL
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.sims.step_time import StepCost
from pagedkv.step_allocation import RequestByRequest

CLOSED = st.builds(
    lambda users, think: {"users": users, "think_time": f"{think}s"}, st.integers(1, 40), st.sampled_from([0.1, 1.0, 20.0])
)
OPEN = st.builds(
    lambda rate, burst, number: {"request_rate": rate, "burstiness": burst, "num_prompts": number},
    st.sampled_from([0.2, 3.0, 50.0]),
    st.sampled_from([0.3, 1.0]),
    st.none() | st.integers(1, 60),
)
STEPS_AT_ONCE = st.sampled_from([3, CompiledEngine.steps_at_once])


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
    records_agree(compiled, slow)


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


# --- prefixes and state ---------------------------------------------------------------------------------------------

BLOCK_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Who asks what, and who answers."""

    users: tuple[tuple[Question, ...], ...]
    num_blocks: int = 50
    state_slots: int = 0
    freed_to_front: bool = True
    watermark: float = 0.0
    reserve_full_isl: bool = True
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    steps_at_once: int = CompiledEngine.steps_at_once


class Witness(Recorder):
    """Remembers what is no figure."""

    most_shared = 0

    def step(self, step: Step, start_s: float, cost: StepCost) -> None:
        super().step(step, start_s, cost)
        self.most_shared = max(self.most_shared, self._scheduler.shared_slots)


def answered(chats: Chats, kind: type[Engine | CompiledEngine]) -> Run:
    """Let `chats` come to an end."""
    pool = KVPoolSettings(
        num_blocks=chats.num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=chats.max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        watermark=chats.watermark,
        reserve_full_isl=chats.reserve_full_isl,
        freed_to_front=chats.freed_to_front,
        state_slots=chats.state_slots,
        enable_prefix_caching=True,
    )
    limits = SchedulerSettings(
        max_num_seqs=chats.max_num_seqs, max_num_batched_tokens=chats.max_num_batched_tokens, max_model_len=MAX_MODEL_LEN
    )
    env, allocator = Clock(initial_time=0.0), PagedStepAllocator(pool)
    recorder = Witness(Scheduler(limits, allocator), warmup_s=0.1, end_s=float("inf"))
    engine = kind(env, recorder._scheduler, step_time(), recorder)
    if isinstance(engine, CompiledEngine):
        engine.steps_at_once = chats.steps_at_once
    for asker, questions in enumerate(chats.users):
        env.process(user(env, engine, asker, questions))
    env.run()
    engine.close()
    recorder.close(env.now)
    return Run(allocator=allocator, recorder=recorder, log=recorder.log(), end_s=env.now, warmup_s=0.1, drained=True)


def seen(slow: Run) -> dict[str, int]:
    """Return how much of what this is about there was."""
    assert isinstance(slow.recorder, Witness)
    requests, sums = slow.recorder._scheduler.requests, slow.recorder.integrals
    return {
        "hits": int(requests.arrays["num_hit_tokens"].sum()),
        "cached": int(sums.gauges[CACHED] > 0),
        "cached while somebody waited": int(sums.gauges_when_waiting[CACHED] > 0),
        "shared": slow.recorder.most_shared,
        "preempted": int(requests.arrays["num_preemptions"].sum()),
    }


@given(
    st.builds(
        Chats,
        users=st.lists(QUESTIONS.map(tuple), min_size=1, max_size=6).map(tuple),
        num_blocks=st.sampled_from([26, 40, 90]),
        state_slots=st.sampled_from([0, 9]),
        freed_to_front=st.booleans(),
        watermark=st.sampled_from([0.0, 0.1]),
        reserve_full_isl=st.booleans(),
        max_num_seqs=st.sampled_from([2, 6]),
        max_num_batched_tokens=st.sampled_from([16, 64]),
        steps_at_once=STEPS_AT_ONCE,
    )
)
@settings(max_examples=60)
def test_law_14_with_shared_prefixes_and_state_layers(chats: Chats) -> None:
    compiled, slow = answered(chats, CompiledEngine), answered(chats, Engine)
    agree(compiled, slow)
    for what, number in seen(slow).items():
        event(f"{what}: {number > 0}")


@pytest.mark.parametrize("freed_to_front", [True, False])
@pytest.mark.parametrize("state_slots", [0, 9])
def test_prefixes_are_found_kept_and_shared_there(freed_to_front: bool, state_slots: int) -> None:
    """The law would prove little if they were not."""
    text = (Question(0.0, 0, 33, 5, 20), Question(0.5, 0, 33, 9, 28))
    chats = Chats(users=(text,) * 5, num_blocks=45, freed_to_front=freed_to_front, state_slots=state_slots, max_num_seqs=5)
    slow = answered(chats, Engine)
    assert all(seen(slow).values())
    for steps_at_once in (1, 3, CompiledEngine.steps_at_once):
        agree(answered(replace(chats, steps_at_once=steps_at_once), CompiledEngine), slow)


# --- memory that is not paged ---------------------------------------------------------------------------------------


def request_by_request(case: Case) -> Run:
    """Serve `case` step by step over the allocator as everybody else uses it: the oracle of what is compiled."""

    def plain(name: str, settings: KVPoolSettings) -> RequestByRequest:
        return RequestByRequest(ALLOCATORS.load(name)(settings))

    with pytest.MonkeyPatch.context() as patch:
        for engine in ("orca", "vattention", "vllm"):
            patch.setattr(importlib.import_module(f"pagedkv.sims.engines.{engine}"), "step_allocator", plain)
        return served(case, step_by_step=True)


def lists_of(arrays: Any) -> list[Any]:
    """Return what arrays in tuples hold."""
    return [lists_of(part) if isinstance(part, tuple) else np.asarray(part).tolist() for part in arrays]


def place(run: Run) -> list[Any]:
    """Return where whatever comes next will lie, and who holds what."""
    allocator = run.allocator
    memory: Any = allocator.allocator if isinstance(allocator, RequestByRequest) else allocator
    if allocator.placement == "page":
        where = [array.tolist() for array in memory.pages.arrays]
    elif allocator.placement == "cell":
        where = lists_of(memory.arrays)
    elif isinstance(memory, RadixRows):
        nodes = memory.cache.tree.root.below()
        where = [memory.cache.slots.free_list().tolist(), [(node.slots.tolist(), node.last_access) for node in nodes]]
    elif allocator.placement == "block":
        pool = memory.memory.arrays.pool
        where = [each.tolist() for each in (pool.blank, pool.ref_cnt, pool.node_of, pool.tree.tokens, pool.gpu.items["order"])]
    elif allocator.placement == "growing":
        where = [memory.heap.intervals(), memory.heap.moved_slots]
    else:
        where = [memory.heap.reserved()]
    return [(allocator.units_held * allocator.unit_slots).tolist(), allocator.free_slots, allocator.rounding_slots, where]


def all_ways_are_one(case: Case) -> Run:
    """Static batches, server slots, radix rows and TensorRT-LLM's steps run over compiled memory only; all others over any."""
    compiled, slow = served(case, step_by_step=False), served(case, step_by_step=True)
    alone = ("naive", "llama-cpp", "ollama", "sglang", "tensorrt-llm")
    for other in (slow, *(() if case.engine in alone else (request_by_request(case),))):
        records_agree(compiled, other)
        assert place(compiled) == place(other)
    return slow


@pytest.mark.parametrize(("engine", "allocator"), MEMORIES)
@given(data=st.data())
@settings(max_examples=20)
def test_law_14_for_memory_that_is_not_paged(engine: str, allocator: str, data: st.DataObject) -> None:
    log = all_ways_are_one(data.draw(cases(engine, allocator))).log
    event(f"preempted: {log.num_preemptions.sum() > 0}, failed: {(log.num_output_tokens < log.output_tokens).sum() > 0}")


@pytest.mark.parametrize("engine", VARIANTS)
def test_every_preset_is_compiled(engine: str) -> None:
    """Over all memory that it runs on by itself."""
    for allocator in load_engine(engine).allocators(ServingConfig(engine=engine)):
        case = Case(
            engine=engine,
            allocator=allocator,
            variant={},
            users=(),
            num_blocks=60,
            block_size=16,
            max_num_seqs=2,
            max_num_batched_tokens=96,
        )
        scheduler = case.scheduler()
        assert isinstance(scheduler, BatchScheduler)
        assert scheduler.compiled is not None


def test_the_law_holds_where_pages_run_out() -> None:
    case = Case(
        engine="vattention",
        allocator="vattention",
        variant={},
        users=tuple((Question(0.01 * i, i % 3, 16, 3 + i, 60),) * 3 for i in range(8)),
        num_blocks=34,
        block_size=8,
        max_num_seqs=8,
        max_num_batched_tokens=96,
    )
    assert all_ways_are_one(case).log.num_preemptions.sum() > 3


def test_the_law_holds_where_blocks_run_out() -> None:
    """And where some are found, from the streams that requests go through."""
    case = Case(
        engine="tensorrt-llm",
        allocator="tensorrt-llm",
        variant={"capacity_scheduler_policy": "max_utilization"},
        users=tuple((Question(0.01 * i, i % 3, 16, 3 + i, 60),) * 3 for i in range(8)),
        num_blocks=34,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=96,
    )
    log = all_ways_are_one(case).log
    assert log.num_preemptions.sum() > 3
    assert log.num_cached_tokens.sum() > 100


def test_whoever_waits_for_an_interval_is_said_to_wait_for_one() -> None:
    """What the gauges say of external fragmentation is the same too, and there is some."""
    case = Case(
        engine="orca",
        allocator="contiguous-max",
        variant={},
        users=tuple((Question(0.0, i, 16, 3, 20),) for i in range(8)),
        num_blocks=40,
        block_size=8,
        max_num_seqs=8,
        max_num_batched_tokens=96,
    )
    assert all_ways_are_one(case).recorder.integrals.gauges[EXTERNAL] > 0


def test_the_law_holds_where_cells_run_out() -> None:
    """All who have a slot end with an error then, more than once; who asks again finds an empty slot."""
    case = Case(
        engine="llama-cpp",
        allocator="llama-cpp-unified",
        variant={"ubatch_size": 7},
        users=tuple((Question(0.01 * i, i % 3, 16, 3 + i, 2 + 3 * i),) * 3 for i in range(8)),
        num_blocks=10,
        block_size=8,
        max_num_seqs=3,
        max_num_batched_tokens=96,
    )
    log = all_ways_are_one(case).log
    failed = log.num_output_tokens < log.output_tokens
    assert 3 < failed.sum() < failed.size


@pytest.mark.parametrize(
    ("serving", "outcome"),
    [
        ({"engine": "ollama", "parallel": 2, "ctx_size": 4096, "max_queue": 3}, Outcome.REJECTED),
        ({"engine": "llama-cpp", "parallel": 4, "ctx_size": 1280, "kv_unified": True}, Outcome.FAILED),
    ],
)
def test_the_law_holds_for_arrivals_that_are_turned_away_or_given_up(serving: dict[str, Any], outcome: Outcome) -> None:
    """Who may find a queue full is asked when it arrives; who may not is known from the start."""
    lengths = {"random_input_len": 300, "random_output_len": 120, "random_range_ratio": 0.9}
    case = resolve(
        SimulationConfig(
            load=LoadConfig(request_rate=6.0, num_prompts=60, **lengths),
            serving=ServingConfig(quantization="q4_k_m", **serving),
        )
    )
    compiled, slow = (run(case, case.allocators[0], seed=1, step_by_step=each) for each in (False, True))
    records_agree(compiled, slow)
    assert place(compiled) == place(slow)
    assert 5 < (compiled.log.outcome == outcome).sum() < 60
