"""vAttention's rules: rows keep their pages, idle rows give them up, pages are mapped ahead; and that no page has two owners."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.vattention import VAttentionAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.virtual_pages import NUM_FREE, MappingCounts, VirtualPages

PAGE = 4


def allocator(num_pages: int = 8, max_num_seqs: int = 4, max_model_len: int = 32, **settings: Any) -> VAttentionAllocator:
    pool = KVPoolSettings(
        num_blocks=num_pages, block_size=PAGE, page_tokens=PAGE, max_num_seqs=max_num_seqs, max_model_len=max_model_len, **settings
    )
    return VAttentionAllocator(pool)


def grow(vattention: VAttentionAllocator, request: KVRequest, tokens: int, *, busy: bool = False) -> bool:
    """Let `request` know and compute `tokens` more; False if they do not fit."""
    known = request.num_tokens
    request.num_tokens = max(known, request.num_computed_tokens + tokens)
    grant = vattention.allocate_slots(request, tokens, has_scheduled_reqs=busy)
    vattention.check_integrity()
    if grant is None:
        request.num_tokens = known
        return False
    assert grant.num_cached_tokens == len(grant.copies) == 0
    request.num_computed_tokens += tokens
    return True


def admitted(vattention: VAttentionAllocator, *tokens: int) -> list[KVRequest]:
    requests = [KVRequest(request_id=i, num_tokens=n) for i, n in enumerate(tokens)]
    for request, n in zip(requests, tokens, strict=True):
        assert grow(vattention, request, n)
    return requests


def free(vattention: VAttentionAllocator, *requests: KVRequest) -> None:
    for request in requests:
        vattention.free(request)
        vattention.check_integrity()


def mapped(vattention: VAttentionAllocator) -> list[int]:
    return [int(pages) for pages in vattention.pages.arrays.num_mapped]


def row(vattention: VAttentionAllocator, request: KVRequest) -> int:
    return vattention._rows[request]


def state(vattention: VAttentionAllocator) -> Any:
    pages = {name: array.tolist() for name, array in vattention.pages.arrays._asdict().items()}
    rows = {request.request_id: (request.num_computed_tokens, place) for request, place in vattention._rows.items()}
    return rows, pages


def test_slots_are_those_of_physical_pages() -> None:
    vattention = allocator()
    first, second = admitted(vattention, 5, 1)
    assert vattention.slots_held(first).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert vattention.slots_held(second).tolist() == [8, 9, 10, 11]
    assert grow(vattention, first, 4)
    assert vattention.slots_held(first).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    assert vattention.num_slots_held(first) == 12
    assert vattention.free_slots == 4 * PAGE


def test_the_pool_is_whole_pages() -> None:
    vattention = VAttentionAllocator(KVPoolSettings(num_blocks=5, block_size=4, page_tokens=8, max_model_len=17))
    assert (vattention.num_slots, vattention.usable_slots, vattention.free_slots) == (20, 16, 16)
    assert vattention.pages.arrays.table.shape == (256, 3)  # rows are max_model_len tokens, rounded up
    with pytest.raises(ConfigError, match="page-tokens of 20 or less"):
        VAttentionAllocator(KVPoolSettings(num_blocks=5, block_size=4, page_tokens=21, max_model_len=16))


def test_a_freed_row_keeps_its_pages_and_they_count_as_free() -> None:
    vattention = allocator()
    (first,) = admitted(vattention, 12)
    free(vattention, first)
    assert mapped(vattention) == [3, 0, 0, 0]
    assert vattention.free_slots == vattention.usable_slots
    admitted(vattention, 12)  # the next request of that length needs no call of the driver
    assert vattention.counts == MappingCounts(mapped=3, map_calls=1)


def test_a_request_gets_the_row_with_just_enough_pages() -> None:
    vattention = allocator(num_pages=12)
    free(vattention, *admitted(vattention, 4, 16, 12, 8))
    assert mapped(vattention) == [1, 4, 3, 2]
    for tokens, expected in ((9, 2), (9, 1), (9, 0)):  # 3 pages, then 4, then none has 3: the first idle one
        (request,) = admitted(vattention, tokens)
        assert row(vattention, request) == expected


def test_among_equal_rows_the_first_is_taken() -> None:
    vattention = allocator()
    free(vattention, *admitted(vattention, 8, 8))
    (request,) = admitted(vattention, 8)
    assert row(vattention, request) == 0


def test_pages_are_reclaimed_from_idle_rows_the_highest_first() -> None:
    vattention = allocator()
    kept, *gone = admitted(vattention, 4, 8, 8, 4)
    free(vattention, *gone)
    assert (mapped(vattention), vattention.pages.num_unmapped) == ([1, 2, 2, 1], 2)
    assert grow(vattention, kept, 16)  # two unmapped pages, row 3's only one, and both of row 2
    assert mapped(vattention) == [5, 2, 0, 0]
    assert vattention.counts.reclaimed == 3
    assert vattention.pages.num_unmapped == 1  # a row gives up all that it does not need


def test_what_a_running_row_has_mapped_beyond_its_length_is_free_too() -> None:
    vattention = allocator(num_pages=5, max_num_seqs=2)
    free(vattention, *admitted(vattention, 16))
    (short,) = admitted(vattention, 1)
    assert (row(vattention, short), mapped(vattention)) == (0, [4, 0])
    assert (vattention.num_slots_held(short), vattention.free_slots) == (PAGE, 4 * PAGE)
    admitted(vattention, 16)
    assert mapped(vattention) == [1, 4]


def test_growth_is_refused_only_if_it_needs_a_page_and_none_is_free() -> None:
    vattention = allocator(num_pages=2)
    first, second = admitted(vattention, 3, 3)
    assert vattention.free_slots == 0
    assert grow(vattention, first, 1)
    before = state(vattention)
    assert not grow(vattention, first, 1)
    assert state(vattention) == before
    vattention.preempt(second)
    assert second.num_computed_tokens == 0
    assert grow(vattention, first, 1)
    assert vattention.live_requests() == (first,)


def test_an_admission_leaves_the_watermark_while_something_runs() -> None:
    """Admit iff free - ceil(len / page) >= watermark."""
    vattention = allocator(num_pages=10, max_model_len=64, watermark=0.1)
    (running,) = admitted(vattention, 4)
    assert not grow(vattention, KVRequest(request_id="9 pages", num_tokens=36), 1, busy=True)
    assert grow(vattention, KVRequest(request_id="8 pages", num_tokens=32), 32, busy=True)
    assert grow(vattention, running, 4, busy=True)  # growth may use the watermark
    assert vattention.free_slots == 0


def test_an_admission_finds_room_for_all_that_is_known_but_maps_the_first_chunk() -> None:
    vattention = allocator(num_pages=4)
    admitted(vattention, 8)
    assert not grow(vattention, KVRequest(request_id="9", num_tokens=9), 4)
    fits = KVRequest(request_id="8", num_tokens=8)
    assert grow(vattention, fits, 4)
    assert vattention.num_slots_held(fits) == PAGE
    assert grow(allocator(num_pages=1, reserve_full_isl=False), KVRequest(request_id="9", num_tokens=9), 4)


@pytest.mark.parametrize(("prompt", "output", "slots"), [(5, 4, 0), (6, 4, None), (1, 1, 0), (8, 1, 0), (9, 1, None)])
def test_what_can_ever_fit(prompt: int, output: int, slots: int | None) -> None:
    assert allocator(num_pages=3, state_slots=1).admission_slots(prompt, output) == slots
    assert allocator(max_model_len=8).admission_slots(prompt, output) == slots


def test_the_state_lies_in_the_first_pages_of_the_row() -> None:
    vattention = allocator(num_pages=4, state_slots=PAGE + 1)
    (first,) = admitted(vattention, 1)
    assert vattention.state_slots == 2 * PAGE
    assert vattention.slots_held(first).tolist() == [8, 9, 10, 11]
    assert vattention.free_slots + vattention.num_slots_held(first) + vattention.state_slots == vattention.usable_slots
    assert grow(vattention, first, 4)
    assert not grow(vattention, first, 4)


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


MISUSE: dict[str, Callable[[VAttentionAllocator, KVRequest], Any]] = {
    "was never allocated, or was freed before": lambda vattention, live: vattention.free(KVRequest(request_id="x", num_tokens=1)),
    "'y': holds no blocks": lambda vattention, live: vattention.preempt(KVRequest(request_id="y", num_tokens=1)),
    "'z': holds no blocks": lambda vattention, live: vattention.premap(KVRequest(request_id="z", num_tokens=1), 1),
    "pages for 0 tokens": lambda vattention, live: vattention.premap(live, 0),
    "0 new and 0 look-ahead": lambda vattention, live: vattention.allocate_slots(live, 0),
    "9 tokens are more than max_model_len 8": lambda vattention, live: vattention.allocate_slots(live, 5),
    "9 known tokens": lambda vattention, live: vattention.allocate_slots(KVRequest(request_id="x", num_tokens=9), 1),
    "3 computed tokens, but it holds 0": lambda vattention, live: vattention.allocate_slots(
        KVRequest(request_id="x", num_tokens=4, num_computed_tokens=3), 1
    ),
    "1 requests hold slots already": lambda vattention, live: vattention.allocate_slots(KVRequest(request_id="x", num_tokens=1), 1),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_told_and_changes_nothing(message: str) -> None:
    vattention = allocator(max_num_seqs=1, max_model_len=8)
    (live,) = admitted(vattention, 4)
    before = state(vattention)
    with pytest.raises(ConfigError, match=message):
        MISUSE[message](vattention, live)
    assert state(vattention) == before


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_pages_need_a_pool_and_rows(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="each needs 1 or more"):
        VirtualPages(num_pages=numbers[0], num_rows=numbers[1], pages_per_row=numbers[2])


CORRUPTIONS: dict[str, Callable[[VAttentionAllocator], Any]] = {
    "page twice": lambda vattention: vattention.pages.arrays.table.__setitem__((0, 1), 0),
    "page of the pool mapped": lambda vattention: vattention.pages.arrays.table.__setitem__((0, 1), 7),
    "page lost": lambda vattention: vattention.pages.arrays.num_mapped.__setitem__(1, 3),
    "need unmapped": lambda vattention: vattention.pages.arrays.num_needed.__setitem__(0, 3),
    "miscounted": lambda vattention: vattention.pages.arrays.counts.__setitem__(NUM_FREE, 6),
    "row without request": lambda vattention: vattention._rows.popitem(),
    "request without row": lambda vattention: vattention._rows.__setitem__(KVRequest(request_id="x", num_tokens=1), 3),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corruption_is_noticed(what: str) -> None:
    vattention = allocator()
    admitted(vattention, 8, 4)
    CORRUPTIONS[what](vattention)
    with pytest.raises(IntegrityError):
        vattention.check_integrity()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "grow", "grow", "free", "preempt", "premap", "manage"]), st.integers(0, 9), st.integers(1, 12)
    )
)


@given(
    operations=OPERATIONS,
    num_pages=st.integers(1, 8),
    state_slots=st.sampled_from([0, 0, 1, 5]),
    watermark=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_whatever_is_mapped_where_no_content_is_lost(
    operations: list[tuple[str, int, int]], num_pages: int, state_slots: int, watermark: float
) -> None:
    """A memory of physical slots, and an oracle that only counts pages: it knows what fits, whatever is mapped where."""
    vattention = allocator(num_pages, state_slots=state_slots, watermark=watermark)
    memory = np.zeros((vattention.num_slots, 2), np.int64)
    live: list[KVRequest] = []
    written: dict[KVRequest, int] = {}
    state_pages = -(-state_slots // PAGE)

    def taken(tokens: int) -> int:
        return -(-tokens // PAGE) + state_pages if tokens else 0

    for number, (operation, which, tokens) in enumerate(operations, start=1):
        if operation == "manage":
            vattention.manage_pages()
        elif operation == "admit" and len(live) < vattention.max_num_seqs:
            request = KVRequest(request_id=number, num_tokens=tokens)
            live.append(request)
            kept = int(watermark * num_pages)
            fits = sum(taken(r.num_computed_tokens) for r in live) + taken(tokens) + kept <= num_pages
            before = state(vattention)
            assert grow(vattention, request, tokens, busy=True) == fits
            if not fits:
                assert state(vattention) == before
                live.pop()
        elif operation in ("free", "preempt") and live:
            getattr(vattention, operation)(live.pop(which % len(live)))
        elif operation == "premap" and live:
            vattention.premap(live[which % len(live)], tokens)
        elif operation == "grow" and live:
            request = live[which % len(live)]
            more = min(tokens, vattention.max_model_len - request.num_computed_tokens)
            if more:
                now = request.num_computed_tokens
                fits = sum(taken(r.num_computed_tokens) for r in live) - taken(now) + taken(now + more) <= num_pages
                before = state(vattention)
                assert grow(vattention, request, more) == fits
                assert fits or state(vattention) == before
        vattention.check_integrity()
        slots = [slot for request in live for slot in vattention.slots_held(request).tolist()]
        assert len(set(slots)) == len(slots)
        assert vattention.free_slots == (num_pages - sum(taken(r.num_computed_tokens) for r in live)) * PAGE
        assert vattention.free_slots + len(slots) + vattention.state_slots * len(live) == vattention.usable_slots
        for request in live:
            held = vattention.slots_held(request)
            assert held.size == vattention.num_slots_held(request) == (taken(request.num_computed_tokens) - state_pages) * PAGE
            for t in range(written.get(request, 0), request.num_computed_tokens):
                memory[held[t]] = request.request_id, t
            written[request] = request.num_computed_tokens
            content = memory[held[: request.num_computed_tokens]].tolist()
            assert content == [[request.request_id, t] for t in range(request.num_computed_tokens)]
    counts, pages = vattention.counts, vattention.pages
    assert counts.mapped + counts.premapped - counts.reclaimed - counts.unmapped == pages.arrays.num_mapped.sum()
    for request in live:
        vattention.free(request)
    assert vattention.free_slots == vattention.usable_slots


@given(
    left=st.lists(st.integers(1, 9), max_size=3),
    num_pages=st.integers(1, 6),
    prompt=st.integers(1, 12),
    output=st.integers(1, 12),
    state_slots=st.integers(0, 5),
)
def test_who_can_ever_fit_fits_alone(left: list[int], num_pages: int, prompt: int, output: int, state_slots: int) -> None:
    vattention = allocator(num_pages, watermark=0.5, state_slots=state_slots)
    for tokens in left:  # pages stay mapped behind idle rows
        gone = KVRequest(request_id="gone", num_tokens=tokens)
        if grow(vattention, gone, tokens):
            vattention.free(gone)
    alone = KVRequest(request_id="alone", num_tokens=prompt)
    grown = grow(vattention, alone, prompt) and all(grow(vattention, alone, 1, busy=True) for _ in range(output - 1))
    assert grown == (vattention.admission_slots(prompt, output) is not None)
