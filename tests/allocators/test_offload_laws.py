"""Blocks come back from the second tier as they left, under random use."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_world import POOL, World

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.paged_offload import PagedOffloadAllocator
from pagedkv.events import key_bytes
from pagedkv.fuzz_owner import FuzzCounts
from pagedkv.fuzzing import FuzzFailure, fuzz
from pagedkv.offload_tier import TIER_POLICIES
from pagedkv.sims.fuzz_command import choose_from


def run_fuzz(pool: KVPoolSettings, monkeypatch: pytest.MonkeyPatch, make: Any, *, ops: int, seed: int) -> FuzzCounts:
    monkeypatch.setitem(ALLOCATORS._registered, "paged-offload", make)
    return fuzz("paged-offload", pool, choose_from(seed), ops=ops, seed=seed, check_every=50)


@pytest.mark.parametrize("policy", TIER_POLICIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"offload_blocks": 1},
        {"offload_blocks": 5, "block_size": 2, "num_blocks": 16},
        {"offload_blocks": 40, "eviction": "lfu"},
        {"offload_blocks": 6, "prefix_match_unit": 2},
        {"offload_blocks": 6, "prefix_match_unit": 1, "eviction": "fifo"},
        {"offload_blocks": 6, "state_slots": 3, "watermark": 0.1, "reserve_full_isl": False},
    ],
    ids=str,
)
def test_random_requests_find_what_they_computed(changes: dict[str, Any], policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shadow memory runs the copies, host slots included; keys told by events are those of the pool."""
    made: list[PagedOffloadAllocator] = []

    def make(pool: KVPoolSettings) -> PagedOffloadAllocator:
        made.append(PagedOffloadAllocator(pool, tier_eviction=policy))
        return made[-1]

    pool = replace(POOL, **{"num_blocks": 9, **changes})
    counts = run_fuzz(pool, monkeypatch, make, ops=3000, seed=3)
    assert made[-1].tier.offloaded_blocks > 20
    assert made[-1].tier.loaded_blocks > 5
    assert counts.refusals > 20


class LoadsLate(PagedOffloadAllocator):
    """Copies from the tier before it copies there."""

    def allocate_slots(self, *args: Any, **more: Any) -> Any:
        grant = super().allocate_slots(*args, **more)
        return None if grant is None else grant._replace(copies=grant.copies[::-1])


class ForgetsToOffload(PagedOffloadAllocator):
    def allocate_slots(self, *args: Any, **more: Any) -> Any:
        grant = super().allocate_slots(*args, **more)
        return None if grant is None else grant._replace(copies=grant.copies[grant.copies[:, 1] < self.num_slots])


class PinsNothing(PagedOffloadAllocator):
    """Lets what is to be loaded be overwritten."""

    def _offload(self, *, pinned: frozenset[int]) -> Any:
        return super()._offload(pinned=frozenset())


@pytest.mark.parametrize("kind", [LoadsLate, ForgetsToOffload, PinsNothing])
def test_a_broken_tier_is_caught(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FuzzFailure, match="holds something else"):
        run_fuzz(replace(POOL, num_blocks=9, offload_blocks=3), monkeypatch, kind, ops=20_000, seed=1)


@settings(max_examples=30)
@given(words=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=4, max_size=12))
def test_a_tier_only_adds_hits(words: list[list[int]]) -> None:
    """The same requests, one after the other, with a tier that never drops anything: each finds at least all it found before."""
    pool = replace(POOL, offload_blocks=1000)
    world, plain = World(pool), ALLOCATORS.load("paged")(pool)
    seen: set[bytes] = set()
    for tokens in words:
        guest = world.guest(tokens)
        hit = world.cached(tokens)
        keys = key_bytes(guest.request.block_keys[: (len(tokens) - 1) // 4])
        run = next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        assert hit == 4 * run >= plain.get_computed_tokens(guest.request)
        world.run(tokens)
        other = guest.request
        assert plain.allocate_slots(other, other.num_tokens - plain.get_computed_tokens(other)) is not None
        plain.free(other)
        seen |= set(key_bytes(guest.script.keys[: len(tokens) // 4]))
