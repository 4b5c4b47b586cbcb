"""SGLang's scheduler: who is let into the running batch, and what that is charged."""

import numpy as np
import pytest
from sglang_scheduling import run_out, scheduler, text, waits
from steps import advance, entries

from pagedkv.radix_cache import RadixCache
from pagedkv.scheduling.sglang_prefill import PassLimits, PrefillPass, Verdict
from pagedkv.scheduling.step import Blocker
from pagedkv.scheduling.stream_tokens import token_ids


def test_a_request_needs_its_prompt_its_output_and_a_block_to_be_less_than_what_is_left() -> None:
    one = scheduler(slots=64, block_size=4)
    assert one.add(prompt_tokens=40, output_tokens=20) is None  # 40 + 20 + 4 is not less than 64
    assert one.add(prompt_tokens=40, output_tokens=19) == 0


def test_running_requests_are_expected_to_make_a_share_of_their_output() -> None:
    one = scheduler(slots=100)
    one.add(prompt_tokens=10, output_tokens=50)
    one.add(prompt_tokens=10, output_tokens=45)
    assert advance(one) == [(0, 10)]  # in one pass all of the first one's output counts: 100 - 10 - 1 - 50 < 10 + 45 + 1
    step = one.schedule()  # later 70 % of the 49 to come: 100 - 10 - 34.3 = 55.7
    assert (entries(step), step.blocker) == ([(0, 1)], Blocker.KV_MEMORY)
    one.complete()
    other = scheduler(slots=100)
    other.add(prompt_tokens=10, output_tokens=50)
    other.add(prompt_tokens=10, output_tokens=44)
    assert [advance(other), advance(other)] == [[(0, 10)], [(1, 10)]]  # 55 < 55.7


def test_outputs_count_up_to_4096() -> None:
    one = PrefillPass(RadixCache(num_blocks=5000), [], PassLimits(max_prefill_tokens=99, new_token_ratio=1.0))
    assert one.add(waits([1, 2], max_new_tokens=9000)) is Verdict.CONTINUE
    assert one.total_left == 5000 - 2 - 1 - 4096
    running = PrefillPass(RadixCache(num_blocks=5000), [waits([1], max_new_tokens=9000)], one.limits)
    assert running.total_left == 5000 - 4096


def test_a_hit_is_not_charged_and_is_locked() -> None:
    one = scheduler(slots=64)
    one.add(prompt_tokens=20, output_tokens=2, content=text(1, 20))
    run_out(one)
    assert one.cached_slots == 21
    one.add(prompt_tokens=30, output_tokens=2, content=text(1, 20))
    assert advance(one) == [(1, 10)]
    assert one.requests.arrays["num_cached_tokens"][1] == 20
    assert one.cached_slots == 1  # the output of request 0


def test_the_last_token_is_always_computed() -> None:
    one = scheduler()
    for _ in range(2):
        one.add(prompt_tokens=20, output_tokens=2, content=text(1, 20))
        run_out(one)
    assert one.requests.arrays["num_cached_tokens"][:2].tolist() == [0, 19]


def test_requests_of_one_pass_share_nothing_but_are_merged_afterwards() -> None:
    one = scheduler()
    for _ in range(2):
        one.add(prompt_tokens=20, output_tokens=4, content=text(1, 20))
    assert advance(one) == [(0, 20), (1, 20)]
    assert one.shared_slots == 20
    assert one.allocator.free_slots == 256 - 20


@pytest.mark.parametrize(("held", "fits"), [(33, True), (32, False)])
def test_with_outputs_known_and_no_caching_what_others_give_back_in_time_counts(held: int, fits: bool) -> None:
    # 20 slots are free and one request is to make one more token: a prompt of 10 and a block take 11, and leave 9. Its 40 outputs
    # then need what the other gives back at its end: 9 + held - 40 must be more than 1.
    running = [waits([1] * held, num_prompt_tokens=held - 1, num_output_tokens=1, max_new_tokens=2, ignore_eos=True)]
    request = waits([2] * 10, max_new_tokens=40, ignore_eos=True)
    for caches_prefixes in (False, True):
        limits = PassLimits(max_prefill_tokens=99, new_token_ratio=0.1, caches_prefixes=caches_prefixes)
        one = PrefillPass(RadixCache(num_blocks=20), running, limits)
        assert one.add(request) is Verdict.NO_TOKEN  # nothing is left for another one, in any case
        assert len(one.admitted) == (fits and not caches_prefixes)


def test_a_shortest_first_prompt_in_pieces_leaves_room_for_shorter_ones() -> None:
    limits = PassLimits(max_prefill_tokens=999, chunk_tokens=32, new_token_ratio=1.0, shortest_first=True)
    cache = RadixCache(num_blocks=100, block_size=4)
    one = PrefillPass(cache, [], limits)
    shorter = [waits([1] * 5), waits([2] * 9), waits([3] * 60)]
    one.resume(waits([9] * 100), 20, shorter)
    assert (one.admitted[0].end, one.chunk_left) == (20 + 32 - 8 - 12, 20)
    assert one.add(shorter[2]) is Verdict.OTHER  # nobody else is cut while one is in pieces
    assert [one.add(request) for request in shorter[:2]] == [Verdict.CONTINUE, Verdict.OTHER]
    assert len(one.admitted) == 3


@pytest.mark.parametrize(("num_mixed", "computed"), [(0, 4), (1, 7)])
def test_it_leaves_none_if_there_are_not_two_blocks_to_share(num_mixed: int, computed: int) -> None:
    limits = PassLimits(max_prefill_tokens=999, chunk_tokens=8, num_mixed=num_mixed, new_token_ratio=1.0, shortest_first=True)
    one = PrefillPass(RadixCache(num_blocks=100, block_size=4), [], limits)
    one.resume(waits([9] * 100), 20, [waits([1] * 3)])
    assert one.admitted[0].end == 20 + computed


@pytest.mark.parametrize(("free", "fits"), [(30, True), (29, False)])
def test_with_outputs_known_the_prompt_and_a_block_may_take_all_that_is_left(free: int, fits: bool) -> None:
    running = [waits([1] * 100, num_prompt_tokens=99, num_output_tokens=1, max_new_tokens=20, ignore_eos=True)]
    limits = PassLimits(max_prefill_tokens=99, new_token_ratio=1.0, caches_prefixes=False)
    one = PrefillPass(RadixCache(num_blocks=free), running, limits)  # 19 of them are spoken for
    one.add(waits([2] * 10, max_new_tokens=5, ignore_eos=True))
    assert len(one.admitted) == fits


def test_under_lru_the_prompts_of_those_who_wait_count_as_used() -> None:
    one = scheduler(slots=64, rows=1)
    one.add(prompt_tokens=30, output_tokens=2)
    one.add(prompt_tokens=30, output_tokens=2, content=text(1, 30))
    cache, awaited = one.allocator.cache, token_ids(text(1, 30), 1, 20)
    cache.store(awaited, cache.take(20))
    cache.store(np.full(20, 99, np.int32), cache.take(20))
    assert advance(one) == [(0, 30)]  # and 6 slots had to be evicted for it
    assert cache.peek(awaited)[0] == 20
    assert cache.peek(np.full(20, 99, np.int32))[0] == 0


def test_a_prompt_in_pieces_is_one_use_of_what_it_stores() -> None:
    one = scheduler(chunked_prefill_size=16)
    one.add(prompt_tokens=40, output_tokens=9)
    run_out(one)
    assert {node.hit_count for node in one.allocator.cache.tree.root.below()} == {1}
