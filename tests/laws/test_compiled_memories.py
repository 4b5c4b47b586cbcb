"""Law 14 over memory that is not paged: compiled, step by step or request by request, it is the same."""

import importlib
from typing import Any

import numpy as np
import pytest
from cases import MEMORIES, VARIANTS, Case, cases, served
from chats import Question, records_agree
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.sims.config import LoadConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engines import load_engine
from pagedkv.sims.recording import EXTERNAL
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.step_allocation import RequestByRequest


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
