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
from pagedkv.priority_queue import NUM_READY
from pagedkv.retention import RetentionRange
from pagedkv.reuse_moves import NUM_BLANK, NUM_HOLDERS
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
    parts = [world.allocator.memory.pool, world.allocator.memory.arrays, *world.allocator._holdings.values()]
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


def node(allocator: TensorRTLLMAllocator) -> int:
    """The first one that is stored."""
    return allocator.memory.pool.tree.nodes()[0]


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a, p: p.ref_cnt.__setitem__(0, 2), id="one holder too many"),
        pytest.param(lambda a, p: p.ref_cnt.__setitem__(7, 1), id="free block held"),
        pytest.param(lambda a, p: p.counts.__setitem__(NUM_HOLDERS, 1), id="holders miscounted"),
        pytest.param(lambda a, p: p.blank.__setitem__(0, 0), id="held block blank"),
        pytest.param(lambda a, p: p.counts.__setitem__(NUM_BLANK, p.counts[NUM_BLANK] - 1), id="blank block lost"),
        pytest.param(lambda a, p: p.blank.__setitem__(8, p.blank[9]), id="host block twice"),
        pytest.param(lambda a, p: p.node_of.__setitem__(7, node(a)), id="blank block with a node"),
        pytest.param(lambda a, p: p.node_of.__setitem__(p.tree.nodes["block"][node(a)], -1), id="stored block without its node"),
        pytest.param(lambda a, p: a.memory.pool.gpu.remove(next(iter(a.memory.pool.gpu))), id="free node not queued"),
        pytest.param(
            lambda a, p: a.memory.pool.gpu.set_ready(list(a.memory.pool.gpu)[-1], ready=True), id="a node that is no leaf is ready"
        ),
        pytest.param(lambda a, p: p.gpu.counts.__setitem__(NUM_READY, 0), id="queue that gives nothing"),
        pytest.param(lambda a, p: p.gpu.items["order"].__setitem__(slice(None), -1), id="queue that knows no item"),
        pytest.param(lambda a, p: p.gpu.items["place"].__setitem__(p.gpu.heap[0], 1), id="another place in the queue"),
        pytest.param(lambda a, p: p.tree.nodes["num_free_children"].__setitem__(node(a), 7), id="wrong count of children"),
        pytest.param(lambda a, p: p.tree.nodes["parent"].__setitem__(node(a), -1), id="link lost"),
        pytest.param(lambda a, p: p.tree.tokens.__setitem__(node(a), 0), id="another key than its place among others says"),
        pytest.param(lambda a, p: p.tree.nodes["num_tokens"].__setitem__(node(a), 0), id="no key"),
        pytest.param(lambda a, p: p.tree.links.__setitem__((p.tree.nodes["parent"][node(a)], 0), -1), id="key lost"),
        pytest.param(lambda a, p: p.tree.nodes["last_child"].__setitem__(a.memory.pool.tree.root(""), -1), id="end of a list lost"),
        pytest.param(lambda a, p: a.memory.pool.tree._roots.clear(), id="root lost"),
        pytest.param(lambda a, p: a.memory.arrays.tables.__setitem__((0, 0), 7), id="another block in a table"),
        pytest.param(lambda a, p: a.memory.arrays.num_blocks.__setitem__(3, 1), id="a row of nobody holds a block"),
        pytest.param(lambda a, p: a.memory.arrays.rows["num_stored"].__setitem__(0, 1), id="wrong place in the tree"),
        pytest.param(lambda a, p: a._free_rows.append(0), id="row twice"),
    ],
)
def test_corruption_is_noticed(corrupt: Callable[[Any, Any], object]) -> None:
    world = World(host_blocks=2)
    world.leave(seq(50, 9))
    world.admit(seq(0, 10))
    world.memory.check()
    corrupt(world.allocator, world.allocator.memory.pool.arrays)
    with pytest.raises(IntegrityError):
        world.allocator.check_integrity()
