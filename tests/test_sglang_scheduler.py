"""SGLang's scheduler, one rule at a time, each under the sentence of its description; and all of them together on random loads."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.radix_cache import RadixCache
from pagedkv.scheduling.content import Segments, shared_segments
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.sglang_prefill import PassLimits, PrefillPass, Verdict
from pagedkv.scheduling.sglang_queue import QUEUE_POLICIES, sort_queue
from pagedkv.scheduling.sglang_request import SGLangRequest
from pagedkv.scheduling.sglang_retraction import NewTokenRatio, decayed
from pagedkv.scheduling.sglang_scheduler import SGLangScheduler
from pagedkv.scheduling.sglang_settings import SGLangSettings
from pagedkv.scheduling.stable_order import SortArrays, sort_places
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.scheduling.stream_tokens import token_ids


def scheduler(*, slots: int = 256, block_size: int = 1, rows: int = 8, caching: bool = True, **limits: Any) -> SGLangScheduler:
    """A scheduler over `slots` usable slots."""
    pool = KVPoolSettings(
        num_blocks=slots // block_size + 1,
        block_size=block_size,
        max_num_seqs=rows,
        max_model_len=256,
        enable_prefix_caching=caching,
    )
    chosen = SGLangSettings(**{"max_running_requests": rows, "max_model_len": 256, **limits})
    return SGLangScheduler(chosen, RadixRows(pool), permutation=lambda n: range(n)[::-1])


def text(stream: int, end: int) -> Segments:
    """A request begins with `end` tokens of a text."""
    return shared_segments(np.array([stream]), np.array([end]))


def entries(step: Step) -> list[tuple[int, int]]:
    """(request, tokens) in scheduling order."""
    n = step.num_entries
    return list(zip(step.batch["request"][:n].tolist(), step.batch["num_scheduled_tokens"][:n].tolist(), strict=True))


def advance(one: SGLangScheduler) -> list[tuple[int, int]]:
    scheduled = entries(one.schedule())
    one.check_integrity()
    one.complete()
    one.check_integrity()
    return scheduled


def run_out(one: SGLangScheduler) -> list[int]:
    """Run until nobody is left; return who finished, in order."""
    finished = list[int]()
    while one.num_running or one.num_waiting:
        assert advance(one)
        finished += one.finished.tolist()
    return finished


def waits(tokens: list[int], *, index: int = 0, **more: Any) -> SGLangRequest:
    known: dict[str, Any] = {"name": f"{index}", "num_prompt_tokens": len(tokens), "max_new_tokens": 8}
    return SGLangRequest(index=index, tokens=np.array(tokens, np.int32), **known | more)


# Batches


def test_prompts_come_first_and_running_requests_wait_meanwhile() -> None:
    one = scheduler()
    one.add(prompt_tokens=10, output_tokens=3)
    assert advance(one) == [(0, 10)]
    one.add(prompt_tokens=5, output_tokens=3)
    assert advance(one) == [(1, 5)]
    assert advance(one) == [(0, 1), (1, 1)]
    assert advance(one) == [(0, 1), (1, 1)]
    assert (one.finished.tolist(), one.num_running) == ([0, 1], 0)


def test_with_mixed_chunks_they_decode_in_the_same_step() -> None:
    one = scheduler(enable_mixed_chunk=True, chunked_prefill_size=16)
    one.add(prompt_tokens=10, output_tokens=9)
    advance(one)
    one.add(prompt_tokens=20, output_tokens=9)
    assert advance(one) == [(0, 1), (1, 15)]  # the decode token takes one of the 16
    step = one.schedule()
    assert entries(step) == [(1, 5), (0, 1)]
    assert step.num_running_before == 2
    one.complete()
    assert one.sampled.tolist() == [1, 0]
    assert advance(one) == [(1, 1), (0, 1)]  # the prompts of a batch come first in it from now on


def test_one_prompt_at_a_time_is_computed_in_pieces() -> None:
    one = scheduler(chunked_prefill_size=16, block_size=4)
    for _ in range(2):
        one.add(prompt_tokens=38, output_tokens=2)
    assert advance(one) == [(0, 16)]
    assert one.sampled.tolist() == []
    assert advance(one) == [(0, 16)]
    assert advance(one) == [(0, 6), (1, 8)]  # 6 tokens are charged as two blocks
    assert advance(one) == [(1, 16)]
    assert advance(one) == [(1, 14)]
    assert run_out(one) == [0, 1]


def test_without_chunks_the_first_prompt_may_exceed_the_budget_and_later_ones_may_not() -> None:
    one = scheduler(chunked_prefill_size=None, max_prefill_tokens=16)
    for prompt in (40, 4, 8, 8):
        one.add(prompt_tokens=prompt, output_tokens=2)
    assert advance(one) == [(0, 40)]
    assert advance(one) == [(1, 4), (2, 8)]  # a prompt of 4 would be the limit, and the fourth has 8
    assert one.schedule().num_entries == 1


def test_a_batch_that_was_full_stays_so_until_a_decode_step_sees_somebody_gone() -> None:
    one = scheduler(rows=2)
    for output in (2, 4, 2):
        one.add(prompt_tokens=4, output_tokens=output)
    step = one.schedule()
    assert (entries(step), step.blocker) == ([(0, 4), (1, 4)], Blocker.MAX_NUM_SEQS)
    one.complete()
    assert advance(one) == [(0, 1), (1, 1)]
    assert one.finished.tolist() == [0]
    assert advance(one) == [(1, 1)]  # request 0 is in the batch still when admission is tried
    assert advance(one) == [(2, 4)]
    assert run_out(one) == [1, 2]


def test_who_has_just_finished_takes_a_place_until_the_next_decode_step() -> None:
    one = scheduler(rows=2)
    for output in (2, 4):
        one.add(prompt_tokens=4, output_tokens=output)
    advance(one)
    advance(one)
    assert (one.finished.tolist(), one.num_running) == ([0], 1)
    one.add(prompt_tokens=4, output_tokens=2)
    assert [advance(one), advance(one)] == [[(1, 1)], [(2, 4)]]


def test_a_refusal_holds_for_a_batch_that_ran_before_though_expectations_would_allow_more() -> None:
    one = scheduler(slots=150)
    one.add(prompt_tokens=10, output_tokens=10)
    advance(one)
    one.add(prompt_tokens=10, output_tokens=50)
    one.add(prompt_tokens=10, output_tokens=62)
    assert advance(one) == [(1, 10)]  # 150 - 10 - 6.3 - 61 < 10 + 62 + 1; in a new pass 150 - 20 - 0.7 * 58 would be enough
    for _ in range(9):
        assert advance(one) == [(0, 1), (1, 1)]
    assert one.finished.tolist() == [0]
    assert [advance(one), advance(one)] == [[(1, 1)], [(2, 10)]]


def test_nobody_waits_for_those_who_are_all_done() -> None:
    one = scheduler(rows=1)
    for _ in range(2):
        one.add(prompt_tokens=4, output_tokens=2)
    assert [advance(one) for _ in range(4)] == [[(0, 4)], [(0, 1)], [(1, 4)], [(1, 1)]]


# Admission


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


# Retraction


def until_retraction(one: SGLangScheduler) -> None:
    """Run until a step is decided that retracts somebody."""
    one.schedule()
    while not one.preempted.size:
        one.complete()
        assert one.num_running
        one.schedule()
    one.check_integrity()


def two_too_many() -> SGLangScheduler:
    """Two requests that would come to 124 slots of 96, the first with two outputs more."""
    one = scheduler(slots=96, schedule_conservativeness=0.1)
    one.add(prompt_tokens=8, output_tokens=60)
    advance(one)
    advance(one)
    one.add(prompt_tokens=8, output_tokens=50)
    assert advance(one) == [(1, 8)]
    return one


def test_the_one_with_the_fewest_outputs_goes_and_comes_back_behind_the_others() -> None:
    one = two_too_many()
    one.add(prompt_tokens=70, output_tokens=2)
    until_retraction(one)
    assert one.preempted.tolist() == [1]
    assert one.waiting().tolist() == [2, 1]
    assert one.requests.arrays["num_preemptions"][:3].tolist() == [0, 1, 0]
    made = one.requests.arrays["num_known_tokens"][0] - 8
    assert one.new_token_ratio == min(1.0, (made + 20) / (60 + 1))
    one.complete()
    assert run_out(one) == [0, 2, 1]


def test_of_equals_the_longest_prompt_goes_first() -> None:
    one = scheduler(slots=60, schedule_conservativeness=0.1, chunked_prefill_size=None)
    for prompt in (8, 9, 7):
        one.add(prompt_tokens=prompt, output_tokens=16)
    until_retraction(one)
    assert one.preempted.tolist() == [1]


def test_a_retraction_stores_nothing_beyond_the_prompt() -> None:
    one = two_too_many()
    until_retraction(one)
    assert one.cached_slots == 8
    one.complete()
    assert run_out(one) == [0, 1]
    record = one.requests.arrays[1]
    assert record["num_hit_tokens"] <= 8 < record["num_queried_tokens"] - 8  # it looked for its outputs too when it came again


def test_a_retraction_evicts_until_20_tokens_are_free_for_each_who_stays() -> None:
    one = scheduler(slots=48, schedule_conservativeness=0.1)
    for output in (30, 24):
        one.add(prompt_tokens=8, output_tokens=output)
        advance(one)
    until_retraction(one)
    assert one.cached_slots == 0  # the one that left gave back less than 20, so its prompt went too
    assert one.allocator.cache.slots.num_free_slots >= 20 - 1


def test_the_ratio_falls_with_every_decode_step_that_fits_and_is_reset_when_idle() -> None:
    one = scheduler()
    one.add(prompt_tokens=4, output_tokens=9)
    advance(one)
    assert one.new_token_ratio == 0.7
    advance(one)
    advance(one)
    assert one.new_token_ratio == pytest.approx(0.7 - 2 * (0.7 - 0.098) / 600)
    run_out(one)
    assert one.new_token_ratio == 0.7
    ratio = NewTokenRatio.of(2.0)
    assert ratio == (1.0, 0.14)
    current = ratio.initial
    for _ in range(601):
        current = decayed(ratio, current)
    assert current == 0.14


# The queue


def order(policy: str, queue: list[SGLangRequest], cache: RadixCache, **scene: Any) -> list[int]:
    return [request.index for request in sort_queue(policy, queue, cache.tree, **scene).requests]


def cached(*texts: list[int]) -> RadixCache:
    cache = RadixCache(num_blocks=500)
    for tokens in texts:
        cache.store(np.array(tokens, np.int32), cache.take(len(tokens)), namespace=None)  # type: ignore[arg-type]
    return cache


def test_lpm_sorts_by_what_is_cached_and_is_fcfs_in_a_long_queue() -> None:
    cache = cached([1] * 50, [2] * 40)
    queue = [waits([3] * 40, index=0), waits([2] * 60, index=1), waits([1] * 60, index=2)]
    assert order("lpm", queue, cache) == [2, 1, 0]
    assert order("lpm", queue * 43, cache)[:3] == [0, 1, 2]
    assert sort_queue("lpm", queue * 43, cache.tree).policy == "fcfs"
    assert sort_queue("lpm", queue, None).policy == "fcfs"


@pytest.mark.parametrize(("shared", "late"), [(31, []), (32, [1])])
def test_a_request_that_begins_like_a_waiting_one_comes_late(shared: int, late: list[int]) -> None:
    queue = [waits([1] * 40, index=0), waits([1] * shared + [2] * 40, index=1), waits([3] * 5, index=2)]
    done = sort_queue("lpm", queue, cached().tree)
    assert [request.index for request in done.requests if request in done.late] == late
    assert [request.index for request in done.requests][-1] == (late or [2])[0]


@pytest.mark.parametrize(("in_cache", "late"), [(32, 1), (33, 0)])
def test_only_who_finds_little_in_the_cache_is_compared(in_cache: int, late: int) -> None:
    queue = [waits([1] * 40 + [i] * 9, index=i) for i in range(2)]
    assert len(sort_queue("lpm", queue, cached([1] * in_cache).tree).late) == late


def test_dfs_weight_walks_the_heaviest_subtree_first_and_a_node_after_its_children() -> None:
    cache = cached([1] * 10 + [2] * 10, [1] * 10 + [3] * 10, [4] * 10)
    texts = [[4] * 15, [1] * 10 + [9], [1] * 10 + [2] * 15, [1] * 10 + [3] * 15, [1] * 10 + [3] * 16, [5] * 3]
    assert order("dfs-weight", [waits(tokens, index=i) for i, tokens in enumerate(texts)], cache) == [3, 4, 2, 1, 0, 5]


def test_hrrn_weighs_waiting_against_work() -> None:
    cache = cached([7] * 5)
    queue = [
        waits([1] * 10, index=0, prefilled_before=0),
        waits([2] * 50, index=1, prefilled_before=0),
        waits([3] * 10, index=2, prefilled_before=90),
        waits([7] * 5, index=3, num_prompt_tokens=4, num_output_tokens=1, prefilled_before=100),
    ]
    assert order("hrrn", queue, cache, num_prefilled_tokens=100) == [3, 0, 1, 2]


def test_lof_routing_key_and_random() -> None:
    queue = [waits([i], index=i, max_new_tokens=i, routing_key=key) for i, key in enumerate(["", "b", "a", "c"])]
    running = [waits([9], routing_key=key) for key in ("a", "b", "b", "")]
    assert order("lof", queue, cached()) == [3, 2, 1, 0]
    assert order("routing-key", queue, cached(), running=running) == [1, 2, 0, 3]
    assert order("routing-key", queue, cached(), running=running[3:]) == [0, 1, 2, 3]
    assert order("random", queue, cached(), permutation=lambda n: [2, 0, 3, 1]) == [2, 0, 3, 1]


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 1), st.floats(0, 1)), max_size=70))
def test_places_are_sorted_as_python_sorts(keys: list[tuple[int, int, float]]) -> None:
    sort = SortArrays.empty(70)
    sort.keys[:, : len(keys)] = np.array(keys).reshape(-1, 3).T
    sort_places(sort, len(keys))
    assert sort.order[: len(keys)].tolist() == sorted(range(len(keys)), key=keys.__getitem__)


def test_routing_keys_may_be_as_many_as_requests() -> None:
    one = scheduler(rows=1, slots=2000, schedule_policy="routing-key")
    for i in range(600):
        one.add(prompt_tokens=2, output_tokens=1, routing_key=f"{(i * 7) % 600:03}")
    assert run_out(one) == list(range(600))  # nobody whose key runs waits, so they stay as they came
    other = scheduler(rows=2, schedule_policy="routing-key")
    other.add(prompt_tokens=2, output_tokens=9, routing_key="b")
    advance(other)
    for key in ("a", "b", "c"):
        other.add(prompt_tokens=2, output_tokens=1, routing_key=key)
    assert run_out(other) == [2, 1, 3, 0]


# Bad settings


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_running_requests": 0}, "max-running-requests is 0"),
        ({"max_running_requests": 9}, "the allocator was built for 8"),
        ({"max_model_len": 300}, "the allocator was built for 256"),
        ({"schedule_policy": "lmp"}, "did you mean lpm"),
        ({"chunked_prefill_size": 0}, "None is no limit"),
        ({"chunked_prefill_size": 30, "block_size": 4}, "28 would work"),
        ({"schedule_conservativeness": 0.0}, "schedule-conservativeness is 0.0"),
        ({"enable_mixed_chunk": True, "chunked_prefill_size": None}, "needs chunked prefill"),
        ({"schedule_policy": "shortest-prefill-first", "caching": False}, "needs prefix caching"),
    ],
)
def test_settings_that_cannot_work_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler(**limits)


def test_random_needs_a_source_of_chance() -> None:
    one = scheduler()
    with pytest.raises(ConfigError, match="source of chance"):
        SGLangScheduler(SGLangSettings(max_running_requests=8, max_model_len=256, schedule_policy="random"), one.allocator)


@pytest.mark.parametrize("request_", [{"prompt_tokens": 0}, {"output_tokens": 0}, {"max_new_tokens": 2}])
def test_requests_that_cannot_be_are_refused(request_: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        scheduler().add(**{"prompt_tokens": 4, "output_tokens": 4, **request_})


def test_what_can_never_run_is_refused_at_once() -> None:
    one = scheduler(slots=64)
    assert one.add(prompt_tokens=250, output_tokens=7) is None
    assert one.add(prompt_tokens=60, output_tokens=4) is None
    assert one.num_waiting == 0


def test_corruption_is_noticed() -> None:
    one = scheduler()
    one.add(prompt_tokens=4, output_tokens=4)
    advance(one)
    one.allocator.num_shared[0] = 3
    with pytest.raises(IntegrityError):
        one.check_integrity()


# All together

REQUEST = st.fixed_dictionaries(
    {
        "prompt_tokens": st.integers(1, 60),
        "output_tokens": st.integers(1, 40),
        "ignore_eos": st.booleans(),
        "content": st.none() | st.builds(text, st.integers(0, 2), st.integers(1, 50)),
    }
)


@settings(max_examples=40)
@given(
    policy=st.sampled_from(sorted(QUEUE_POLICIES)),
    load=st.lists(st.tuples(REQUEST, st.integers(0, 3)), min_size=1, max_size=14),
    shape=st.sampled_from([(1, 110), (4, 112), (16, 160)]),
    chunk=st.sampled_from([None, 16, 32]),
    mixed=st.booleans(),
    caching=st.booleans(),
    conservativeness=st.sampled_from([0.1, 1.0]),
)
def test_everyone_is_served_and_no_slot_is_lost(
    policy: str,
    load: list[tuple[dict[str, Any], int]],
    shape: tuple[int, int],
    chunk: int | None,
    mixed: bool,
    caching: bool,
    conservativeness: float,
) -> None:
    block_size, slots = shape
    one = scheduler(
        slots=slots,
        block_size=block_size,
        rows=4,
        caching=caching or policy == "shortest-prefill-first",
        schedule_policy=policy,
        chunked_prefill_size=chunk,
        enable_mixed_chunk=mixed and chunk is not None,
        schedule_conservativeness=conservativeness,
    )
    accepted, finished, sampled = set[int](), list[int](), 0
    for request, pause in load:
        if (index := one.add(**request)) is not None:
            accepted.add(index)
        for _ in range(pause if one.num_running or one.num_waiting else 0):
            if not (one.num_running or one.num_waiting):
                break
            assert advance(one)
            finished += one.finished.tolist()
            sampled += one.sampled.size
    while one.num_running or one.num_waiting:
        step = one.schedule()
        rows = step.batch["row"][: step.num_entries]
        assert 0 < step.num_entries == np.unique(rows).size <= 4
        assert one.failed.size == 0
        one.check_integrity()
        one.complete()
        one.check_integrity()
        finished += one.finished.tolist()
        sampled += one.sampled.size
    assert sorted(finished) == sorted(accepted)
    assert sampled == one.requests.arrays["output_tokens"][sorted(accepted)].sum()
    assert one.allocator.free_slots == one.allocator.usable_slots
    assert caching or policy == "shortest-prefill-first" or one.cached_slots == 0
