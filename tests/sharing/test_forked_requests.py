"""Forks share blocks until one of them writes: copy on write."""

from itertools import count
from typing import Any

import pytest
from cache_owner import fork, goes_on, pool, request, serve

from pagedkv.allocation import Forkable
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.block_grant import BlockCopy
from pagedkv.errors import ConfigError
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import ShadowMemory, check_unchanged, prefix_identities, state_of


def family(cache: KVCacheManager, tokens: Any, *names: str) -> list[KVRequest]:
    """Return a served request and its forks."""
    parent = request(tokens, "parent")
    serve(cache, parent)
    children = [request(tokens, name) for name in names]
    for child in children:
        fork(cache, parent, child)
    cache.check_integrity()
    return [parent, *children]


def test_a_fork_holds_the_same_blocks_and_takes_none() -> None:
    cache = KVCacheManager(pool())
    parent, child = family(cache, range(6), "child")
    assert cache.block_table(child).tolist() == cache.block_table(parent).tolist() == [1, 2]
    assert child.num_computed_tokens == 6
    assert cache.num_free_blocks == 6
    cache.free(parent)
    assert cache.num_free_blocks == 6
    cache.free(child)
    assert cache.num_free_blocks == 8


@pytest.mark.parametrize("enable_caching", [False, True])
def test_the_first_writer_gets_a_copy_and_the_last_one_none(enable_caching: bool) -> None:
    cache = KVCacheManager(pool(), enable_caching=enable_caching)
    parent, child = family(cache, range(6), "child")
    for live, last in ((parent, 7), (child, 8)):
        goes_on(live, [last])
    assert serve(cache, child) == [1, 3]
    assert list(cache.take_copies()) == [BlockCopy(2, 3, 2)]
    assert serve(cache, parent) == [1, 2]
    assert not cache.take_copies()


def test_a_full_block_needs_no_copy_and_neither_does_an_empty_one() -> None:
    cache = KVCacheManager(pool())
    parent, child = request(range(4), "parent"), request(range(4), "child")
    serve(cache, parent, num_lookahead_tokens=4)
    fork(cache, parent, child)
    goes_on(child, [9])
    assert serve(cache, child) == [1, 3]  # block 2 was for drafts of the parent: nothing of the child is in it
    assert not cache.take_copies()


def test_a_block_that_the_parent_keeps_for_later_is_shared_until_it_is_written() -> None:
    cache = KVCacheManager(pool())
    parent, child = request(range(6), "parent"), request(range(6), "child")
    serve(cache, parent, num_lookahead_tokens=6)
    fork(cache, parent, child)
    goes_on(child, [9])
    assert serve(cache, child) == [1, 4, 3]
    assert list(cache.take_copies()) == [BlockCopy(2, 4, 2)]
    goes_on(child, [9])
    assert serve(cache, child, num_lookahead_tokens=4) == [1, 4, 5]  # block 4 is its own by now, and stays where it is
    assert not cache.take_copies()


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_a_full_block_is_not_written_though_its_key_came_from_another_fork(eviction: str) -> None:
    """Two tokens are drafts. They turn out right for the parent only, which registers the block and goes."""
    cache = KVCacheManager(pool(eviction=eviction))
    parent, child = request(range(6), "parent"), request(range(6), "child")
    serve(cache, parent, 8)
    fork(cache, parent, child)
    goes_on(parent, [6, 7, 8])
    serve(cache, parent)
    cache.free(parent)
    goes_on(child, [66, 77])
    child.num_computed_tokens = 6
    assert serve(cache, child) == [1, 3]
    assert list(cache.take_copies()) == [BlockCopy(2, 3, 2)]
    assert cache.get_computed_blocks(request(range(9)))[0].tolist() == [1, 2]
    assert cache.get_computed_blocks(child)[0].tolist() == [1]
    cache.free(child)
    cache.check_integrity()


def test_one_key_on_a_shared_full_block_is_enough() -> None:
    """The drafts turn out right for both: the block carries their common key once, besides a block of somebody else."""
    cache = KVCacheManager(pool())
    serve(cache, request(range(8), "other"))
    parent, child = request(range(6), "parent"), request(range(6), "child")
    serve(cache, parent, 4)
    fork(cache, parent, child)
    for live in (parent, child):
        goes_on(live, [6, 7, 8])
        serve(cache, live)
        assert cache.block_table(live)[:2].tolist() == [1, 3]
    assert not cache.take_copies()


def test_replacements_count_and_a_refusal_changes_nothing() -> None:
    cache = KVCacheManager(pool(num_blocks=4))
    parent, child = family(cache, range(6), "child")
    for live in (parent, child):
        goes_on(live, [1, 2, 3])
    before = state_of(cache)
    assert serve(cache, child) is None  # one block to go on in, one to replace the shared one, and one is free
    check_unchanged(before, state_of(cache))
    assert serve(cache, child, 2) == [1, 3]
    assert serve(cache, parent) is None
    cache.free(child)
    assert serve(cache, parent) == [1, 2, 3]


def test_beams_part_and_go_and_every_one_finds_what_it_computed() -> None:
    """Beam search: each step forks the winners, drops the losers, and every beam writes a token of its own."""
    allocator = PagedAllocator(pool(num_blocks=40, enable_prefix_caching=True, max_num_seqs=8))
    assert isinstance(allocator, Forkable)
    memory, names = ShadowMemory(allocator), count()

    def write(live: KVRequest, num_tokens: int) -> int:
        grant = allocator.allocate_slots(live, num_tokens)
        assert grant is not None
        memory.write(live, prefix_identities(live.token_ids, ""), grant, num_tokens)
        return len(grant.copies)

    def beam_like(parent: KVRequest) -> KVRequest:
        child = request(parent.token_ids, f"beam {next(names)}")
        allocator.fork(parent, child)
        memory.fork(parent, child, prefix_identities(child.token_ids, ""))
        return child

    beams, copied = [request(range(6), "first")], 0
    write(beams[0], 6)
    beams += [beam_like(beams[0]) for _ in range(3)]
    for step in range(20):
        for i, beam in enumerate(beams):
            goes_on(beam, [100 * i + step])
            memory.identities[beam] = (prefix_identities(beam.token_ids, ""),)
            copied += write(beam, 1)
        memory.check()
        winners, losers = beams[step % 3 : step % 3 + 2], [*beams[: step % 3], *beams[step % 3 + 2 :]]
        for loser in losers:
            allocator.free(loser)
            memory.forget(loser)
        beams = [child for winner in winners for child in (winner, beam_like(winner))]
        memory.check()
    assert copied > 40
    for beam in beams:
        allocator.free(beam)
        memory.forget(beam)
    memory.check()


def test_a_fork_that_cannot_be_is_told_and_changes_nothing() -> None:
    cache = KVCacheManager(pool(max_num_seqs=2))
    parent, child = family(cache, range(6), "child")
    stateful, only = KVCacheManager(pool(state_slots=1)), request(range(6))
    serve(stateful, only)
    before = state_of((cache, stateful))
    bad = {
        "holds no blocks": (cache, request(range(6)), request(range(6))),
        "holds blocks already": (cache, parent, child),
        "7 known tokens: needs the 6": (cache, parent, request(range(7))),
        "its keys are not those": (cache, parent, request(range(1, 7))),
        "2 requests hold slots already": (cache, parent, request(range(6))),
        "cannot share a state": (stateful, only, request(range(6))),
    }
    for message, (manager, one, other) in bad.items():
        with pytest.raises(ConfigError, match=message):
            manager.fork(one, other)
    check_unchanged(before, state_of((cache, stateful)))
