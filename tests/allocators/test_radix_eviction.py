"""SGLang's memory as an allocator: who is evicted for whom, and what admissions leave free."""

from collections.abc import Sequence

import pytest
from radix_requests import contents, everything, grow, known, pool, run, serve

from pagedkv.errors import ConfigError
from pagedkv.kv_request import KVRequest


def test_eviction_is_on_demand_and_takes_whole_leaves() -> None:
    allocator = pool(10)
    serve(allocator, known(1, 2, 3, 4))
    serve(allocator, known(5, 6, 7))
    grow(allocator, known(8, 9, 10))
    assert (allocator.cache.slots.num_free_slots, allocator.cached_slots().size) == (0, 7)  # the free list is used up first
    one = known(11)
    grow(allocator, one)
    assert (allocator.cache.slots.num_free_slots, allocator.cached_slots().size) == (3, 3)  # the least recent leaf, all of it
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, 5)) == 0
    assert allocator.get_computed_tokens(known(5, 6, 7, 8)) == 3


def test_eviction_makes_up_the_shortfall_only() -> None:
    allocator = pool(6)
    for token in range(4):
        serve(allocator, known(token))
    grow(allocator, known(9, 9, 9))  # two slots are free, the third comes from the tree
    assert allocator.cached_slots().size == 3


def test_a_request_that_ends_before_its_cached_tokens_are_counted_loses_none() -> None:
    allocator = pool(8)
    serve(allocator, known(1, 2, 3))
    request = known(1, 2, 3, 4)
    assert allocator.allocate_slots(request, 1) is not None
    allocator.note_computed(request)
    assert allocator.cached_slots().size == 0
    allocator.free(request)
    assert (allocator.free_slots, allocator.cached_slots().size) == (8, 3)
    allocator.check_integrity()


def test_more_new_tokens_than_known_ones_are_no_way_around_the_pool() -> None:
    """Drafts, for example: the gate is for known tokens, but all that is asked for must fit."""
    allocator = pool(4)
    assert allocator.allocate_slots(known(1, 2), 5) is None
    assert allocator.allocate_slots(known(1, 2), 4) is not None


def test_growth_evicts_too() -> None:
    allocator = pool(6, block_size=2)
    serve(allocator, known(*range(8)))
    running = known(9, 9, 9, 9)
    run(allocator, running, 7, 7)
    assert (allocator.cache.slots.num_free_slots, allocator.cached_slots().size) == (6, 0)
    allocator.check_integrity()


def test_what_somebody_holds_stays() -> None:
    """A locked path, and so the whole prefix of a live request, is no candidate for eviction."""
    allocator = pool(8)
    serve(allocator, known(1, 2, 3, 4))
    holder = known(1, 2, 9)
    assert grow(allocator, holder) == 2  # the match splits the node; 3 and 4 are not held
    assert allocator.free_slots == 5
    before = everything(allocator)
    assert allocator.allocate_slots(KVRequest(request_id="big", num_tokens=6), 6) is None
    assert everything(allocator) == before
    assert allocator.allocate_slots(KVRequest(request_id="fits", num_tokens=5), 5) is not None
    assert allocator.slots_held(holder).tolist()[:2] == [1, 2]
    assert allocator.get_computed_tokens(known(1, 2, 3, 4)) == 2
    allocator.check_integrity()


def test_an_admission_does_not_evict_its_own_prefix() -> None:
    """The matched node is locked before room is made: it is the least recent, but it is needed."""
    allocator = pool(8, eviction="mru")
    serve(allocator, known(1, 2, 3, 4))
    serve(allocator, known(5, 6, 7))
    assert grow(allocator, known(1, 2, 3, 4, 8, 9, 10)) == 4
    assert allocator.get_computed_tokens(known(5, 6, 7, 8)) == 0
    allocator.check_integrity()


def test_a_lookup_is_a_use_and_a_refused_admission_is_none() -> None:
    allocator = pool(10)
    serve(allocator, known(1, 2, 3, 4))
    serve(allocator, known(5, 6))
    grow(allocator, known(7, 7, 7, 7))
    before = everything(allocator)
    tall = known(1, 2, 9, 9, 9, 9, 9)
    assert allocator.allocate_slots(tall, 5) is None  # has 4 once its prefix is locked
    assert everything(allocator) == before
    stored, nodes = contents(allocator), len(list(allocator.cache.tree.root.below()))
    assert allocator.get_computed_tokens(tall) == 2
    assert contents(allocator) == stored
    assert len(list(allocator.cache.tree.root.below())) == nodes + 1  # split where the match ends
    grow(allocator, known(8))
    assert allocator.get_computed_tokens(known(5, 6, 7)) == 0  # these went: 1 and 2 are more recent, as are 3 and 4 by the split
    allocator.check_integrity()


def test_a_refused_growth_leaves_no_trace() -> None:
    allocator = pool(3, block_size=2)
    first, second = known(1, 1), known(2, 2, 2, 2)
    run(allocator, first, 5)
    run(allocator, second)
    before = everything(allocator)
    assert allocator.allocate_slots(first, 1) is None
    assert everything(allocator) == before


def test_the_gate_and_the_watermark_hold_for_admissions_only() -> None:
    wishes = [(9, 8), (9, 1), (8, 1)]  # known tokens, new tokens; int(0.2 * 11) = 2 of 10 blocks are kept
    for gate, granted in ((True, [False, False, True]), (False, [True, True, True])):
        for (num_known, new), expected in zip(wishes, granted, strict=True):
            allocator, request = pool(10, watermark=0.2, reserve_full_isl=gate), known(*range(num_known))
            assert (allocator.allocate_slots(request, new, has_scheduled_reqs=True) is not None) == expected
            assert pool(10, watermark=0.2, reserve_full_isl=gate).allocate_slots(known(*range(10)), 10) is not None
    request.num_computed_tokens = 1
    assert allocator.allocate_slots(request, 9, has_scheduled_reqs=True) is not None  # growth may use it all
    assert allocator.free_slots == 0
    assert pool(10, watermark=0.2, reserve_full_isl=False).allocate_slots(known(*range(9)), 9, has_scheduled_reqs=True) is None


def test_a_gate_counts_no_cached_token() -> None:
    allocator = pool(6)
    serve(allocator, known(1, 2, 3, 4))
    holder = known(1, 2, 3, 4, 5)
    grow(allocator, holder)
    assert grow(allocator, known(1, 2, 3, 4, 6, 7)) == -1
    assert grow(allocator, known(1, 2, 3, 4, 6)) == 4


def test_state_takes_whole_blocks_and_is_never_stored() -> None:
    allocator = pool(6, block_size=2, state_slots=3)
    assert allocator.state_slots == 4
    assert (allocator.admission_slots(7, 2), allocator.admission_slots(7, 3)) == (0, None)
    first = known(1, 2, 3)
    grow(allocator, first)
    assert allocator.free_slots == 12 - 4 - allocator.num_slots_held(first)
    assert grow(allocator, known(5)) == -1
    allocator.free(first)
    assert (allocator.free_slots, allocator.cached_slots().size) == (12, 2)
    allocator.check_integrity()


def test_a_request_counts_one_hit_however_often_it_stores() -> None:
    """Else every long prompt would be a used one to slru. Source: SGLang's pull requests 8533 and 30689."""
    allocator = pool(20, eviction="slru")
    once = known(*range(6))
    for _ in range(3):
        grow(allocator, once, 2)
        allocator.note_computed(once)
    allocator.free(once)
    assert {node.hit_count for node in allocator.cache.tree.root.below()} == {1}
    serve(allocator, known(*range(6), 7, 8))
    assert sorted((node.depth, node.hit_count) for node in allocator.cache.tree.root.below()) == [(2, 2), (4, 2), (6, 2), (8, 1)]


def test_the_policy_of_the_settings_decides() -> None:
    def survivors(eviction: str, priorities: Sequence[int] = (0, 0, 0)) -> list[int]:
        allocator = pool(6, eviction=eviction)
        for token, priority in zip((1, 2, 3), priorities, strict=True):
            serve(allocator, known(token, token, priority=priority))
        allocator.get_computed_tokens(known(1, 1, 9))
        grow(allocator, known(8))
        return [token for token in (1, 2, 3) if allocator.get_computed_tokens(known(token, token, 9))]

    assert (survivors("lru"), survivors("mru"), survivors("fifo"), survivors("filo")) == ([1, 3], [2, 3], [2, 3], [1, 2])
    assert survivors("priority", (2, 3, 1)) == [1, 2]
    with pytest.raises(ConfigError, match="eviction policy"):
        pool(6, eviction="rlu")
