"""Steps over memory with blocks per layer group do, block by block, what the allocator does that is asked request by request."""

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from step_twin import StepTwin

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.hybrid import HybridAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.kv_spec import LayerGroup
from pagedkv.scheduling.content import shared_segments
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Blocker
from pagedkv.step_allocation import step_allocator

SIZE = 4
LONGEST = 64


def layers(kind: str, number: int, window: int | None = None, *, key_dim: int = 8) -> LayerGroup:
    return LayerGroup(kind=kind, num_layers=number, window=window, num_kv_heads=1, key_dim=key_dim, value_dim=key_dim)  # type: ignore[arg-type]


MODELS = {
    "full": (layers("full", 2),),
    "window alone": (layers("sliding_window", 2, 6),),
    "one window": (layers("full", 1), layers("sliding_window", 1, 7)),
    "gpt-oss": (layers("full", 2), layers("sliding_window", 2, 8)),
    "gemma-3": (layers("full", 1), layers("sliding_window", 5, 10)),
    "gemma-4": (layers("full", 1), layers("sliding_window", 2, 9, key_dim=16)),  # blocks of 8 tokens and of 4
    "gemma-4-e4b": (layers("full", 1, key_dim=16), layers("sliding_window", 3, 5)),  # the other way round
    "llama-4": (layers("full", 1), layers("chunked", 3, 12)),
    "two windows": (layers("full", 1), layers("sliding_window", 1, 5), layers("sliding_window", 1, 17)),
}
STATE = LayerGroup(kind="state", num_layers=3, state_bytes=300)

QUESTION = st.tuples(st.integers(0, 14), st.integers(0, 2), st.integers(4, 36), st.integers(1, 10), st.integers(1, 14))
"""Steps until it comes, whose prefix it begins with, how long that is, further prompt tokens, output tokens."""


def pool_of(model: tuple[LayerGroup, ...], num_blocks: int, **more: Any) -> KVPoolSettings:
    return KVPoolSettings(num_blocks=num_blocks, block_size=SIZE, max_num_seqs=4, max_model_len=LONGEST, layer_groups=model, **more)


@given(
    model=st.sampled_from(list(MODELS)),
    with_state=st.booleans(),
    questions=st.lists(QUESTION, min_size=4, max_size=14),
    room=st.integers(0, 30),
    caching=st.booleans(),
    tokens=st.sampled_from([8, 24]),
    watermark=st.sampled_from([0.0, 0.1]),
    gate=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_steps_take_and_give_back_what_the_allocator_does(
    model: str, with_state: bool, questions: list[Any], room: int, caching: bool, tokens: int, watermark: float, gate: bool
) -> None:
    groups = (*MODELS[model], *((STATE,) if with_state else ()))
    caching &= not with_state
    more = {
        "enable_prefix_caching": caching,
        "max_num_batched_tokens": tokens,
        "watermark": watermark,
        "reserve_full_isl": gate,
    }
    alone = HybridAllocator(pool_of(groups, 1000, **more)).manager.peak_blocks(60)
    pool = pool_of(groups, alone + 1 + room, **more)
    memory = HybridStepAllocator(pool)
    scheduler = Scheduler(SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=tokens, max_model_len=LONGEST), memory)
    allocator = HybridAllocator(pool)
    twin = StepTwin(allocator, scheduler, hash_block_size=SIZE, max_num_batched_tokens=tokens)
    pending, steps, num_preempted, found, shared, given_back = sorted(questions), 0, 0, 0, 0, 0
    while pending or scheduler.num_running or scheduler.num_waiting:
        while pending and pending[0][0] <= steps:
            _, text, prefix, own, output = pending.pop(0)
            content = shared_segments(np.array([text]), np.array([prefix]))
            assert scheduler.add(prompt_tokens=prefix + own, output_tokens=output, content=content) is not None
        step = scheduler.schedule()
        assert step.num_entries or not (scheduler.num_running or scheduler.num_waiting)  # whoever is alone fits
        found += twin.decide(step, scheduler.preempted.tolist())
        pools = memory.pool, allocator.manager.pool
        assert pools[0].free_queue().tolist() == pools[1].free_queue().tolist()
        assert pools[0].ref_cnt.tolist() == pools[1].ref_cnt.tolist()
        assert pools[0].cache.blocks().tolist() == pools[1].cache.blocks().tolist()
        for entry in range(step.num_entries):
            row, request = int(step.batch["row"][entry]), twin.requests[int(step.batch["request"][entry])]
            for group in range(memory.num_groups):
                table = memory.block_table(row, group)
                assert table.tolist() == allocator.manager.block_table(request, group).tolist()
                given_back += int((table == 0).sum())
            assert memory.units_held[row] * memory.unit_slots == allocator.num_slots_held(request)
        if step.blocker is Blocker.KV_MEMORY and not step.num_preempted:
            assert twin.refuses(int(scheduler.waiting()[0]), step, something_runs=scheduler.num_running > 0)
        shared = max(shared, scheduler.shared_slots)
        scheduler.complete()
        twin.complete(scheduler.finished.tolist())
        scheduler.check_integrity()
        allocator.check_integrity()
        num_preempted += step.num_preempted
        steps += 1
    event(f"hits: {found > 0}")
    event(f"shared: {shared > 0}")
    event(f"preempts: {num_preempted > 0}")
    event(f"windows leave blocks behind: {given_back > 0}")
    assert int(scheduler.requests.arrays["num_hit_tokens"].sum()) == found
    assert memory.free_slots == memory.usable_slots


def busy(*, freed_to_front: bool = True) -> tuple[HybridStepAllocator, Scheduler]:
    """Two requests that share a prefix, one of which has left blocks behind its window."""
    memory = HybridStepAllocator(
        pool_of(MODELS["one window"], 60, enable_prefix_caching=True, max_num_batched_tokens=24, freed_to_front=freed_to_front)
    )
    scheduler = Scheduler(SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=LONGEST), memory)
    for _ in range(2):
        scheduler.add(prompt_tokens=30, output_tokens=9, content=shared_segments(np.array([1]), np.array([24])))
        for _ in range(3):
            scheduler.schedule()
            scheduler.complete()
    assert scheduler.num_running == 2
    assert memory.shared_slots > 0
    assert memory.arrays.num_given_back.max() > 0
    scheduler.check_integrity()
    return memory, scheduler


def put(array: Any, place: Any, value: int) -> None:
    array[place] = value


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda m: put(m.arrays.tables, (0, 0, 0), 59), id="a block that nobody took"),
        pytest.param(lambda m: put(m.arrays.tables, (1, 0, int(m.arrays.num_given_back[1, 0])), 0), id="a hole in a table"),
        pytest.param(lambda m: put(m.arrays.num_given_back, (1, 0), 0), id="given back, but not said"),
        pytest.param(lambda m: put(m.arrays.held, 0, 1), id="a row of another size"),
        pytest.param(lambda m: put(m.arrays.shares, 0, 0), id="shares that are forgotten"),
        pytest.param(lambda m: put(m.arrays.num_registered, (0, 0), int(m.arrays.num_blocks[0, 0])), id="a key that is not there"),
    ],
)
def test_what_is_spoiled_is_noticed(spoil: Any) -> None:
    memory, _ = busy()
    spoil(memory)
    with pytest.raises(IntegrityError):
        memory.check_integrity()


def test_blocks_freed_behind_are_handed_out_last() -> None:
    """vLLM 0.19's order: what a window leaves behind, and what a request gives back, goes to the end of the queue."""
    for freed_to_front in (True, False):
        memory, scheduler = busy(freed_to_front=freed_to_front)
        tail = int(memory.block_table(int(scheduler.requests.arrays["row"][0]))[-1])  # not full: it carries no key
        assert scheduler.abort(0)
        queue = memory.pool.free_queue().tolist()
        assert queue.index(tail) < 3 if freed_to_front else queue.index(tail) > 30
        scheduler.check_integrity()


def test_states_and_prefixes_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching off"):
        step_allocator("hybrid", pool_of((*MODELS["full"], STATE), 60, enable_prefix_caching=True))
    with pytest.raises(ConfigError, match="needs layers with keys"):
        step_allocator("hybrid", pool_of((STATE,), 60))
