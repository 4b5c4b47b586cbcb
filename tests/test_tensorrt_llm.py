"""TensorRT-LLM's block manager: each rule of reuse, retention and eviction, and every law under random use, host tier included."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pagedkv.allocation import Allocator, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.priority_queue import PriorityQueue
from pagedkv.retention import Retention, RetentionRange
from pagedkv.reuse_pool import ReusePool
from pagedkv.reuse_tree import ReuseTree
from pagedkv.shadow_memory import ShadowMemory, check_unchanged, prefix_identities, state_of

POOL = KVPoolSettings(num_blocks=8, block_size=4, max_num_seqs=4, max_model_len=40, enable_prefix_caching=True)


class World:
    """An allocator, its owner, and the shadow of its memory, checked after every call."""

    def __init__(self, pool: KVPoolSettings = POOL, *, host_blocks: int = 0) -> None:
        self.allocator = TensorRTLLMAllocator(replace(pool, offload_blocks=host_blocks))
        self.memory = ShadowMemory(self.allocator)
        self.last = Grant()
        self.num_requests = 0

    def request(self, tokens: Any, **more: Any) -> KVRequest:
        self.num_requests += 1
        ids = np.array(list(tokens), np.int32)
        return KVRequest(request_id=self.num_requests, num_tokens=ids.size, token_ids=ids, **more)

    def cached(self, tokens: Any, **more: Any) -> int:
        return self.allocator.get_computed_tokens(self.request(tokens, **more))

    def step(self, request: KVRequest, num_new: int, *, computed: bool = True) -> bool:
        before = state_of(self.allocator)
        grant = self.allocator.allocate_slots(request, num_new)
        if grant is None:
            check_unchanged(before, state_of(self.allocator))
            return False
        self.last = grant
        tokens = np.arange(POOL.max_model_len * 2) if not request.token_ids.size else request.token_ids
        self.memory.write(request, prefix_identities(tokens, request.namespace), grant, num_new)
        if computed:
            self.allocator.note_computed(request)
        self.memory.check()
        return True

    def admit(self, tokens: Any, *, computed: bool = True, **more: Any) -> KVRequest:
        """A request whose prompt is computed in one step, as far as it is not cached."""
        request = self.request(tokens, **more)
        assert self.step(request, request.num_tokens - self.allocator.get_computed_tokens(request), computed=computed)
        return request

    def decode(self, request: KVRequest, token: int) -> None:
        request.token_ids = np.append(request.token_ids, np.int32(token))
        request.num_tokens += 1
        self.memory.identities[request] = (prefix_identities(request.token_ids, request.namespace),)
        assert self.step(request, 1)

    def free(self, *requests: KVRequest) -> None:
        for request in requests:
            self.allocator.free(request)
            self.memory.forget(request)
            self.memory.check()

    def leave(self, tokens: Any, **more: Any) -> None:
        """A request that comes, computes `tokens` and one more, and ends: all of `tokens` are stored."""
        self.free(self.admit([*tokens, 99], **more))

    def blocks(self, request: KVRequest) -> list[int]:
        return (self.allocator.slots_held(request)[:: POOL.block_size] // POOL.block_size).tolist()

    def fill(self, num_blocks: int) -> None:
        """Evict: a request that shares nothing takes so many blocks for a moment."""
        request = KVRequest(request_id="fill", num_tokens=num_blocks * POOL.block_size)
        assert self.step(request, request.num_tokens)
        self.free(request)


def seq(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


# Storing and hits.


def test_a_block_is_found_once_it_is_full_and_computed() -> None:
    world = World()
    first = world.admit(seq(0, 9), computed=False)
    assert world.cached(seq(0, 9)) == 0  # granted, but not computed yet
    world.allocator.note_computed(first)
    assert world.cached(seq(0, 9)) == 8
    assert world.cached([*seq(0, 8), 50]) == 8
    assert world.cached(seq(0, 11)) == 8  # its third block is not full


def test_a_block_that_fills_while_decoding_is_stored() -> None:
    world = World()
    first = world.admit(seq(0, 6))
    world.decode(first, 6)
    world.decode(first, 7)
    assert world.cached(seq(0, 12)) == 4  # token 7 is the last of the sequence: it is not stored
    world.decode(first, 8)
    assert world.cached(seq(0, 12)) == 8


def test_release_stores_all_but_the_last_token_of_the_sequence() -> None:
    world = World()
    world.free(world.admit(seq(0, 12)))
    assert world.cached(seq(0, 20)) == 11
    assert len(world.allocator.cached_slots()) == 12


def test_what_was_granted_but_never_computed_is_not_stored() -> None:
    world = World()
    request = world.request(seq(0, 12))
    assert world.step(request, 5)
    assert world.step(request, 6, computed=False)
    world.free(request)
    assert world.cached(seq(0, 20)) == 5


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    world = World()
    world.leave(seq(0, 12))
    assert [world.cached(seq(0, n)) for n in (1, 2, 8, 9, 12, 13, 14)] == [0, 1, 7, 8, 11, 12, 12]
    again = world.admit(seq(0, 8))
    assert (world.last.num_cached_tokens, again.num_computed_tokens) == (7, 8)


def test_full_blocks_are_shared_while_their_holder_runs() -> None:
    world = World()
    first, second = world.admit(seq(0, 10)), world.admit([*seq(0, 8), 50, 51])
    assert world.blocks(first)[:2] == world.blocks(second)[:2]
    assert world.blocks(first)[2] != world.blocks(second)[2]
    assert world.allocator.free_slots == 16


def test_a_partial_match_takes_an_unused_leaf_over_in_place_and_its_other_tokens_are_gone() -> None:
    world = World()
    world.leave(seq(0, 8))
    leaf = world.allocator.cached_slots()[0] // 4
    taker = world.admit([*seq(0, 6), 50, 51])
    assert world.last.num_cached_tokens == 6
    assert world.last.copies.size == 0
    assert world.blocks(taker)[1] == leaf
    assert world.cached(seq(0, 9)) == 4
    world.free(taker)
    assert world.cached([*seq(0, 6), 50, 51]) == 7


def test_a_partial_match_in_a_block_in_use_is_copied() -> None:
    world = World()
    holder = world.admit(seq(0, 9))
    taker = world.admit([*seq(0, 6), 50, 51])
    source, target = world.blocks(holder)[1], world.blocks(taker)[1]
    assert world.last.num_cached_tokens == 6
    assert world.last.copies.tolist() == [[source * 4, target * 4], [source * 4 + 1, target * 4 + 1]]
    world.free(holder)
    assert world.cached(seq(0, 9)) == 8  # the source is whole


def test_a_partial_match_in_a_block_with_others_behind_it_is_copied() -> None:
    world = World()
    world.leave(seq(0, 8))
    world.admit([0, 1, 50])
    assert len(world.last.copies) == 2
    assert world.cached(seq(0, 9)) == 8


def test_a_partial_match_is_taken_over_when_no_block_is_left_to_copy_it_into() -> None:
    world = World(replace(POOL, num_blocks=3))
    world.leave(seq(0, 11))
    taker = world.request([0, 1, *seq(50, 8)])
    assert world.allocator.get_computed_tokens(taker) == 2
    assert world.step(taker, 8)
    assert (world.last.num_cached_tokens, world.last.copies.size) == (2, 0)


def test_the_longest_of_several_partial_matches_counts() -> None:
    world = World(replace(POOL, num_blocks=16, max_num_seqs=8))
    for tokens in ([1, 2, 9, 9], [1, 2, 3, 9], [1, 8, 8, 8], [0, 2, 3, 4], [1, 2, 4, 4]):
        world.admit([*tokens, 99])
    assert [world.cached(tokens) for tokens in ([1, 2, 3, 4, 5], [1, 2, 5, 5], [1, 9, 9], [7, 2, 3])] == [3, 2, 1, 0]


def test_a_block_that_is_not_full_is_never_shared() -> None:
    world = World()
    world.leave(seq(0, 6))
    one = world.admit([*seq(0, 6), 50])
    two = world.admit([*seq(0, 6), 60])
    assert world.blocks(one)[0] == world.blocks(two)[0]
    assert world.blocks(one)[1] != world.blocks(two)[1]
    assert (one.num_computed_tokens, world.last.num_cached_tokens) == (7, 4)  # the first took the two tokens over


def test_namespaces_share_nothing() -> None:
    world = World()
    world.leave(seq(0, 8), namespace="tenant-1")
    assert (world.cached(seq(0, 9)), world.cached(seq(0, 9), namespace="tenant-1")) == (0, 8)


@pytest.mark.parametrize("caching", [True, False])
def test_a_request_without_tokens_or_an_allocator_without_caching_shares_nothing(caching: bool) -> None:
    world = World(replace(POOL, enable_prefix_caching=caching))
    world.fill(3)
    if not caching:
        world.leave(seq(0, 8))
        assert world.cached(seq(0, 9)) == 0
    assert world.allocator.cached_slots().size == 0
    assert world.allocator.free_slots == 32


def test_the_tree_keeps_one_block_per_content_and_what_follows_a_duplicate_is_stored_behind_the_first() -> None:
    world = World()
    first = world.admit(seq(0, 5), computed=False)
    second = world.admit([*seq(0, 4), *seq(50, 5)], computed=False)  # nothing is stored yet: both compute block one
    for request in (first, second):
        world.allocator.note_computed(request)
    third = world.admit([*seq(0, 4), *seq(50, 5)])
    assert world.blocks(third)[:2] == [world.blocks(first)[0], world.blocks(second)[1]]
    world.free(third, second)
    assert world.blocks(first)[0] not in set(world.allocator.cached_slots() // 4)
    assert len(world.allocator.cached_slots()) == 4  # [50..53]; what duplicated others is blank
    world.free(first)
    assert len(world.allocator.cached_slots()) == 8


def test_a_merged_duplicate_is_stored_when_the_block_it_was_merged_with_is_evicted() -> None:
    world = World()
    first = world.admit(seq(0, 5), computed=False)
    second = world.admit([*seq(0, 4), *seq(50, 5)], computed=False)
    for request in (first, second):
        world.allocator.note_computed(request)
    world.free(first)
    world.fill(5)  # all that second does not hold: block one of the first goes, though a block of second lies behind it
    assert world.cached([*seq(0, 4), *seq(50, 5)]) == 0
    world.free(second)
    assert world.cached([*seq(0, 4), *seq(50, 5)]) == 8


def test_cached_tokens_of_a_request_that_ends_before_it_computes_anything_stay_stored() -> None:
    world = World()
    world.leave(seq(0, 6))
    world.free(world.admit([*seq(0, 6), 50, 51], computed=False))
    assert world.cached([*seq(0, 6), 50, 51]) == 6


def test_a_preempted_request_finds_what_it_computed() -> None:
    world = World()
    request = world.admit(seq(0, 10))
    world.allocator.preempt(request)
    world.memory.forget(request)
    assert request.num_computed_tokens == 0
    assert world.step(request, 1)
    assert world.last.num_cached_tokens == 9


def test_an_admission_takes_the_whole_prompt_unless_reserve_full_isl_is_off() -> None:
    for reserve, held in ((True, 20), (False, 4)):
        world = World(replace(POOL, reserve_full_isl=reserve))
        request = world.request(seq(0, 18))
        assert world.step(request, 3)
        assert world.allocator.num_slots_held(request) == held
        assert world.step(request, 15)
        assert world.allocator.num_slots_held(request) == 20


# Eviction and retention.


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


# The host tier.


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
    assert world.allocator._pool.host.num_free == 2


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
    assert world.allocator._pool.host.blank == [8]


# Bad use.


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


# Corruption.


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


# Against oracles.


class QueueMachine(RuleBasedStateMachine):
    """The queue against a list that is sorted whenever somebody asks."""

    @initialize()
    def start(self) -> None:
        self.queue: PriorityQueue[int] = PriorityQueue()
        self.items: list[dict[str, Any]] = []
        self.now, self.count = 0.0, 0

    @rule(
        priority=st.integers(0, 3), duration=st.none() | st.integers(1, 4), ready=st.booleans(), repeat=st.sampled_from([1, 1, 40])
    )
    def add(self, priority: int, duration: int | None, ready: bool, repeat: int) -> None:
        for _ in range(repeat):
            self.queue.add(self.count, Retention(priority, duration), ready=ready)
            ends = None if duration is None else self.now + duration
            self.items.append({"item": self.count, "priority": priority, "ends": ends, "ready": ready})
            self.count += 1

    @precondition(lambda self: self.items)
    @rule(data=st.data(), count=st.integers(1, 30))
    def remove(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.items))):
            gone = self.items.pop(data.draw(st.integers(0, len(self.items) - 1)))
            assert self.queue.remove(gone["item"]).priority == gone["priority"]

    @precondition(lambda self: self.items)
    @rule(data=st.data(), ready=st.booleans())
    def set_ready(self, data: st.DataObject, ready: bool) -> None:
        item = data.draw(st.sampled_from(self.items))
        item["ready"] = ready
        self.queue.set_ready(item["item"], ready=ready)

    @rule(step=st.integers(0, 3))
    def advance(self, step: int) -> None:
        self.now += step
        self.queue.advance(self.now)
        expired = [item for item in self.items if item["ends"] is not None and item["ends"] <= self.now]
        for item in sorted(expired, key=lambda item: (item["ends"], self.items.index(item))):
            self.items.remove(item)
            self.items.append({**item, "priority": 35, "ends": None})

    @invariant()
    def agree(self) -> None:
        self.queue.check_integrity()
        ready = [item for item in self.items if item["ready"]]
        expected = min(ready, key=lambda item: item["priority"])["item"] if ready else None  # the first of the lowest
        assert self.queue.lowest() == expected
        assert sorted(self.queue) == sorted(item["item"] for item in self.items)
        assert len(self.queue._heap) <= 2 * self.count + 65


def test_the_queue_agrees_with_a_sorted_list() -> None:
    run_state_machine_as_test(QueueMachine, settings=settings(max_examples=60, stateful_step_count=25))


def test_the_heap_of_a_queue_does_not_grow_with_the_number_of_changes() -> None:
    queue: PriorityQueue[int] = PriorityQueue()
    queue.add(0, Retention(1), ready=True)
    for _ in range(1000):
        queue.add(1, Retention(50, 1000), ready=True)
        queue.set_ready(1, ready=False)
        queue.set_ready(1, ready=True)
        queue.check_integrity()
        queue.remove(1)
    assert len(queue._heap) + len(queue._expiries) < 150
    assert queue.lowest() == 0


def shared(one: list[int], other: list[int]) -> int:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


TOKENS = st.lists(st.integers(0, 2) | st.sampled_from([255, 256, 65536]), max_size=9)


@settings(max_examples=200)
@given(stored=st.lists(TOKENS, max_size=8), wanted=TOKENS, size=st.sampled_from([2, 4]))
def test_a_match_is_the_longest_common_prefix_of_all_that_is_stored(stored: list[list[int]], wanted: list[int], size: int) -> None:
    tree, block = ReuseTree(block_size=size), 0
    for tokens in stored:
        node = None
        for key in tree.keys(np.array(tokens, np.int32).tobytes()):
            node = node or tree.root("")
            node, block = node.children.get(key) or tree.insert(node, key, block), block + 1
    tree.check_integrity()
    match = tree.match("", np.array(wanted, np.int32))
    assert len(match.path) * size + match.num_partial == max((shared(tokens, wanted) for tokens in stored), default=0)
    found = [
        token for node in [*match.path, *([match.partial] if match.partial else [])] for token in np.frombuffer(node.key, np.int32)
    ]
    assert shared(found, wanted) == len(match.path) * size + match.num_partial


# Under random use.

PREFIXES = [seq(0, 24), [*seq(0, 8), *seq(50, 16)], [*seq(0, 6), *seq(70, 18)], [*seq(0, 2), *seq(90, 22)], seq(30, 24)]


class Machine(RuleBasedStateMachine):
    """Drives the allocator as a scheduler does, beside a shadow of the memory of GPU and host."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([2, 4]),
        host_blocks=st.sampled_from([0, 1, 3, 8]),
        reserve_full_isl=st.booleans(),
        state_slots=st.sampled_from([0, 0, 3]),
    )
    def start(self, num_blocks: int, block_size: int, host_blocks: int, reserve_full_isl: bool, state_slots: int) -> None:
        self.pool = KVPoolSettings(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=4,
            max_model_len=24,
            reserve_full_isl=reserve_full_isl,
            state_slots=state_slots,
            enable_prefix_caching=True,
            offload_blocks=host_blocks,
        )
        self.allocator = TensorRTLLMAllocator(self.pool)
        self.memory = ShadowMemory(self.allocator)
        self.live: list[KVRequest] = []
        self.waiting: list[KVRequest] = []
        self.count, self.copied = 0, 0

    def ask(self, request: KVRequest, num_new: int) -> Grant | None:
        allocator, before = self.allocator, state_of(self.allocator)
        grant = allocator.allocate_slots(request, num_new)
        if grant is None:
            check_unchanged(before, state_of(allocator))
            return None
        self.copied += int((grant.copies >= allocator.num_slots).any(1).sum()) if grant.copies.size else 0
        self.memory.write(request, self.identities(request), grant, num_new)
        return grant

    def identities(self, request: KVRequest) -> Any:
        return prefix_identities(request.token_ids if request.token_ids.size else np.arange(40), request.namespace)

    @precondition(lambda self: len(self.live) < 4)
    @rule(
        prefix=st.sampled_from(PREFIXES),
        tokens=st.lists(st.integers(0, 1), max_size=2),
        length=st.integers(1, 20),
        chunk=st.integers(1, 20),
        salt=st.sampled_from(["", "", "", "x"]),
        private=st.sampled_from([False, False, False, True]),
        priority=st.sampled_from([0, 0, 10, 29, 30, 60]),
        computed=st.booleans(),
    )
    def admit(
        self, prefix: list[int], tokens: list[int], length: int, chunk: int, salt: str, private: bool, priority: int, computed: bool
    ) -> None:
        ids = np.array([*prefix[:length], *tokens], np.int32)
        self.count += 1
        request = KVRequest(request_id=self.count, num_tokens=ids.size, namespace=salt, priority=priority)
        request.token_ids = ids[:0] if private else ids
        self.begin(request, chunk, computed)

    @precondition(lambda self: self.waiting and len(self.live) < 4)
    @rule(chunk=st.integers(1, 20))
    def come_again(self, chunk: int) -> None:
        self.begin(self.waiting.pop(0), chunk, computed=True)

    def begin(self, request: KVRequest, chunk: int, computed: bool) -> None:
        cached = self.allocator.get_computed_tokens(request)
        assert 0 <= cached < request.num_tokens
        assert cached == self.longest_stored(request)
        grant = self.ask(request, min(chunk, request.num_tokens - cached))
        if grant is None:
            return
        assert grant.num_cached_tokens == cached
        self.live.append(request)
        if computed:
            self.allocator.note_computed(request)

    def longest_stored(self, request: KVRequest) -> int:
        wanted = request.token_ids.tolist()[:-1]
        nodes = [node for node in self.allocator._pool.tree.nodes() if node.namespace == request.namespace]
        paths = ([token for each in node.path() for token in np.frombuffer(each.key, np.int32)] for node in nodes)
        return max((shared(path, wanted) for path in paths), default=0)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_new=st.integers(1, 6), token=st.integers(0, 2), computed=st.booleans())
    def grow(self, data: st.DataObject, num_new: int, token: int, computed: bool) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.allocator.note_computed(request)
        if request.num_computed_tokens == request.num_tokens:
            if request.num_tokens == self.pool.max_model_len:
                return
            request.num_tokens += 1
            if request.token_ids.size:
                request.token_ids = np.append(request.token_ids, np.int32(token))
            self.memory.identities[request] = (self.identities(request),)
        if self.ask(request, min(num_new, request.num_tokens - request.num_computed_tokens)) is not None and computed:
            self.allocator.note_computed(request)

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        bounds=st.lists(st.integers(0, 24), unique=True, max_size=3),
        priority=st.integers(0, 100),
        duration=st.none() | st.integers(1, 5),
    )
    def retain(self, data: st.DataObject, bounds: list[int], priority: int, duration: int | None) -> None:
        ends = sorted(bounds)
        ranges = [
            RetentionRange(first=a, last=b, priority=priority, duration=duration) for a, b in zip(ends, ends[1:], strict=False)
        ]
        self.allocator.set_retention(data.draw(st.sampled_from(self.live)), ranges)

    @rule(step=st.integers(0, 3))
    def advance(self, step: int) -> None:
        self.allocator.advance(self.allocator.now + step)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), preempt=st.booleans())
    def end(self, data: st.DataObject, preempt: bool) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        self.memory.forget(request)
        if preempt:
            self.allocator.preempt(request)
            self.waiting.append(request)
        else:
            self.allocator.free(request)

    @rule(prefix=st.sampled_from(PREFIXES), length=st.integers(1, 24))
    def what_can_fit_fits_when_nobody_holds_anything(self, prefix: list[int], length: int) -> None:
        if self.live or self.allocator.admission_slots(length, 1) is None:
            return
        request = KVRequest(request_id="alone", num_tokens=length, token_ids=np.array(prefix[:length], np.int32))
        self.begin(request, length, computed=True)
        assert self.live == [request]

    @invariant()
    def laws(self) -> None:
        self.memory.check()
        host = int((self.memory.contents[self.allocator.num_slots :] != 0).sum())
        assert host <= self.allocator.offloaded_slots
        assert self.copied == self.allocator.offloaded_slots + self.allocator.onboarded_slots


def test_all_laws_hold_under_random_use() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=120, stateful_step_count=40))


def test_what_is_registered() -> None:
    allocator: Allocator = ALLOCATORS.load("tensorrt-llm")(POOL)
    assert isinstance(allocator, TensorRTLLMAllocator)
    assert (allocator.name, allocator.placement, allocator.unit_slots, allocator.usable_slots) == ("tensorrt-llm", "block", 4, 32)


def test_an_empty_pool_gives_its_blocks_in_order() -> None:
    pool = ReusePool(num_blocks=3, host_blocks=1, block_size=2)
    assert [pool.take([]) for _ in range(3)] == [0, 1, 2]
    pool.check_integrity([0, 1, 2])
