"""What vAttention does between steps: pages mapped ahead, and unmapped."""

from vattention_requests import PAGE, admitted, allocator, free, grow, mapped, row

from pagedkv.virtual_pages import MappingCounts


def test_premap_takes_unmapped_pages_and_the_step_need_not_wait() -> None:
    vattention = allocator(num_pages=4)
    (first,) = admitted(vattention, 4)
    assert [vattention.premap(first, 4), vattention.premap(first, 4), vattention.premap(first, 12)] == [1, 0, 2]
    assert (vattention.num_slots_held(first), vattention.free_slots) == (PAGE, 3 * PAGE)
    assert grow(vattention, first, 12)
    assert vattention.counts == MappingCounts(mapped=1, map_calls=1, premapped=3)
    assert vattention.premap(first, 1) == 0  # nothing is left to map


def test_premap_ends_at_the_end_of_the_row() -> None:
    vattention = allocator(max_model_len=7)
    (first,) = admitted(vattention, 4)
    assert vattention.premap(first, 99) == 1


def test_the_background_maps_for_the_next_token_of_all_and_reclaims_for_it() -> None:
    vattention = allocator(num_pages=5)
    *running, gone = admitted(vattention, 4, 4, 4)
    free(vattention, gone)
    (third,) = admitted(vattention, 8)
    assert (mapped(vattention), vattention.pages.num_unmapped) == ([1, 1, 2, 0], 1)
    vattention.preempt(third)
    vattention.manage_pages()  # two pages are due, one is unmapped, and row 2 has two that it does not need
    assert mapped(vattention) == [2, 2, 0, 0]
    assert (vattention.counts.premapped, vattention.counts.unmapped, vattention.counts.reclaimed) == (2, 2, 0)
    calls = vattention.counts.map_calls
    assert all(grow(vattention, request, 1) for request in running)
    assert vattention.counts.map_calls == calls


def test_the_background_maps_nothing_if_the_next_tokens_cannot_all_have_a_page() -> None:
    vattention = allocator(num_pages=3)
    admitted(vattention, 4, 4)
    vattention.manage_pages()
    assert mapped(vattention)[:2] == [1, 1]
    assert vattention.counts.premapped == 0


def test_the_background_looks_ten_tokens_ahead_until_two_pages_are_mapped() -> None:
    vattention = allocator(num_pages=12)
    admitted(vattention, 1, 2, 3, 4)  # the last needs a page for its next token, the third for the one after
    vattention.manage_pages()
    assert mapped(vattention) == [1, 1, 2, 2]
    vattention.manage_pages()
    assert mapped(vattention) == [2, 2, 2, 2]


def test_the_background_serves_the_rows_in_order() -> None:
    vattention = allocator(num_pages=3)
    gone, _ = admitted(vattention, 3, 3)
    free(vattention, gone)
    (late,) = admitted(vattention, 3)
    assert row(vattention, late) == 0
    vattention.manage_pages()  # both need a page for the token after the next, and there is one
    assert mapped(vattention) == [2, 1, 0, 0]


def test_the_background_unmaps_one_page_of_an_idle_row_if_no_next_token_needs_one() -> None:
    vattention = allocator(num_pages=12)
    full, *gone = admitted(vattention, 4, 8, 8, 8)
    free(vattention, *gone)
    vattention.manage_pages()
    assert mapped(vattention)[1:] == [2, 2, 2]  # a page was needed
    assert grow(vattention, full, 1)
    for expected in ([2, 2, 1], [2, 2, 0], [2, 1, 0], [2, 0, 0], [2, 0, 0]):  # the first idle row is next in line: it keeps them
        vattention.manage_pages()
        assert mapped(vattention)[1:] == expected
    assert vattention.counts.unmapped == 4
