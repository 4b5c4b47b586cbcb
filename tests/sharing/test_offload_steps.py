"""Steps over paged memory with a second tier do, block by block, what the allocator does that is asked request by request."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from step_twin import StepTwin

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.paged_offload import PagedOffloadAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.offload_steps import OffloadStepAllocator
from pagedkv.scheduling.content import shared_segments
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


class Twin(StepTwin):
    """With a second tier."""

    allocator: PagedOffloadAllocator

    def by_use(self) -> list[bytes]:
        """What is in the tier, what was used longest ago first."""
        return [kept.key for kept in sorted(self.allocator.tier._kept.values(), key=lambda kept: kept.last_access)]


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
    twin = Twin(PagedOffloadAllocator(pool), scheduler, hash_block_size=SIZE, max_num_batched_tokens=LIMITS.max_num_batched_tokens)
    pending, steps, num_preempted, found = sorted(questions), 0, 0, 0
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
            assert twin.refuses(int(scheduler.waiting()[0]), step, something_runs=scheduler.num_running > 0)
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
