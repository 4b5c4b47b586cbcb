"""Groups of layers over one pool: misuse is told and changes nothing, and corruption is noticed."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hybrid_requests import FULL, STATE, grow, manager, request, window

from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.group_rules import GroupRule
from pagedkv.hybrid_cache_manager import HybridCacheManager
from pagedkv.kv_request import KVRequest

MISUSE: dict[str, Callable[[HybridCacheManager, KVRequest], Any]] = {
    "holds no blocks": lambda cache, live: cache.free(request([1])),
    "0 new and 0 look-ahead": lambda cache, live: cache.allocate_slots(live, 0),
    "0 known tokens": lambda cache, live: cache.allocate_slots(request([]), 1),
    "65 tokens are more than max_model_len 64": lambda cache, live: cache.allocate_slots(live, 49),
    "a step computes 64 at most": lambda cache, live: cache.allocate_slots(live, 65),
    "65 known tokens": lambda cache, live: cache.get_computed_blocks(request(range(65))),
    "1 block keys for 2 full": lambda cache, live: cache.allocate_slots(
        KVRequest(request_id="x", num_tokens=8, block_keys=live.block_keys[:1]), 8
    ),
    "3 computed tokens, but it holds 0": lambda cache, live: cache.allocate_slots(
        KVRequest(request_id="x", num_tokens=3, num_computed_tokens=3), 1
    ),
    "given back when it had more": lambda cache, live: back_to(cache, live, 2),
    "only an admission takes hits": lambda cache, live: cache.allocate_slots(live, 1, cache.get_computed_blocks(live)[0]),
    "the last one must be": lambda cache, live: cache.allocate_slots(request(range(4), "x"), 1, [np.ones(1, np.int32)] * 2),
    "in 1 groups": lambda cache, live: cache.allocate_slots(request(range(9), "x"), 1, [np.ones(1, np.int32)]),
    r"hits of \[4, 8\] tokens in 2 groups": lambda cache, live: cache.allocate_slots(
        request(range(9), "x"), 1, [np.ones(1, np.int32), np.ones(2, np.int32)]
    ),
    "look them up again": lambda cache, live: cache.allocate_slots(request(range(9), "x"), 1, [np.array([7]), np.array([8])]),
    "raise max_num_seqs 1": lambda cache, live: cache.allocate_slots(request([1], "x"), 1),
}


def back_to(cache: HybridCacheManager, live: KVRequest, num_computed_tokens: int) -> None:
    saved, live.num_computed_tokens = live.num_computed_tokens, num_computed_tokens
    try:
        cache.allocate_slots(live, 1)
    finally:
        live.num_computed_tokens = saved


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_told_and_changes_nothing(message: str) -> None:
    cache, live = manager(FULL, window(6), max_num_seqs=1), request(range(20))
    grow(cache, live, 15, 1)
    before = pickle.dumps((cache, live))
    with pytest.raises(ConfigError, match=message):
        MISUSE[message](cache, live)
    assert pickle.dumps((cache, live)) == before


def test_a_state_cannot_be_read_where_none_was_left() -> None:
    cache, live = manager(STATE), request(range(40))
    grow(cache, live, 8, 12)  # states behind 8 and 20
    live.num_computed_tokens = 13
    with pytest.raises(ConfigError, match="preempt it"):
        cache.allocate_slots(live, 1)
    live.num_computed_tokens = 8
    with pytest.raises(ConfigError, match="preempt it"):
        cache.allocate_slots(live, 2)  # would write into a block that it does not have


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (manager, r"blocks of \[\] tokens"),
        (lambda: manager(GroupRule(kind="full", block_size=6)), "multiples of 4"),
        (lambda: manager(FULL, batch=0), "max-num-batched-tokens is 0"),
        (lambda: GroupRule(kind="ful", block_size=4), "unknown layer kind 'ful'"),  # type: ignore[arg-type]
        (lambda: GroupRule(kind="full", block_size=0), "block size 0"),
        (lambda: GroupRule(kind="full", block_size=4, window=4), "window 4"),
        (lambda: GroupRule(kind="chunked", block_size=4), "window None"),
        (lambda: window(0), "window 0"),
    ],
)
def test_groups_that_cannot_be_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("where", ["table", "given back", "hole", "rows", "keys", "count", "registered"])
def test_corruption_is_noticed(where: str) -> None:
    cache, live = manager(FULL, window(6)), request(range(16))
    grow(cache, live, 12, 4)
    row = cache._rows[live]
    full, windowed = cache.groups
    if where == "table":
        full.tables.blocks[row, 1] = 30
    elif where == "given back":
        windowed._num_given_back[row] = 3
    elif where == "hole":
        windowed._num_given_back[row] = 0
    elif where == "rows":
        cache._requests.free.pop()
    elif where == "keys":
        live.block_keys = request(range(1, 17)).block_keys
    elif where == "count":
        cache._num_held[row] += 1
    else:
        full._num_registered[row] = 9
    with pytest.raises(IntegrityError):
        cache.check_integrity()
