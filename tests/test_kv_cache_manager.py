"""The cache manager's single rules, the keys of blocks, and misuse that must change nothing."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain, ImageSpan
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest


def chain(tokens: Any, block_size: int = 4, **namespace: Any) -> BlockHashChain:
    keys = BlockHashChain(block_size=block_size, **namespace)
    keys.extend(tokens)
    return keys


def request(tokens: Any, name: str = "r") -> KVRequest:
    tokens = list(tokens)
    return KVRequest(request_id=name, num_tokens=len(tokens), block_keys=chain(tokens).keys)


def manager(num_blocks: int = 9, **settings: Any) -> KVCacheManager:
    return KVCacheManager(KVPoolSettings(num_blocks=num_blocks, block_size=4, max_model_len=32, **settings))


def same(one: BlockHashChain, other: BlockHashChain) -> list[bool]:
    return [bool((a == b).all()) for a, b in zip(one.keys, other.keys, strict=False)]


def test_keys_do_not_depend_on_how_the_tokens_came() -> None:
    whole, pieces = chain(range(100)), BlockHashChain(block_size=4)
    for first, last in ((0, 3), (3, 3), (3, 4), (4, 17), (17, 100)):
        pieces.extend(np.arange(first, last, dtype=np.int32))
    assert whole.keys.shape == (25, 2)
    assert np.array_equal(whole.keys, pieces.keys)
    assert len(np.unique(whole.keys, axis=0)) == 25


def test_a_key_covers_all_that_stands_before() -> None:
    assert same(chain(range(12)), chain([0, 1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11])) == [True, False, False]
    assert same(chain([1] * 12), chain([1] * 8)) == [True, True]


@pytest.mark.parametrize("namespace", [{"salt": "a"}, {"lora": "a"}, {"salt": "a", "lora": "b"}, {"salt": "b", "lora": "a"}])
def test_namespaces_share_nothing(namespace: dict[str, Any]) -> None:
    assert same(chain(range(8), **namespace), chain(range(8), **namespace)) == [True, True]
    others: list[dict[str, Any]] = [{}, {"salt": "ab"}, {"lora": "b"}, {"salt": "b"}]
    for other in others:
        assert same(chain(range(8), **namespace), chain(range(8), **other)) == [False, False]


def test_an_image_enters_the_blocks_that_it_touches() -> None:
    def with_image(content: str, first: int) -> BlockHashChain:
        return chain([5] * 12, images=[ImageSpan(content=content, first_token=first, num_tokens=3)])

    assert same(with_image("cat", 6), with_image("cat", 6)) == [True] * 3
    assert same(with_image("cat", 6), with_image("dog", 6)) == [True, False, False]
    assert same(with_image("cat", 6), with_image("cat", 5)) == [True, False, False]


@pytest.mark.parametrize("tokens", [[1.5], ["a"], [[1, 2]]])
def test_tokens_must_be_integers(tokens: Any) -> None:
    keys = chain([1, 2])
    with pytest.raises(ConfigError, match="one row of integers"):
        keys.extend(tokens)
    assert keys.num_tokens == 2


def test_block_hash_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="block size 0"):
        BlockHashChain(block_size=0)
    with pytest.raises(ConfigError, match="image at token 0, 0 tokens"):
        ImageSpan(content="cat", first_token=0, num_tokens=0)


def test_a_preempted_request_finds_what_was_not_reused() -> None:
    cache, first = manager(), request(range(12))
    cache.allocate_slots(first, 12)
    cache.preempt(first)
    assert cache.free_queue().tolist() == [4, 5, 6, 7, 8, 3, 2, 1]
    cache.allocate_slots(request(range(100, 124), "other"), 24)  # takes block 3, the tail, with it
    assert cache.get_computed_blocks(first)[0].tolist() == [1, 2]


def test_the_gate_counts_hits_that_nobody_holds_and_no_others() -> None:
    cache, holder, follower = manager(num_blocks=5), request(range(12), "holder"), request(range(16), "follower")
    cache.allocate_slots(holder, 12)
    hits, _ = cache.get_computed_blocks(follower)
    assert hits.tolist() == [1, 2, 3]
    assert copy.deepcopy(cache).allocate_slots(follower, 4, hits, full_sequence_must_fit=True) is not None  # one block, one free
    cache.free(holder)
    longer = request(range(20), "longer")  # three revived and two new, four free
    assert cache.allocate_slots(longer, 4, hits, full_sequence_must_fit=True) is None
    assert cache.allocate_slots(longer, 4, hits, full_sequence_must_fit=False) is not None


def test_the_watermark_holds_only_while_something_runs() -> None:
    cache, whole = manager(num_blocks=5, watermark=0.2), request(range(16))
    assert cache.allocate_slots(whole, 16, has_scheduled_reqs=True) is None
    assert cache.allocate_slots(whole, 16) is not None


def test_lookahead_stops_at_the_longest_request_and_is_given_back() -> None:
    cache, first = manager(), request(range(6))
    taken = cache.allocate_slots(first, 6, num_lookahead_tokens=99)
    assert taken is not None
    assert taken.size == 8
    first.num_computed_tokens = 6
    assert cache.free_lookahead(first) == 6
    assert cache.free_queue().tolist() == [8, 7, 6, 5, 4, 3]
    assert cache.free_lookahead(first) == 0


def test_drafts_fill_no_block_for_others() -> None:
    cache = manager()
    first = KVRequest(request_id="drafts", num_tokens=7, block_keys=chain(range(12)).keys)
    cache.allocate_slots(first, 9)  # seven known tokens and two drafts
    assert cache.get_computed_blocks(request(range(12)))[0].tolist() == [1]


def test_blocks_with_a_key_are_not_lookahead() -> None:
    cache, first = manager(), request(range(8))
    cache.allocate_slots(first, 8)
    first.num_computed_tokens = 3
    assert cache.free_lookahead(first) == 0
    cache.check_integrity()


def floats() -> Any:
    return np.ones((2, 2))


MISUSE: dict[str, Callable[[KVCacheManager, KVRequest], Any]] = {
    "holds no blocks": lambda cache, live: cache.free(request([1])),
    "computed tokens: needs 1": lambda cache, live: cache.free_lookahead(live),
    "0 new and 0 look-ahead": lambda cache, live: cache.allocate_slots(live, 0),
    "0 known tokens": lambda cache, live: cache.allocate_slots(request([]), 1),
    "more than max_model_len 32": lambda cache, live: cache.allocate_slots(live, 33),
    "33 known tokens": lambda cache, live: cache.get_computed_blocks(request(range(33))),
    "1 block keys for 2 full": lambda cache, live: cache.allocate_slots(
        KVRequest(request_id="x", num_tokens=8, block_keys=live.block_keys[:1]), 8
    ),
    "type float64": lambda cache, live: cache.allocate_slots(KVRequest(request_id="x", num_tokens=8, block_keys=floats()), 8),
    "3 computed tokens, but it holds 0": lambda cache, live: cache.allocate_slots(
        KVRequest(request_id="x", num_tokens=3, num_computed_tokens=3), 1
    ),
    "holds blocks already": lambda cache, live: cache.allocate_slots(live, 1, [1]),
    "the last one must be": lambda cache, live: cache.allocate_slots(request(range(8)), 1, [1, 2]),
    "look them up again": lambda cache, live: cache.allocate_slots(request(range(8)), 4, [3]),
    "all 1 rows are in use": lambda cache, live: cache.allocate_slots(request([1]), 1),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_told_and_changes_nothing(message: str) -> None:
    cache, live = manager(max_num_seqs=1), request(range(8))
    cache.allocate_slots(live, 8)
    arrays = (
        cache.pool.blocks,
        cache.pool.queue,
        cache.pool.cache.index,
        cache.pool.cache.buckets,
        cache.tables.blocks,
        cache.tables.num_blocks,
    )  # type: ignore[union-attr]
    before = [array.tolist() for array in arrays]
    with pytest.raises(ConfigError, match=message):
        MISUSE[message](cache, live)
    assert [array.tolist() for array in arrays] == before
    cache.check_integrity()


def test_state_is_taken_at_admission_and_given_back() -> None:
    cache, live = manager(state_slots=5), request(range(8))
    free = cache.num_free_blocks
    assert cache.allocate_slots(live, 8) is not None
    assert cache.num_state_blocks == -(-5 // cache.block_size)
    assert cache.num_free_blocks == free - 8 // cache.block_size - cache.num_state_blocks
    cache.check_integrity()
    cache.free(live)
    assert cache.num_free_blocks == free


@pytest.mark.parametrize("where", ["tables", "rows", "keys"])
def test_corruption_is_noticed(where: str) -> None:
    cache, live = manager(), request(range(8))
    cache.allocate_slots(live, 8)
    if where == "tables":
        cache.tables.blocks[cache._rows[live], 1] = 5
    elif where == "rows":
        cache._requests.free.pop()
    else:
        live.block_keys = request(range(1, 9)).block_keys
    with pytest.raises(IntegrityError):
        cache.check_integrity()
