"""Groups of layers over one pool: how blocks come and go, and what windows save."""

import pickle

import numpy as np
import pytest
from hybrid_requests import FULL, STATE, chunk, grant, grow, manager, request, tables, window

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.group_rules import GroupRule
from pagedkv.hybrid_cache_manager import HybridCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.layer_groups import plan_layer_groups


def test_a_window_gives_back_whole_blocks_before_it_takes_new_ones() -> None:
    cache, first = manager(FULL, window(6), caching=False), request(range(20))
    grow(cache, first, 12)
    assert tables(cache, first) == [[1, 2, 3], [4, 5, 6]]
    grow(cache, first, 1)  # 12 - 6 + 1 = 7 tokens are skipped: one block
    assert tables(cache, first) == [[1, 2, 3, 4], [0, 5, 6, 7]]  # and is handed out first
    grow(cache, first, 1, 1, 1, 1)
    assert tables(cache, first) == [[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]]
    assert cache.num_blocks_held(first) == 8


def test_a_chunk_is_given_back_when_the_next_begins() -> None:
    cache, first = manager(chunk(8), caching=False), request(range(20))
    grow(cache, first, 7)
    grow(cache, first, 1)
    assert tables(cache, first) == [[1, 2]]
    grow(cache, first, 1)
    assert tables(cache, first) == [[0, 0, 2]]  # the tail of the chunk is handed out first


def test_what_has_left_a_window_is_given_back_even_if_the_rest_does_not_fit() -> None:
    cache, first = manager(FULL, window(6), num_blocks=8, caching=False, reserve_full_isl=False), request(range(40))
    grow(cache, first, 12)
    assert cache.allocate_slots(first, 28) is None
    assert tables(cache, first) == [[1, 2, 3], [0, 5, 6]]
    assert cache.free_queue().tolist() == [4, 7]
    before = pickle.dumps(cache)
    assert cache.allocate_slots(first, 28) is None  # nothing else has changed, nor does it now
    assert pickle.dumps(cache) == before
    cache.check_integrity()


def test_given_back_blocks_are_found_until_they_are_reused() -> None:
    cache, first = manager(FULL, window(6)), request(range(40))
    grow(cache, first, 12, 12)
    assert cache.block_table(first, 1).tolist()[:1] == [0]
    assert cache.get_computed_blocks(request(range(9), "again"))[1] == 8


def test_all_groups_get_their_blocks_or_none_does() -> None:
    cache, first = manager(FULL, FULL, num_blocks=6, caching=False), request(range(12))
    before = pickle.dumps(cache)
    assert cache.allocate_slots(first, 12) is None  # six blocks, five free
    assert pickle.dumps(cache) == before
    assert cache.allocate_slots(first, 8, full_sequence_must_fit=False) is not None


def test_hits_that_nobody_holds_need_room() -> None:
    cache, first, again = manager(FULL, window(5), num_blocks=7), request(range(12)), request(range(12), "again")
    grow(cache, first, 12)
    cache.free(first)
    hits, num_tokens = cache.get_computed_blocks(again)
    assert (num_tokens, [hit.tolist() for hit in hits]) == (8, [[1, 2], [0, 5]])
    holder = request(range(100, 104), "holder")
    assert cache.allocate_slots(holder, 4, full_sequence_must_fit=False) is not None
    hits, _ = cache.get_computed_blocks(again)
    assert cache.num_free_blocks == 4
    before = pickle.dumps((cache, again))
    assert cache.allocate_slots(again, 4, hits) is None  # three hits and two new blocks
    assert pickle.dumps((cache, again)) == before


def test_the_gate_asks_for_the_peak_of_a_window_only() -> None:
    """40 known tokens: 10 blocks of full attention; a window of 6 holds cdiv(6 - 1 + 8, 4) + 1 = 5 if a step computes 8."""
    for num_free, fits in ((14, False), (15, True)):
        cache, first = manager(FULL, window(6), num_blocks=num_free + 1, caching=False, batch=8), request(range(40))
        before = pickle.dumps(cache)
        assert (cache.allocate_slots(first, 8) is not None) is fits
        assert (pickle.dumps(cache) == before) is not fits
    first.num_computed_tokens = 8
    grow(cache, first, 8, 8, 8, 8)  # what the gate let in goes through
    assert cache.peak_blocks(40) == 15
    with pytest.raises(ConfigError, match="9 new tokens: a step computes 8 at most"):
        cache.allocate_slots(request(range(9), "b"), 9)


def test_the_gate_counts_null_blocks_of_a_hit_as_none() -> None:
    """A window of 6 with a hit of 16 tokens: two blocks of the hit, and three more until its peak of five."""
    for num_free, fits in ((4, False), (5, True)):
        cache, first = manager(window(6), num_blocks=9, batch=8), request(range(17))
        grow(cache, first, 8, 8, 1)
        cache.free(first)
        assert cache.pool.get_new_blocks(8 - num_free) is not None  # those without a key, then the oldest
        hits, num_tokens = cache.get_computed_blocks(guest := request(range(40), "guest"))
        assert (num_tokens, np.count_nonzero(hits[0])) == (16, 2)
        assert (cache.allocate_slots(guest, 8, hits) is not None) is fits


def test_the_watermark_holds_only_for_an_admission_while_something_runs() -> None:
    cache, first = manager(FULL, window(6), num_blocks=9, caching=False, watermark=0.2), request(range(16))
    assert cache.allocate_slots(first, 16, has_scheduled_reqs=True) is None
    grow(cache, first, 16)


def test_a_request_holds_one_state_to_read_and_one_to_write() -> None:
    cache, first = manager(STATE), request(range(40))
    grow(cache, first, 8)
    assert tables(cache, first) == [[0, 1]]  # the boundary in between leaves no state
    grow(cache, first, 8)
    assert tables(cache, first) == [[0, 1, 0, 2]]
    grow(cache, first, 1)
    assert tables(cache, first) == [[0, 0, 0, 2, 3]]
    grow(cache, first, 3)
    assert tables(cache, first) == [[0, 0, 0, 0, 3]]
    assert cache.get_computed_blocks(request(range(19), "again"))[1] == 16


def test_a_state_that_a_step_passes_is_not_cached() -> None:
    """6 tokens, then 6: the state of the boundary at 8 was overwritten, that at 12 is there."""
    cache, first = manager(STATE), request(range(40))
    grow(cache, first, 6, 6)
    assert tables(cache, first) == [[0, 1, 2]]
    assert cache.get_computed_blocks(request(range(12), "a"))[1] == 0
    assert cache.get_computed_blocks(request(range(13), "b"))[1] == 12


def test_a_state_per_request_is_one_block_and_shares_nothing() -> None:
    cache, first = manager(FULL, GroupRule(kind="state", block_size=64)), request(range(40))
    grow(cache, first, 12, 8, 20)
    assert tables(cache, first) == [[1, 2, 3, 5, 6, 7, 8, 9, 10, 11], [4]]
    assert cache.get_computed_blocks(request(range(40), "again"))[1] == 0


def test_groups_are_freed_one_after_the_other() -> None:
    cache, first = manager(FULL, window(60), num_blocks=8, caching=False), request(range(12))
    grow(cache, first, 12)
    cache.preempt(first)
    assert first.num_computed_tokens == 0
    assert cache.free_queue().tolist() == [6, 5, 4, 3, 2, 1, 7]


@pytest.mark.parametrize(("model", "context", "at_most"), [("gpt-oss-20b", 65_536, 0.51), ("gemma-3-27b", 32_768, 0.25)])
def test_windows_save_what_full_length_budgeting_reserves(model: str, context: int, at_most: float) -> None:
    """Pages held at the end of a long context against every layer keeping every token; gpt-oss: half, Gemma 3: 17 % and padding."""
    layers = load_model(model).layer_groups
    plan, spec = plan_layer_groups(layers, block_size=16), load_model(model).kv_spec("auto")
    pool = KVPoolSettings(num_blocks=40_000, max_model_len=context, max_num_seqs=2)
    rules = plan.rules(max_model_len=context, enable_caching=False)
    cache = HybridCacheManager(pool, rules, enable_caching=False, max_num_batched_tokens=8192)
    guest, most = KVRequest(request_id=0, num_tokens=context), 0
    while guest.num_computed_tokens < context - 8:
        grant(cache, guest, min(8192, context - 8 - guest.num_computed_tokens))
        most = max(most, cache.num_blocks_held(guest))
    grow(cache, guest, *[1] * 8)
    full_length_bytes = spec.bytes_per_token * context
    held_bytes = cache.num_blocks_held(guest) * plan.page_bytes
    attended = sum(group.tokens_kept(context) * size for group, size in zip(layers, spec.group_bytes_per_token, strict=True))
    assert attended <= held_bytes <= at_most * full_length_bytes
    assert most <= cache.peak_blocks(context) < full_length_bytes / plan.page_bytes
