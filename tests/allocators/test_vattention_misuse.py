"""vAttention refuses what makes no sense, and notices what is wrong in its memory."""

from collections.abc import Callable
from typing import Any

import pytest
from vattention_requests import admitted, allocator, state

from pagedkv.allocators.vattention import VAttentionAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.virtual_pages import NUM_FREE, VirtualPages

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
