"""TensorRT-LLM's block manager: which block goes first, what retention says, and what moves to the host."""

import pytest
from tensorrt_llm_world import World, seq

from pagedkv.kv_request import KVRequest
from pagedkv.retention import RetentionRange


def test_blank_blocks_go_before_stored_ones_and_a_tail_before_its_head() -> None:
    world = World()
    world.leave(seq(0, 12))  # 3 stored, 5 blank; its fourth block ends blank
    hits = []
    for count in (5, 6, 7, 8):
        world.fill(count)
        hits.append(world.cached(seq(0, 13)))
    assert hits == [12, 8, 4, 0]


def test_within_a_priority_what_was_released_longest_ago_goes_first_and_a_hit_counts_as_use() -> None:
    world = World()
    for start in (0, 10, 20):
        world.leave(seq(start, 4))
    world.free(world.admit(seq(0, 5)))
    world.fill(6)
    assert [world.cached(seq(start, 5)) for start in (0, 10, 20)] == [4, 0, 4]


def test_the_lowest_priority_goes_first() -> None:
    world = World()
    for start, priority in ((0, 80), (10, 0), (20, 34)):
        world.leave(seq(start, 4), priority=priority)
    world.fill(6)
    assert [world.cached(seq(start, 5)) for start in (0, 10, 20)] == [4, 4, 0]
    world.fill(7)
    assert [world.cached(seq(start, 5)) for start in (0, 10, 20)] == [4, 0, 0]


def test_only_leaves_go_a_block_of_low_priority_waits_for_what_is_behind_it() -> None:
    world = World()
    request = world.admit(seq(0, 9))
    world.allocator.set_retention(request, [RetentionRange(last=4, priority=1), RetentionRange(first=4, priority=90)])
    world.free(request)
    world.leave(seq(20, 4))
    world.fill(6)
    assert (world.cached(seq(20, 5)), world.cached(seq(0, 9))) == (0, 8)
    world.fill(7)
    assert world.cached(seq(0, 9)) == 4


def test_a_block_follows_the_range_of_its_first_token_and_priority_zero_can_be_said_there() -> None:
    world = World()
    request = world.admit(seq(0, 9), priority=50)
    world.allocator.set_retention(request, [RetentionRange(first=2, last=6, priority=0)])
    world.free(request)
    world.leave(seq(20, 4), priority=40)
    world.fill(6)
    assert (world.cached(seq(0, 9)), world.cached(seq(20, 5))) == (4, 4)  # tokens 4 to 7 went, 0 to 3 kept 50
    world.fill(7)
    assert (world.cached(seq(0, 9)), world.cached(seq(20, 5))) == (4, 0)


def test_a_holder_that_says_nothing_leaves_the_priority_as_it_was() -> None:
    world = World()
    world.leave(seq(0, 4), priority=80)
    world.leave(seq(0, 4))
    world.leave(seq(20, 4), priority=60)
    world.fill(7)
    assert (world.cached(seq(0, 5)), world.cached(seq(20, 5))) == (4, 0)


def test_a_retention_priority_reverts_to_the_end_of_35_when_its_duration_ends() -> None:
    world = World()
    for start in (0, 10):
        request = world.admit(seq(start, 5))
        world.allocator.set_retention(request, [RetentionRange(priority=90 if start == 0 else 1, duration=10)])
        world.free(request)
    world.leave(seq(20, 4))
    world.allocator.advance(9.9)
    world.fill(6)
    assert [world.cached(seq(start, 5)) for start in (0, 10, 20)] == [4, 0, 4]
    world.allocator.advance(10)
    world.memory.check()
    world.fill(7)
    assert [world.cached(seq(start, 5)) for start in (0, 20)] == [4, 0]  # released before it, but in 35 since just now
    world.leave(seq(30, 4), priority=36)
    world.fill(7)
    assert [world.cached(seq(start, 5)) for start in (0, 30)] == [0, 4]


def test_a_duration_begins_anew_at_each_release() -> None:
    world = World()
    request = world.admit(seq(0, 5))
    world.allocator.set_retention(request, [RetentionRange(priority=90, duration=10)])
    world.free(request)
    world.allocator.advance(8)
    user = world.admit(seq(0, 5))
    world.allocator.advance(15)
    world.free(user)
    world.allocator.advance(20)
    world.leave(seq(20, 4))
    world.fill(7)
    assert (world.cached(seq(0, 5)), world.cached(seq(20, 5))) == (4, 0)


def test_an_evicted_block_moves_to_the_host_and_a_hit_brings_it_back() -> None:
    world = World(host_blocks=2)
    world.leave(seq(0, 8))
    block = world.allocator.cached_slots()[0] // 4
    world.fill(7)
    offload = world.last.copies
    assert offload.tolist() == [[block * 4 + i, 32 + i] for i in range(4)]
    assert (world.allocator.offloaded_slots, world.allocator.onboarded_slots) == (4, 0)
    assert world.cached(seq(0, 9)) == 8
    user = world.admit(seq(0, 9))
    assert world.last.num_cached_tokens == 8
    assert world.last.copies[:, 0].tolist() == [32, 33, 34, 35]
    assert world.last.copies[0, 1] == world.blocks(user)[1] * 4
    assert (world.allocator.offloaded_slots, world.allocator.onboarded_slots) == (4, 4)
    assert world.allocator.memory.pool.host_blank() == [9, 8]


@pytest.mark.parametrize(("priority", "cached"), [(29, 0), (30, 4), (0, 4)])
def test_only_blocks_of_priority_30_and_more_move_to_the_host(priority: int, cached: int) -> None:
    world = World(host_blocks=2)
    world.leave(seq(0, 4), priority=priority)
    world.fill(8)
    assert (world.cached(seq(0, 5)), world.allocator.offloaded_slots) == (cached, cached)


def test_the_host_evicts_its_own_leaves_by_priority_and_age() -> None:
    world = World(host_blocks=2)
    for start, priority in ((0, 90), (10, 40), (20, 50)):
        world.leave(seq(start, 4), priority=priority)
    world.fill(8)  # 10 and 20 move out; then 0 does, in place of 10
    assert [world.cached(seq(start, 5)) for start in (0, 10, 20)] == [4, 0, 4]
    assert world.allocator.offloaded_slots == 12


def test_on_the_host_too_only_leaves_go() -> None:
    world = World(host_blocks=2)
    request = world.admit(seq(0, 9))
    world.allocator.set_retention(request, [RetentionRange(last=4, priority=30), RetentionRange(first=4, priority=90)])
    world.free(request)
    world.leave(seq(20, 4), priority=95)
    world.fill(8)
    assert (world.cached(seq(0, 9)), world.cached(seq(20, 5))) == (4, 4)


def test_a_hit_on_the_host_needs_a_block_to_come_back_to() -> None:
    world = World(host_blocks=2)
    world.leave(seq(0, 4))
    world.fill(8)
    busy = KVRequest(request_id="busy", num_tokens=28)
    assert world.step(busy, 28)
    user = world.request(seq(0, 5))
    assert not world.step(user, 1)
    world.free(busy)
    assert world.step(user, 1)
    assert world.last.num_cached_tokens == 4


def test_what_follows_a_duplicate_is_stored_behind_a_first_one_that_moved_to_the_host() -> None:
    world = World(host_blocks=1)
    first = world.admit(seq(0, 5), computed=False)
    second = world.admit([*seq(0, 4), *seq(50, 4)], computed=False)
    for request in (first, second):
        world.allocator.note_computed(request)
    world.free(first)
    world.fill(6)
    world.decode(second, 54)
    assert world.cached([*seq(0, 4), *seq(50, 5)]) == 8
    world.leave(seq(20, 4), priority=95)
    world.fill(5)  # the host's block is no leaf: nothing can move there
    assert (world.cached([*seq(0, 4), *seq(50, 5)]), world.cached(seq(20, 5))) == (8, 0)


def test_a_partial_match_on_the_host_is_copied_from_there_and_stays() -> None:
    world = World(host_blocks=2)
    world.leave(seq(0, 4))
    world.fill(8)
    user = world.admit([0, 1, 50])
    target = world.blocks(user)[0] * 4
    assert world.last.copies.tolist() == [[32, target], [33, target + 1]]
    assert world.allocator.onboarded_slots == 2
    assert world.cached(seq(0, 5)) == 4


def test_a_block_that_is_dropped_takes_what_the_host_keeps_behind_it_along() -> None:
    world = World(host_blocks=1)
    request = world.admit(seq(0, 9))
    world.allocator.set_retention(request, [RetentionRange(last=4, priority=10), RetentionRange(first=4, priority=40)])
    world.free(request)
    world.fill(7)
    assert world.cached(seq(0, 9)) == 8  # the tail is on the host
    world.fill(8)
    assert world.cached(seq(0, 9)) == 0
    assert world.allocator.memory.pool.host_blank() == [8]
