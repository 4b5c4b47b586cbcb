"""Hits that end inside a block: its tokens are copied, or the block is taken over."""

from typing import Any

import pytest
from cache_owner import SIZE, fork, goes_on, pool, request, serve

from pagedkv.block_grant import BlockCopy
from pagedkv.errors import ConfigError
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import check_unchanged, state_of


def tails(num_blocks: int = 9, unit: int = 1, **more: Any) -> KVCacheManager:
    return KVCacheManager(pool(num_blocks, prefix_match_unit=unit, **more))


def test_a_tail_is_copied_into_a_block_of_its_own() -> None:
    cache, first, second = tails(), request(range(10), "first", unit=1), request([*range(7), 77, 88, 99], "second", unit=1)
    assert serve(cache, first) == [1, 2, 3]
    cache.free(first)
    assert cache.get_computed_tail(second, 1) == (2, 3)
    assert serve(cache, second) == [1, 3, 4]
    assert second.num_computed_tokens == 10
    assert list(cache.take_copies()) == [BlockCopy(2, 3, 3)]
    assert cache.get_computed_blocks(first)[0].tolist() == [1, 2]


def test_a_tail_ends_with_a_unit_and_before_the_last_token() -> None:
    cache, first = tails(unit=2), request(range(8), unit=2)
    serve(cache, first)
    for tokens, expected in (
        ([0, 1, 2, 9], (1, 2)),
        ([0, 1, 2, 3], (1, 2)),
        ([0, 1], None),
        ([0, 9, 2], None),
        ([0, 1, 2], (1, 2)),
    ):
        assert cache.get_computed_tail(request(tokens, unit=2), 0) == expected


def test_the_unfinished_block_of_a_finished_request_serves_until_it_is_reused() -> None:
    cache, first, other = tails(num_blocks=4), request(range(6), unit=1), request(range(100, 105), "other", unit=1)
    serve(cache, first)
    cache.free(first)
    follower = request([*range(6), 77], unit=1)
    assert cache.get_computed_tail(follower, 1) == (2, 2)
    assert serve(cache, other) == [2, 3]
    assert cache.get_computed_blocks(follower)[0].tolist() == [1]
    assert cache.get_computed_tail(follower, 1) is None


def test_a_tail_is_found_only_once_it_is_computed() -> None:
    cache, first, second = tails(), request(range(8), unit=1), request([0, 1, 2, 9], unit=1)
    cache.allocate_slots(first, 8)
    assert cache.get_computed_tail(second, 0) is None
    first.num_computed_tokens = 6
    cache.note_computed(first)
    assert cache.get_computed_tail(second, 0) == (1, 3)
    assert cache.get_computed_tail(request([*range(7), 9], unit=1), 1) == (2, 2)


def test_what_was_copied_is_found_when_its_source_is_gone() -> None:
    cache, parent, child = tails(num_blocks=4), request(range(2), "parent", unit=1), request(range(2), "child", unit=1)
    serve(cache, parent)
    old = request([60, 61], "old", unit=1)
    assert serve(cache, old) == [2]
    cache.free(old)
    fork(cache, parent, child)
    assert cache.get_computed_tail(old, 0) == (2, 1)
    goes_on(child, [2], unit=1)
    assert serve(cache, child) == [2]
    assert cache.get_computed_tail(old, 0) is None
    cache.free(parent)
    assert serve(cache, request([50], "other", unit=1)) == [1]
    assert cache.get_computed_tail(request([0, 9], unit=1), 0) == (2, 1)


@pytest.mark.parametrize("eviction", EVICTION_POLICIES.names())
@pytest.mark.parametrize("prompt", [8, 6])
def test_where_there_is_no_room_besides_the_source_is_taken_over(eviction: str, prompt: int) -> None:
    """A hit never makes a request fail that would fit without it. Whether the block is full or not."""
    cache = tails(num_blocks=4, eviction=eviction)
    first, second = request(range(prompt), "first", unit=1), request([*range(6), *range(90, 96)], "second", unit=1)
    serve(cache, first)
    cache.free(first)
    tail = cache.get_computed_tail(second, 1)
    assert tail == (2, 2)
    assert serve(cache, second) == [1, 2, 3]
    assert not cache.take_copies()
    assert cache.get_computed_tail(request([*range(6), 90, 1], unit=1), 1) == (2, 3)
    cache.free(second)
    cache.check_integrity()


def test_taking_a_source_over_evicts_nobody_else() -> None:
    """The gate leaves no room for a source besides, though only one block is taken now."""
    cache, prompts = tails(num_blocks=5, eviction="lfu"), [[i] * SIZE for i in range(4)]
    for tokens in prompts:
        live = request(tokens, unit=1)
        serve(cache, live)
        cache.free(live)
    assert serve(cache, request([3, 3, *range(50, 64)], unit=1), 1) == [4]
    assert [bool(cache.get_computed_blocks(request([*tokens, 9], unit=1))[1]) for tokens in prompts] == [True, True, True, False]


def test_a_refused_tail_changes_nothing_and_misuse_is_told() -> None:
    cache, first, live = tails(num_blocks=5), request(range(7), "first", unit=1), request([50], "live", unit=1)
    serve(cache, first)
    serve(cache, live)
    before, longer = state_of(cache), request([*range(6), *range(50, 58)], unit=1)
    assert serve(cache, longer) is None
    tail = cache.get_computed_tail(longer, 1)
    assert tail is not None
    short, keyless = request(range(6), unit=1), request(range(6), unit=1)
    keyless.unit_keys = keyless.unit_keys[:5]
    bad: dict[str, tuple[KVRequest, Any, Any]] = {
        "the last one must be": (short, [1], tail),
        "look them up again": (longer, [1], tail._replace(block=3)),
        "do not carry its keys": (longer, [], tail),
        "only an admission takes hits": (live, [], tail),
        "5 unit keys for 6 full units": (keyless, [], None),
    }
    for message, (who, hits, what) in bad.items():
        with pytest.raises(ConfigError, match=message):
            cache.allocate_slots(who, 1, hits, computed_tail=what)
    with pytest.raises(ConfigError, match="holds no blocks"):
        cache.note_computed(longer)
    check_unchanged(before, state_of(cache))
    with pytest.raises(ConfigError, match="prefix-match-unit is 3: needs 0, or a divisor"):
        tails(unit=3)
