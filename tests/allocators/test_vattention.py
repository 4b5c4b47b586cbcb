"""vAttention's rules: rows keep their pages, and idle rows give them up."""

import pytest
from vattention_requests import PAGE, admitted, allocator, free, grow, mapped, row, state

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.vattention import VAttentionAllocator
from pagedkv.errors import ConfigError
from pagedkv.kv_request import KVRequest
from pagedkv.virtual_pages import MappingCounts


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
