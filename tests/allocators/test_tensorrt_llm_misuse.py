"""TensorRT-LLM's block manager: bad use is told and changes nothing, and corruption is noticed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tensorrt_llm_world import POOL, World, seq

from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.retention import RetentionRange
from pagedkv.shadow_memory import check_unchanged, state_of


@pytest.mark.parametrize(("size", "near"), [(1, "2 would"), (3, "2 or 4"), (10, "8 or 16"), (48, "32 or 64")])
def test_a_block_size_that_is_no_power_of_two_is_refused_with_the_near_ones(size: int, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        ALLOCATORS.load("tensorrt-llm")(replace(POOL, block_size=size))


def changed(request: KVRequest, **values: Any) -> KVRequest:
    for name, value in values.items():
        setattr(request, name, value)
    return request


NEW = KVRequest(request_id="new", num_tokens=4)
RANGES = [RetentionRange(first=0, last=8, priority=1), RetentionRange(first=4, priority=2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda a, r: a.free(NEW), "holds no blocks", id="free what holds nothing"),
        pytest.param(lambda a, r: a.preempt(NEW), "holds no blocks", id="preempt what holds nothing"),
        pytest.param(lambda a, r: a.note_computed(NEW), "holds no blocks", id="note what holds nothing"),
        pytest.param(lambda a, r: a.set_retention(NEW, []), "holds no blocks", id="retain what holds nothing"),
        pytest.param(lambda a, r: a.set_retention(r, RANGES), "overlap", id="ranges overlap"),
        pytest.param(lambda a, r: a.set_retention(r, [*RANGES[1:], RANGES[1]]), "overlap", id="two open ranges"),
        pytest.param(lambda a, r: a.allocate_slots(r, 0), "needs 1 or more", id="no new tokens"),
        pytest.param(lambda a, r: a.allocate_slots(r, 40), "max_model_len 40", id="growth too long"),
        pytest.param(lambda a, r: a.allocate_slots(changed(NEW, num_tokens=41), 1), "max_model_len 40", id="prompt too long"),
        pytest.param(lambda a, r: a.allocate_slots(changed(NEW, num_tokens=4), 41), "max_model_len 40", id="admission too long"),
        pytest.param(lambda a, r: a.allocate_slots(changed(r, num_computed_tokens=13), 1), "holds 12 slots", id="more than held"),
        pytest.param(lambda a, r: a.note_computed(changed(r, num_computed_tokens=13)), "up to the 12", id="note more than held"),
        pytest.param(lambda a, r: a.note_computed(changed(r, num_computed_tokens=-1)), "-1 computed", id="note less than none"),
        pytest.param(lambda a, r: a.allocate_slots(changed(r, num_tokens=11), 1), r"needs int32 \[11\]", id="too few token ids"),
        pytest.param(lambda a, r: a.free(changed(r, num_tokens=11)), r"needs int32 \[11\]", id="too few token ids at the end"),
        pytest.param(lambda a, r: a.note_computed(changed(r, token_ids=np.arange(10.0))), "float64", id="no integers"),
        pytest.param(lambda a, r: a.get_computed_tokens(changed(r, token_ids=r.token_ids[None])), "shape", id="two rows"),
        pytest.param(lambda a, r: a.free(changed(r, priority=101)), "needs 0 to 100; 35 is usual", id="priority too high"),
        pytest.param(lambda a, r: a.allocate_slots(changed(r, priority=-1), 1), "needs 0 to 100", id="priority too low"),
        pytest.param(lambda a, r: a.advance(4), "lies before 5", id="time goes back"),
        pytest.param(lambda a, r: a.advance(float("nan")), "nan", id="no time"),
    ],
)
def test_bad_use_is_told_and_changes_nothing(call: Callable[[Any, KVRequest], object], message: str) -> None:
    world = World()
    world.leave(seq(50, 9))
    request = world.admit(seq(0, 10))
    world.allocator.advance(5)
    parts = [world.allocator._pool, *world.allocator._holdings.values()]
    before = state_of(parts)
    with pytest.raises(ConfigError, match=message):
        call(world.allocator, request)
    assert list(world.allocator._holdings) == [request]
    check_unchanged(before, state_of(parts))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"priority": 101}, "needs 0 to 100"),
        ({"priority": -1}, "needs 0 to 100"),
        ({"priority": 5, "first": -1}, "first needs 0"),
        ({"priority": 5, "first": 3, "last": 3}, "last 4 or more"),
        ({"priority": 5, "duration": 0}, "more than 0"),
        ({"priority": 5, "duration": float("nan")}, "more than 0"),
    ],
)
def test_a_retention_range_that_is_none_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetentionRange(**values)


def test_a_request_too_many_and_a_double_free_are_refused() -> None:
    world = World(replace(POOL, max_num_seqs=1))
    request = world.admit(seq(0, 4))
    with pytest.raises(ConfigError, match="raise max_num_seqs 1"):
        world.allocator.allocate_slots(world.request(seq(0, 4)), 1)
    world.free(request)
    with pytest.raises(ConfigError, match="freed before"):
        world.allocator.free(request)
    world.memory.check()


def test_a_watermark_is_left_free_by_admissions_while_something_runs() -> None:
    allocator = TensorRTLLMAllocator(replace(POOL, watermark=0.25))
    request = KVRequest(request_id="a", num_tokens=28)
    assert allocator.allocate_slots(request, 28, has_scheduled_reqs=True) is None
    assert allocator.allocate_slots(request, 28) is not None


def test_admission_slots_is_none_for_what_can_never_fit() -> None:
    allocator = TensorRTLLMAllocator(replace(POOL, max_model_len=30, state_slots=5))
    assert allocator.state_slots == 8
    assert [allocator.admission_slots(prompt, 5) for prompt in (20, 21)] == [0, None]
    assert TensorRTLLMAllocator(replace(POOL, max_model_len=30)).admission_slots(26, 5) == 0
    assert TensorRTLLMAllocator(replace(POOL, max_model_len=30)).admission_slots(27, 5) is None


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a, p: p.ref_cnt.__setitem__(0, 2), id="one holder too many"),
        pytest.param(lambda a, p: p.ref_cnt.__setitem__(7, 1), id="free block held"),
        pytest.param(lambda a, p: p.gpu.blank.append(0), id="held block blank"),
        pytest.param(lambda a, p: p.gpu.blank.pop(), id="blank block lost"),
        pytest.param(lambda a, p: p.host.blank.append(9), id="host block twice"),
        pytest.param(lambda a, p: p.node_of.__setitem__(7, p.tree.nodes()[0]), id="blank block with a node"),
        pytest.param(lambda a, p: p.node_of.__setitem__(p.tree.nodes()[0].block, None), id="stored block without its node"),
        pytest.param(lambda a, p: p.gpu.queue.remove(next(iter(p.gpu.queue))), id="free node not queued"),
        pytest.param(lambda a, p: p.gpu.queue.set_ready(list(p.gpu.queue)[-1], ready=True), id="a node that is no leaf is ready"),
        pytest.param(lambda a, p: p.gpu.queue._heap.clear(), id="queue that gives nothing"),
        pytest.param(lambda a, p: p.gpu.queue._items.clear(), id="queue that knows no item"),
        pytest.param(lambda a, p: setattr(p.tree.nodes()[0], "num_free_children", 7), id="wrong count of children"),
        pytest.param(lambda a, p: setattr(p.tree.nodes()[0], "parent", None), id="link lost"),
        pytest.param(lambda a, p: setattr(p.tree.nodes()[0], "key", b"0123"), id="another key"),
        pytest.param(lambda a, p: p.tree.nodes()[0].parent.sorted_keys.pop(), id="key lost"),
        pytest.param(lambda a, p: p.tree.root("empty"), id="root of nothing"),
        pytest.param(lambda a, p: next(iter(a._holdings.values())).blocks.append(-1), id="no block in a table"),
        pytest.param(lambda a, p: next(iter(a._holdings.values())).state.append(p.gpu.blank[0]), id="state of nobody"),
        pytest.param(lambda a, p: setattr(next(iter(a._holdings.values())), "num_walked", 5), id="wrong place in the tree"),
    ],
)
def test_corruption_is_noticed(corrupt: Callable[[Any, Any], object]) -> None:
    world = World(host_blocks=2)
    world.leave(seq(50, 9))
    world.admit(seq(0, 10))
    world.memory.check()
    corrupt(world.allocator, world.allocator._pool)
    with pytest.raises(IntegrityError):
        world.allocator.check_integrity()
