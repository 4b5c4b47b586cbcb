"""SGLang's memory as an allocator: who shares what."""

import numpy as np
import pytest
from radix_requests import grow, known, pool, run, serve

from pagedkv.kv_request import KVRequest


def test_the_first_writer_wins_and_the_duplicates_are_freed() -> None:
    allocator = pool(20, block_size=2)
    first, second = known(1, 2, 3, 4, 5), known(1, 2, 3, 4, 6, 7)
    assert grow(allocator, first) == grow(allocator, second) == 0  # in one step: nothing is stored yet
    own = allocator.slots_held(second).tolist()
    free = allocator.free_slots
    allocator.note_computed(first)
    assert allocator.free_slots == free
    allocator.note_computed(second)
    assert allocator.slots_held(second).tolist() == allocator.slots_held(first)[:4].tolist() + own[4:]
    assert allocator.free_slots == free + 4
    assert allocator.cache.slots.free_list()[:2].tolist() == [own[0] // 2, own[2] // 2]  # at the front, in order
    allocator.check_integrity()


@pytest.mark.parametrize(("block_size", "cached"), [(1, 7), (2, 6), (4, 4), (8, 0), (3, 6)])
def test_hits_are_whole_blocks_and_the_last_token_is_always_computed(block_size: int, cached: int) -> None:
    allocator = pool(40, block_size=block_size)
    serve(allocator, known(*range(8)))
    assert allocator.cached_slots().size == 8 // block_size * block_size  # the unaligned tail is freed
    again = known(*range(8))
    assert allocator.get_computed_tokens(again) == cached
    assert grow(allocator, again) == cached
    allocator.note_computed(again)
    assert allocator.get_computed_tokens(known(*range(9))) == 8 // block_size * block_size
    allocator.check_integrity()


def test_each_chunk_of_a_prompt_is_shared_as_soon_as_it_is_computed() -> None:
    allocator = pool(20, block_size=2)
    first = known(*range(8))
    for chunk, cached in ((3, 2), (2, 4), (3, 6)):
        grow(allocator, first, chunk)
        allocator.note_computed(first)
        assert allocator.get_computed_tokens(known(*range(8))) == cached


def test_outputs_are_stored_at_the_end_and_not_while_decoding() -> None:
    allocator = pool(20)
    first = known(1, 2, 3)
    run(allocator, first, 7, 8, 9)  # 9 is not computed
    assert allocator.get_computed_tokens(known(1, 2, 3, 7, 8, 9, 5)) == 3
    allocator.free(first)
    assert allocator.get_computed_tokens(known(1, 2, 3, 7, 8, 9, 5)) == 5
    assert allocator.cached_slots().size == 5
    assert allocator.free_slots == 20


def test_retraction_stores_nothing() -> None:
    allocator = pool(20, block_size=2)
    victim = known(1, 2, 3, 4, 5)
    run(allocator, victim, 7, 8, 9)
    own = set(allocator.slots_held(victim)[4:].tolist())
    allocator.preempt(victim)
    assert victim.num_computed_tokens == 0
    assert sorted(allocator.cached_slots().tolist()) == [2, 3, 4, 5]  # the prompt, stored after its prefill
    assert {slot // 2 for slot in own} <= set(allocator.cache.slots.free_list().tolist())
    assert grow(allocator, victim) == 4  # it comes back for its prompt and its outputs
    allocator.note_computed(victim)
    assert allocator.cached_slots().size == 0
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, 5, 7, 8, 9, 9)) == 8  # recomputed outputs are its prompt now


def test_a_retraction_amid_the_prompt_loses_the_chunk_that_was_not_noted() -> None:
    allocator = pool(20)
    victim = known(*range(6))
    grow(allocator, victim, 2)
    allocator.note_computed(victim)
    grow(allocator, victim, 2)
    allocator.preempt(victim)
    assert allocator.get_computed_tokens(victim) == 2
    assert allocator.free_slots == 20


def test_namespaces_share_nothing() -> None:
    allocator = pool(20)
    serve(allocator, known(1, 2, 3, namespace="a"))
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, namespace="b")) == allocator.get_computed_tokens(known(1, 2, 3, 4)) == 0
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, namespace="a")) == 3


def test_without_token_ids_or_without_caching_nothing_is_shared() -> None:
    for allocator, tokens in (
        (pool(8, enable_prefix_caching=False), np.arange(4, dtype=np.int32)),
        (pool(8), np.empty(0, np.int32)),
    ):
        for _ in range(2):
            request = KVRequest(request_id="a", num_tokens=4, token_ids=tokens)
            assert grow(allocator, request) == 0
            allocator.note_computed(request)
            allocator.free(request)
            assert allocator.cache.tree.total_size == allocator.cached_slots().size == 0
            assert allocator.cache.slots.num_free_slots == 8
