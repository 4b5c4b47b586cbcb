"""SGLang's scheduler: the order of its queue."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_scheduling import run_out, scheduler, waits
from steps import advance

from pagedkv.radix_cache import RadixCache
from pagedkv.scheduling.sglang_queue import sort_queue
from pagedkv.scheduling.sglang_request import SGLangRequest
from pagedkv.scheduling.stable_order import SortArrays, sort_places


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
    finished, num_checks = list[int](), 0
    while one.num_waiting or one.num_running:
        one.schedule()
        one.complete()
        finished += one.finished.tolist()
        if len(finished) % 50 == 0:
            one.check_integrity()  # which goes through all 600
            num_checks += 1
    assert num_checks > 5
    assert finished == list(range(600))  # nobody whose key runs waits, so they stay as they came
    other = scheduler(rows=2, schedule_policy="routing-key")
    other.add(prompt_tokens=2, output_tokens=9, routing_key="b")
    advance(other)
    for key in ("a", "b", "c"):
        other.add(prompt_tokens=2, output_tokens=1, routing_key=key)
    assert run_out(other) == [2, 1, 3, 0]
