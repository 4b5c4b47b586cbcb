"""Blocks known by stream and place are found exactly when their tokens are the same: against a scheduler that hashes the tokens."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int64Array
from pagedkv.block_hash import BlockHashChain
from pagedkv.errors import ConfigError
from pagedkv.scheduling.content import Contents, Segments, keyed_segments, segment_of, shared_segments
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.step_allocation import step_allocator

MAX_MODEL_LEN = 80


@dataclass(frozen=True)
class Ask:
    """A request: through the streams that lead to `stream`, up to `shared` tokens there, then on its own."""

    stream: int
    shared: int
    own: int
    output: int
    priority: int
    wait_steps: int


@dataclass(frozen=True)
class Tree:
    """Streams: each leaves an earlier one at a token, the first ones leave none."""

    forks: tuple[tuple[int, int], ...]
    """By stream: the one it leaves, or -1, and how many tokens behind the start of that one's own."""

    def path(self, stream: int) -> list[tuple[int, int]]:
        """Return (stream, token at which its own tokens begin) from the root to `stream`."""
        parent, behind = self.forks[stream]
        before = [] if parent < 0 else self.path(parent)
        return [*before, (stream, before[-1][1] + behind if before else 0)]

    def content(self, ask: Ask) -> Segments:
        """Return what the request shares."""
        path = self.path(ask.stream)
        ends = [*(start for _, start in path[1:]), path[-1][1] + ask.shared]
        return shared_segments(np.array([stream for stream, _ in path]), np.array(ends))

    def tokens(self, ask: Ask, request: int) -> Int64Array:
        """Return its tokens, outputs included: no two positions of streams or requests have the same one."""
        content = self.content(ask)
        ends = content["end_token"].tolist()
        starts = [0, *ends[:-1]]
        parts = [1000 * s + np.arange(a, b) for (s, _), a, b in zip(self.path(ask.stream), starts, ends, strict=True)]
        own = 10_000_000 + 1000 * request + np.arange(ask.own + ask.output)
        return np.concatenate([*parts, own])


def trees() -> st.SearchStrategy[Tree]:
    def fork(stream: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(-1, stream - 1), st.integers(1, 9))

    return st.integers(1, 6).flatmap(lambda n: st.tuples(*(fork(i) for i in range(n)))).map(Tree)


ASKS = st.builds(
    Ask, st.integers(0, 5), st.integers(1, 12), st.integers(1, 6), st.integers(1, 30), st.integers(0, 2), st.sampled_from([0, 0, 3])
)


@given(
    tree=trees(),
    asks=st.lists(ASKS, min_size=2, max_size=14),
    block_size=st.sampled_from([1, 3, 4]),
    num_slots=st.sampled_from([40, 60, 120]),
    policy=st.sampled_from(["fcfs", "priority"]),
    outputs_shared=st.booleans(),
)
@settings(max_examples=120)
def test_streams_decide_as_tokens_do(
    tree: Tree, asks: list[Ask], block_size: int, num_slots: int, policy: str, outputs_shared: bool
) -> None:
    pool = KVPoolSettings(
        num_blocks=num_slots // block_size + 1,
        block_size=block_size,
        max_num_seqs=6,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=True,
    )
    limits = SchedulerSettings(max_num_seqs=6, max_num_batched_tokens=32, max_model_len=MAX_MODEL_LEN, policy=policy)
    by_stream, by_token = (Scheduler(limits, step_allocator("paged", pool)) for _ in range(2))
    waiting, submitted = list(asks), 0
    preempted = 0
    for step in range(2000):
        while waiting and step >= sum(ask.wait_steps for ask in asks[: submitted + 1]):
            ask = waiting.pop(0)
            ask = replace(ask, stream=ask.stream % len(tree.forks))
            prompt = int(tree.content(ask)["end_token"][-1]) + ask.own
            if outputs_shared:  # the stream goes on through all that the request adds, its answer too
                ask = replace(ask, shared=ask.shared + ask.own + ask.output)
            content, tokens = tree.content(ask), tree.tokens(ask, submitted)
            chain = BlockHashChain(block_size=block_size)
            chain.extend(tokens[: prompt + ask.output - 1])
            given = {"prompt_tokens": prompt, "output_tokens": ask.output, "priority": ask.priority}
            mine = by_stream.add(**given, content=content)
            assert mine == by_token.add(**given, keys=chain.keys)
            submitted += 1
        if not waiting and by_stream.num_running == by_stream.num_waiting == 0:
            break
        mine, other = by_stream.schedule(), by_token.schedule()
        assert mine.num_entries == other.num_entries
        np.testing.assert_array_equal(mine.batch[: mine.num_entries], other.batch[: mine.num_entries])
        np.testing.assert_array_equal(by_stream.preempted, by_token.preempted)
        for each in (by_stream, by_token):
            each.complete()
        np.testing.assert_array_equal(by_stream.allocator.tables.blocks, by_token.allocator.tables.blocks)
        np.testing.assert_array_equal(by_stream.allocator.pool.free_queue(), by_token.allocator.pool.free_queue())
        preempted += mine.num_preempted
    else:
        raise AssertionError("it does not end")
    size = by_stream.requests.size
    for name in ("num_queried_tokens", "num_hit_tokens", "num_cached_tokens", "num_preemptions"):
        np.testing.assert_array_equal(by_stream.requests.arrays[name][:size], by_token.requests.arrays[name][:size])
    by_stream.check_integrity()
    hits = int(by_stream.requests.arrays["num_cached_tokens"][:size].sum())
    event(f"found at first admission: {hits > 0}")
    event(f"found after preemption: {int(by_stream.requests.arrays['num_hit_tokens'][:size].sum()) > hits}")
    event(f"preempted: {preempted > 0}")


@given(ends=st.lists(st.integers(1, 60), max_size=9, unique=True).map(sorted), token=st.integers(1, 70), before=st.integers(0, 3))
def test_the_segment_of_a_token_is_the_first_that_does_not_end_before_it(ends: list[int], token: int, before: int) -> None:
    others = [5] * before
    segments = shared_segments(np.arange(len(ends) + before), np.array(others + ends, np.int64))
    wanted = next((i for i, end in enumerate(ends) if end >= token), len(ends))
    assert segment_of(segments, before, before + len(ends), token) == before + wanted


def small() -> Scheduler:
    pool = KVPoolSettings(num_blocks=20, block_size=4, max_model_len=32, max_num_seqs=4, enable_prefix_caching=True)
    return Scheduler(SchedulerSettings(max_model_len=32, max_num_seqs=4), step_allocator("paged", pool))


@pytest.mark.parametrize("ends", [[0], [4, 4], [8, 4], [-1, 4]])
def test_segments_out_of_order_are_refused(ends: list[int]) -> None:
    with pytest.raises(ConfigError, match="each must have 1 or more"):
        small().add(prompt_tokens=9, output_tokens=1, content=shared_segments(np.arange(len(ends)), np.array(ends)))


def test_content_is_given_once() -> None:
    content = shared_segments(np.array([1]), np.array([8]))
    with pytest.raises(ConfigError, match="give one of them"):
        small().add(prompt_tokens=9, output_tokens=1, content=content, keys=np.ones((2, 2), np.uint64))
    contents = Contents(content, np.array([0]), np.array([1]))
    with pytest.raises(ConfigError, match="1 contents for 2 requests"):
        small().add_all(np.array([9, 9]), np.array([1, 1]), contents=contents)


def test_private_requests_keep_no_keys_and_find_only_themselves() -> None:
    scheduler = small()
    for _ in range(4):
        scheduler.add(prompt_tokens=9, output_tokens=3)
    while scheduler.num_running + scheduler.num_waiting:
        scheduler.schedule()
        scheduler.complete()
    assert scheduler.requests.segments.size == 0
    assert scheduler.requests.arrays["num_hit_tokens"].sum() == 0
    assert scheduler.cached_slots == 4 * 8


def test_requests_share_the_segments_they_have_in_common() -> None:
    scheduler = small()
    prefix = shared_segments(np.array([3, 5]), np.array([8, 12]))
    contents = Contents(prefix, np.array([0, 0, 1, 0]), np.array([1, 1, 1, 2]))
    accepted = scheduler.add_all(np.array([9, 40, 13, 14]), np.array([2, 2, 2, 2]), contents=contents)
    assert accepted.tolist() == [True, False, True, True]
    known = scheduler.requests
    assert (known.arrays["first_segment"][:3].tolist(), known.arrays["num_segments"][:3].tolist()) == ([0, 1, 0], [1, 1, 2])
    assert known.segments.size == 2


def test_two_keys_of_a_stream_never_fall_together() -> None:
    """Streams of requests, of their own and given as keys: with 200 blocks each, all keys differ."""
    shared = shared_segments(np.array([0, 1, 2, 2**62]), np.arange(1, 5))
    own = keyed_segments(np.array([[0, 0], [1, 0]], np.uint64), 4)
    words = {(int(s["word_a"]) + i, int(s["word_b"])) for s in shared for i in range(200)}
    assert len(words) == 800
    assert len(set(own["word_b"].tolist()) & set(shared["word_b"].tolist())) == 0
