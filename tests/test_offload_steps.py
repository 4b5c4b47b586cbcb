"""Steps over paged memory with a second tier do, block by block, what the allocator does that is asked request by request."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.paged_offload import PagedOffloadAllocator
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.offload_steps import OffloadStepAllocator
from pagedkv.scheduling.content import shared_segments, stream_of
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Blocker
from pagedkv.step_allocation import step_allocator
from pagedkv.tier_arrays import NUM_DROPPED, NUM_STORED, NUM_USED, TierArrays, tier_find, tier_store

SIZE = 4
POOL = KVPoolSettings(
    num_blocks=14, block_size=SIZE, max_num_seqs=4, max_model_len=40, enable_prefix_caching=True, offload_blocks=10
)
LIMITS = SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=40)

QUESTION = st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(4, 24), st.integers(1, 8), st.integers(1, 8))
"""Steps until it comes, whose prefix it begins with, how long that is, further prompt tokens, output tokens."""


class Twin:
    """An allocator that is asked request by request, by whoever sees what a scheduler has decided."""

    def __init__(self, pool: KVPoolSettings, scheduler: Scheduler) -> None:
        self.allocator, self.scheduler = PagedOffloadAllocator(pool), scheduler
        self.requests: dict[int, KVRequest] = {}
        self.grown: dict[int, int] = {}

    def keys(self, index: int, num_tokens: int) -> BlockKeys:
        """The keys that compiled code makes of streams."""
        record, segments = self.scheduler.requests.arrays[index], self.scheduler.requests.segments
        place, keys = int(record["first_segment"]), np.zeros((num_tokens // SIZE, 2), np.uint64)
        end = place + int(record["num_segments"])
        for i in range(len(keys)):
            while place < end and segments["end_token"][place] < (i + 1) * SIZE:
                place += 1
            word_a, word_b = stream_of(segments, place, end, index)
            keys[i] = np.uint64((int(word_a) + i) % 2**64), word_b
        return keys

    def decide(self, step: Any, preempted: list[int]) -> int:
        """Take what the step has taken; return the tokens that were found."""
        victims, found = list(preempted), 0
        for entry in range(step.num_entries):
            record = step.batch[entry]
            index, tokens = int(record["request"]), int(record["num_scheduled_tokens"])
            request = self.known(index)
            if entry >= step.num_running_before:
                found += self.allocator.get_computed_tokens(request)
            grant = self.allocator.allocate_slots(request, tokens, has_scheduled_reqs=entry > 0)
            while grant is None and entry < step.num_running_before:
                self.give_up(victims.pop(0))
                grant = self.allocator.allocate_slots(request, tokens, has_scheduled_reqs=entry > 0)
            assert grant is not None
            self.grown[index] = request.num_computed_tokens + grant.num_cached_tokens + tokens
            assert self.grown[index] == record["num_slots_needed"]
        for index in victims:  # the last of them could not go on itself
            self.give_up(index)
        return found

    def refuses(self, index: int, budget: int, *, something_runs: bool) -> bool:
        """Whether there is no room for the head of the queue either."""
        request = self.known(index)
        tokens = min(request.num_tokens - self.allocator.get_computed_tokens(request), budget)
        refused = self.allocator.allocate_slots(request, tokens, has_scheduled_reqs=something_runs) is None
        del self.requests[index]
        return refused

    def by_use(self) -> list[bytes]:
        """What is in the tier, what was used longest ago first."""
        return [kept.key for kept in sorted(self.allocator.tier._kept.values(), key=lambda kept: kept.last_access)]

    def known(self, index: int) -> KVRequest:
        num_tokens = int(self.scheduler.requests.arrays["num_known_tokens"][index])
        request = self.requests.setdefault(index, KVRequest(request_id=index, num_tokens=num_tokens))
        request.num_tokens, request.block_keys = num_tokens, self.keys(index, num_tokens)
        return request

    def give_up(self, index: int) -> None:
        if (request := self.requests.pop(index, None)) is not None:
            self.allocator.free(request)

    def complete(self, finished: list[int]) -> None:
        for index, computed in self.grown.items():
            self.requests[index].num_computed_tokens = computed
            self.allocator.note_computed(self.requests[index])
        self.grown.clear()
        for index in finished:
            self.give_up(index)


def by_use(tier: TierArrays) -> list[bytes]:
    keys, block = [], int(tier.blocks["newer"][0])
    while block:
        keys.append(np.array([tier.blocks["key_a"][block], tier.blocks["key_b"][block]]).tobytes())
        block = int(tier.blocks["newer"][block])
    return keys


@given(st.lists(QUESTION, min_size=4, max_size=14), st.integers(10, 16), st.integers(1, 24))
@settings(max_examples=100, deadline=None)
def test_steps_take_load_and_offload_what_the_allocator_does(questions: list[Any], num_blocks: int, offload_blocks: int) -> None:
    pool = replace(POOL, num_blocks=num_blocks, offload_blocks=offload_blocks)
    memory = OffloadStepAllocator(pool)
    scheduler = Scheduler(LIMITS, memory)
    twin, pending, steps, num_preempted, found = Twin(pool, scheduler), sorted(questions), 0, 0, 0
    while pending or scheduler.num_running or scheduler.num_waiting:
        while pending and pending[0][0] <= steps:
            _, text, shared, own, output = pending.pop(0)
            content = shared_segments(np.array([text]), np.array([shared]))
            scheduler.add(prompt_tokens=shared + own, output_tokens=output, content=content)
        loaded = memory.num_loaded
        step = scheduler.schedule()
        before = twin.allocator.tier.loaded_blocks
        tokens = twin.decide(step, scheduler.preempted.tolist())
        found += tokens
        assert memory.num_loaded - loaded == twin.allocator.tier.loaded_blocks - before == scheduler.moved_blocks[0]
        tier = twin.allocator.tier
        assert (memory.num_loaded, memory.num_offloaded, memory.num_dropped, memory.num_kept) == (
            tier.loaded_blocks,
            tier.offloaded_blocks,
            tier.dropped_blocks,
            len(tier),
        )
        assert by_use(memory.tier) == twin.by_use()
        assert memory.pool.free_queue().tolist() == twin.allocator.manager.free_queue().tolist()
        for entry in range(step.num_entries):
            table = memory.tables.of(int(step.batch["row"][entry])).tolist()
            assert table == twin.allocator.manager.block_table(twin.requests[int(step.batch["request"][entry])]).tolist()
        if step.blocker is Blocker.KV_MEMORY and not step.num_preempted:
            budget = LIMITS.max_num_batched_tokens - int(step.batch["num_scheduled_tokens"][: step.num_entries].sum())
            assert twin.refuses(int(scheduler.waiting()[0]), budget, something_runs=scheduler.num_running > 0)
        scheduler.complete()
        twin.complete(scheduler.finished.tolist())
        scheduler.check_integrity()
        twin.allocator.check_integrity()
        num_preempted += step.num_preempted
        steps += 1
    event(f"loads: {memory.num_loaded > 0}")
    event(f"drops: {memory.num_dropped > 0}")
    event(f"preempts: {num_preempted > 0}")
    hits = int(scheduler.requests.arrays["num_hit_tokens"].sum())
    assert hits == found


def test_the_tier_forgets_what_was_used_longest_ago_but_for_what_is_to_be_loaded() -> None:
    tier = TierArrays.empty(num_blocks=3, most_hits=4, most_removed=4)
    nothing = np.zeros(0, np.int32)
    one = np.uint64(1)
    for key in (8, 16, 24):  # all in one bucket
        tier_store(tier, np.uint64(key), one, nothing)
    tier_store(tier, np.uint64(8), one, nothing)  # a use
    first = tier_find(tier, np.uint64(16), one)
    tier_store(tier, np.uint64(32), one, np.array([first], np.int32))
    assert [tier_find(tier, np.uint64(key), one) > 0 for key in (8, 16, 24, 32)] == [True, True, False, True]
    assert tier.counts[[NUM_USED, NUM_STORED, NUM_DROPPED]].tolist() == [3, 4, 1]
    everything = np.array([1, 2, 3], np.int32)
    tier_store(tier, np.uint64(40), one, everything)
    assert tier_find(tier, np.uint64(40), one) == 0
    assert tier.counts[[NUM_USED, NUM_STORED, NUM_DROPPED]].tolist() == [3, 4, 2]
    tier.check_integrity()


def test_a_tier_that_lost_a_block_is_noticed() -> None:
    tier = TierArrays.empty(num_blocks=4, most_hits=4, most_removed=4)
    for key in range(3):
        tier_store(tier, np.uint64(key), np.uint64(1), np.zeros(0, np.int32))
    tier.buckets[0] = 0
    with pytest.raises(IntegrityError, match="second tier: 3 blocks in use"):
        tier.check_integrity()


def test_a_fork_takes_its_tail_from_the_cache_and_what_was_there_goes_to_the_tier() -> None:
    pool = replace(POOL, num_blocks=8, max_num_seqs=2, max_model_len=24)
    memory = OffloadStepAllocator(pool)
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=2, max_model_len=24), memory)

    def run(request: int) -> None:
        while scheduler.requests.arrays["row"][request] >= 0 or scheduler.num_waiting:
            scheduler.schedule()
            scheduler.complete()
            scheduler.check_integrity()

    run(scheduler.add(prompt_tokens=16, output_tokens=5) or 0)  # leaves 5 blocks with keys of 7
    parent = scheduler.add(prompt_tokens=6, output_tokens=4)
    assert parent is not None
    scheduler.schedule()
    scheduler.complete()
    scheduler.fork(parent)
    before = memory.num_offloaded
    scheduler.schedule()
    assert memory.copies.tolist()
    assert memory.num_offloaded == before + 1
    scheduler.complete()
    run(parent)


@pytest.mark.parametrize("caches", [True, False])
def test_without_a_cache_there_is_nothing_to_offload_and_without_a_tier_no_place(caches: bool) -> None:
    pool = replace(POOL, offload_blocks=0, enable_prefix_caching=caches)
    if caches:
        with pytest.raises(ConfigError, match="offload-blocks is 0"):
            step_allocator("paged-offload", pool)
    else:
        assert isinstance(step_allocator("paged-offload", pool), OffloadStepAllocator)
