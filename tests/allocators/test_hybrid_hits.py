"""Groups of layers over one pool: what each kind still reads, and which prefix is a hit for all of them."""

from typing import Any

import numpy as np
import pytest
from hybrid_requests import FULL, STATE, chunk, grow, is_hit, manager, request, window
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.group_rules import GroupRule


@pytest.mark.parametrize(
    ("kind", "computed", "skipped", "first"),
    [
        (FULL, 63, 0, 0),
        (window(6), 5, 0, 0),
        (window(6), 13, 8, 2),  # max(0, 13 - 6 + 1)
        (window(1), 8, 8, 2),
        (chunk(8), 7, 0, 0),
        (chunk(8), 17, 16, 4),
        (chunk(6), 17, 12, 3),
        (STATE, 8, 7, 1),  # the state behind token 7 is in block 1
        (STATE, 9, 8, 2),
    ],
)
def test_tokens_that_no_query_reads_any_more(kind: GroupRule, computed: int, skipped: int, first: int) -> None:
    assert (kind.num_skipped_tokens(computed), kind.first_block(computed)) == (skipped, first)


RULES = st.one_of(
    st.just(FULL),
    st.just(STATE),
    st.builds(window, st.integers(1, 20)),
    st.builds(chunk, st.integers(1, 20)),
)


@given(kind=RULES, cached=st.lists(st.booleans(), min_size=12, max_size=12), most=st.integers(0, 48), blocks=st.integers(1, 3))
def test_a_hit_is_the_longest_prefix_behind_which_all_that_is_read_is_cached(
    kind: GroupRule, cached: list[bool], most: int, blocks: int
) -> None:
    lookups = 0

    def find_run(first: int, last: int) -> Any:
        nonlocal lookups
        run = next((i for i in range(first, last) if not cached[i]), last) - first
        lookups += run + 1
        return np.arange(first, first + run, dtype=np.int32) + 1

    expected = max(n for n in range(0, most + 1, 4 * blocks) if is_hit(kind, n, cached.__getitem__))
    length, hits = kind.longest_hit(most, 4 * blocks, find_run)
    assert length == expected
    assert hits.tolist() == list(range(kind.first_block(length) + 1, length // 4 + 1))
    assert lookups <= 3 * (12 + 1)  # each block is looked at a few times, however often the search begins anew


@pytest.mark.parametrize(
    ("kind", "cached", "num_tokens"),
    [
        (FULL, "xx.x.", 8),
        (window(6), "xx.xx", 20),  # cdiv(6 - 1, 4) = 2 blocks that end at the hit
        (window(6), "xx.x.", 8),  # a block alone is too little; the first two are enough
        (window(6), "x..x.", 4),  # a shorter run from block 0 counts too
        (window(5), "..xx.", 16),  # cdiv(5 - 1, 4) = 1
        (chunk(12), "...xx", 20),  # the current chunk is all that is needed
        (chunk(12), "...x.", 16),
        (chunk(12), "....x", 12),  # its second block alone is too little; at its start nothing is needed
        (chunk(32), "xx.xx", 8),
        (STATE, ".x.x.", 16),  # the right-most state
        (STATE, ".....", 0),
    ],
)
def test_hits_of_each_kind(kind: GroupRule, cached: str, num_tokens: int) -> None:
    def find_run(first: int, last: int) -> Any:
        return np.ones(len(cached[first:last].partition(".")[0]), np.int32)

    assert kind.longest_hit(20, 4, find_run)[0] == num_tokens


def test_all_groups_agree_on_a_hit() -> None:
    """The window lost the block that 16 tokens need; the full group, which has all four, gives way to what is left of it."""
    cache, first = manager(window(5), FULL, num_blocks=11), request(range(17))
    grow(cache, first, 17)
    cache.free(first)
    assert cache.free_queue().tolist() == [10, 5, 4, 3, 2, 1, 9, 8, 7, 6]
    assert cache.pool.get_new_blocks(3) is not None
    hits, num_tokens = cache.get_computed_blocks(request(range(17), "again"))
    assert num_tokens == 12
    assert [hit.tolist() for hit in hits] == [[0, 0, 3], [6, 7, 8]]
    assert cache.pool.get_new_blocks(4) is not None  # the other three of the window, and the tail of the full group
    assert cache.get_computed_blocks(request(range(17), "again"))[1] == 0


def test_a_group_that_agreed_is_asked_again() -> None:
    """Both have something for 16 and 12 tokens, but only for 8 do both."""
    cache, guest = manager(window(5), window(5)), request(range(17))
    for group, cached in enumerate(([1, 3], [1, 2])):
        for block in cached:
            taken = cache.pool.get_new_blocks(1)
            assert taken is not None
            cache.pool.cache_full_blocks(taken, cache.groups[group].keys(guest, block, block + 1))
    hits, num_tokens = cache.get_computed_blocks(guest)
    assert (num_tokens, [hit.tolist() for hit in hits]) == (8, [[0, 1], [0, 3]])


def test_groups_have_keys_of_their_own() -> None:
    """Blocks of the same tokens in two groups are not the same: only the window's content is in the window's blocks."""
    cache, first = manager(FULL, window(6)), request(range(9))
    grow(cache, first, 9)
    hits, _ = cache.get_computed_blocks(request(range(9), "again"))
    assert [hit.tolist() for hit in hits] == [[1, 2], [4, 5]]
    assert cache.pool.cache.lookup(first.block_keys).tolist() == [1, 2]  # the first group's are those of a single group


def test_a_hit_ends_at_a_multiple_of_all_block_sizes() -> None:
    cache = manager(FULL, GroupRule(kind="full", block_size=12), window(6, block_size=8))
    grow(cache, request(range(64)), 64)
    assert cache.alignment == 24
    assert cache.get_computed_blocks(request(range(49), "a"))[1] == 48
    hits, num_tokens = cache.get_computed_blocks(request(range(48), "b"))  # the last token is always computed
    assert (num_tokens, [hit.size for hit in hits]) == (24, [6, 2, 3])


def test_a_longer_block_is_known_by_all_its_tokens() -> None:
    cache, tokens = manager(GroupRule(kind="full", block_size=8)), list(range(16))
    grow(cache, request(tokens), 16)
    tokens[13] = 99  # in the second half of block 1
    assert cache.get_computed_blocks(request([*tokens, 1], "other"))[1] == 8


def test_where_nothing_before_a_chunk_is_read_nothing_needs_to_be_cached() -> None:
    cache = manager(chunk(8), caching=True)
    hits, num_tokens = cache.get_computed_blocks(request(range(20)))
    assert (num_tokens, hits[0].tolist()) == (16, [0, 0, 0, 0])
