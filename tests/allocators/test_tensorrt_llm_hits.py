"""TensorRT-LLM's block manager: what is stored, when, and what a request finds of it."""

from dataclasses import replace

import pytest
from tensorrt_llm_world import POOL, World, seq


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
