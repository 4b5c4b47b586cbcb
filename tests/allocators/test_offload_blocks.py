"""Which blocks go to the second tier and come back, and in which order they are copied."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from offload_world import POOL, World

from pagedkv.errors import ConfigError
from pagedkv.events import BlockRemoved, key_bytes
from pagedkv.fuzz_guest import Script
from pagedkv.offload_tier import OffloadTier
from pagedkv.shadow_memory import check_unchanged, state_of

A, B, C = range(16), range(100, 116), range(200, 216)
"""Prompts of 4 full blocks; the pool has 5 besides the null block."""


def tokens_of(tier: OffloadTier, prompt: Any) -> int:
    """Leading blocks of `prompt` in the tier."""
    return len(tier.lookup(key_bytes(Script(tokens=np.array(prompt, np.int32), block_size=4).keys)))


def test_evicted_blocks_are_offloaded_tail_first_and_come_back() -> None:
    """B takes the free block and 3 of A's, from its tail on. C takes what is left of A, and 3 of B's: the tier drops A's tail."""
    world = World()
    world.run(A)
    assert (len(world.tier), world.cached(A)) == (0, 12)
    world.run(B)
    assert (world.tier.offloaded_blocks, tokens_of(world.tier, A), world.cached(A)) == (3, 0, 12)
    world.run(C)
    assert (world.tier.offloaded_blocks, world.tier.dropped_blocks) == (7, 3)
    assert (world.cached(A), world.cached(B)) == (4, 12)
    again = world.admit(B)
    assert (world.tier.loaded_blocks, again.request.num_computed_tokens) == (2, 16)


def test_the_lookup_goes_on_where_the_pool_ends() -> None:
    """One block of A is still in the pool, two come from the tier: only these are copied."""
    world = World()
    world.run(A)
    world.run(B)
    assert world.cached(A) == 4 + 8
    copies = world.owner.counts.copies
    world.admit(A)
    assert world.tier.loaded_blocks == 2
    assert world.owner.counts.copies - copies >= 2 * 4


def test_copies_come_in_an_order_that_loses_nothing() -> None:
    """To the tier first, from it last: B's blocks are loaded into those that C's must leave, and stay in a tier that is full."""
    world = World(replace(POOL, offload_blocks=3))
    for prompt in (A, B, C):
        world.run(prompt)
    found = world.tier.lookup(key_bytes(world.guest(B).script.keys[1:3]))
    guest = world.guest(B)
    hit = world.allocator.get_computed_tokens(guest.request)
    grant = world.allocator.allocate_slots(guest.request, 16 - hit)
    assert grant is not None
    assert (len(found), hit, grant.num_cached_tokens) == (2, 12, 12)
    sources, targets = (grant.copies // 4).T[:, ::4].tolist()
    assert [source - 6 for source in sources[-2:]] == found
    assert targets[-2:] == world.allocator.manager.block_table(guest.request).tolist()[1:3]
    assert min(targets[:-2]) >= 6 > max(sources[:-2])
    assert set(sources[:-2]) >= set(targets[-2:])
    assert {target - 6 for target in targets[:-2]}.isdisjoint(found)


def test_a_block_that_the_tier_has_already_is_not_copied_again() -> None:
    world = World(replace(POOL, offload_blocks=16))
    for _ in range(6):
        world.run(A)
        world.run(B)
    assert world.tier.offloaded_blocks <= 8
    assert world.tier.loaded_blocks > 8


def test_what_another_block_of_the_pool_has_too_is_not_offloaded() -> None:
    """Two requests compute the same block at once; the block of one goes, that of the other stays."""
    world = World(replace(POOL, num_blocks=7))
    first, second = world.admit(A[:4]), world.admit(A[:4])  # a prompt's last block is never a hit: both compute it
    world.owner.free(first)
    world.run([*B, 1])
    removed = [key for event in world.log if isinstance(event, BlockRemoved) for key in event.keys]
    assert key_bytes(first.request.block_keys)[0] in removed
    assert len(world.tier) == 0
    world.owner.free(second)


def test_nothing_is_shared_or_kept_without_prefix_caching() -> None:
    world = World(replace(POOL, enable_prefix_caching=False))
    for prompt in (A, B, A, C, A):
        world.run(prompt)
    assert (len(world.tier), world.tier.offloaded_blocks, world.cached(A)) == (0, 0, 0)


def test_a_refusal_leaves_the_tier_as_it_was() -> None:
    """What would be loaded does not fit beside what others hold."""
    world = World()
    world.run(A)
    holder = world.admit(B)
    assert world.cached(A) > 0
    before = state_of(world.allocator)
    assert not world.owner.admit(world.guest(A), 16)
    check_unchanged(before, state_of(world.allocator))
    world.owner.free(holder)
    world.admit(A)


@pytest.mark.parametrize(
    ("num_new_tokens", "changed", "message"),
    [(0, {}, "0 new"), (16, {}, "more than max_model_len 24"), (1, {"num_computed_tokens": 4}, "set it to what is held")],
)
def test_numbers_that_cannot_be_are_refused_with_hits_in_the_tier(
    num_new_tokens: int, changed: dict[str, int], message: str
) -> None:
    world = World()
    world.run(A)
    world.run(B)
    request = world.guest(A).request
    for name, value in changed.items():
        setattr(request, name, value)
    before = state_of(world.allocator)
    with pytest.raises(ConfigError, match=message):
        world.allocator.allocate_slots(request, num_new_tokens)
    check_unchanged(before, state_of(world.allocator))


def test_a_reset_of_the_prefix_cache_empties_the_tier_too() -> None:
    """What was computed with other weights must not come back."""
    world = World()
    world.run(A)
    world.run(B)
    assert world.allocator.manager.reset_prefix_cache()
    assert (len(world.tier), world.cached(A), world.cached(B)) == (0, 0, 0)


def test_without_a_prefix_cache_there_is_nothing_to_offload() -> None:
    world = World(replace(POOL, offload_blocks=0, enable_prefix_caching=False))
    for tokens in (A, B, A):
        world.run(tokens)
    assert (world.tier.num_blocks, len(world.tier), world.tier.dropped_blocks) == (0, 0, 0)
