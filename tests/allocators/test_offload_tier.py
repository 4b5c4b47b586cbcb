"""The second tier by itself: what it keeps, by which policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offload_world import POOL

from pagedkv.allocators.paged_offload import PagedOffloadAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.offload_tier import TIER_POLICIES, OffloadTier, tier_blocks
from pagedkv.shadow_memory import check_unchanged, state_of

KEYS = [bytes([i]) * 16 for i in range(8)]


class NaiveTier:
    """What is kept, in plain words: one dict, one key function per policy."""

    RANK: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "lru": lambda kept: kept["used"],
        "fifo": lambda kept: kept["stored"],
        "lfu": lambda kept: (kept["uses"], kept["used"]),
    }

    def __init__(self, size: int, policy: str) -> None:
        self.size, self.policy, self.time, self.kept = size, policy, 0, dict[bytes, dict[str, int]]()

    def use(self, key: bytes) -> None:
        self.time += 1
        self.kept[key]["used"] = self.time
        self.kept[key]["uses"] += 1

    def store(self, key: bytes, pinned: set[bytes]) -> None:
        if key in self.kept:
            return self.use(key)
        if len(self.kept) == self.size:
            candidates = [each for each in self.kept if each not in pinned]
            if not candidates:
                return None
            del self.kept[min(candidates, key=lambda each: self.RANK[self.policy](self.kept[each]))]
        self.time += 1
        self.kept[key] = {"stored": self.time, "used": self.time, "uses": 1}
        return None


@given(
    size=st.integers(1, 4),
    policy=st.sampled_from(TIER_POLICIES),
    steps=st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.sets(st.integers(0, 7), max_size=3)), max_size=60),
)
def test_a_tier_keeps_what_its_policy_says(size: int, policy: str, steps: list[tuple[int, bool, set[int]]]) -> None:
    """Against the naive tier. Blocks with content never move; what was copied in is there or dropped."""
    tier, naive, place = OffloadTier(num_blocks=size, eviction=policy, block_bytes=10), NaiveTier(size, policy), dict[bytes, int]()
    attempts = loads = 0
    for which, load, pins in steps:
        key, pinned = KEYS[which], {KEYS[i] for i in pins if KEYS[i] in naive.kept}
        if load and key in naive.kept:
            tier.load(tier.lookup([key]))
            naive.use(key)
            loads += 1
        else:
            known = key in tier
            block = tier.store(key, pinned={place[each] for each in pinned})
            naive.store(key, pinned)
            attempts += not known
            if block is not None:
                place[key] = block
            assert (block is None) == (known or key not in naive.kept)
        assert set(tier.keys()) == set(naive.kept)
        assert all(tier.lookup([each]) == [place[each]] for each in naive.kept)
        tier.check_integrity()
    assert attempts - tier.dropped_blocks == len(tier) <= size
    assert (tier.loaded_bytes, tier.loaded_blocks) == (10 * loads, loads)


def test_the_heap_of_a_tier_stays_small() -> None:
    tier = OffloadTier(num_blocks=3)
    for i in range(1000):
        tier.store(KEYS[i % 3])
    assert len(tier._heap) <= 64


def test_a_lookup_ends_at_the_first_key_that_is_missing_and_counts_for_nothing() -> None:
    tier = OffloadTier(num_blocks=3)
    for key in KEYS[:3]:
        tier.store(key)
    before = state_of(tier)
    assert tier.lookup([KEYS[1], KEYS[7], KEYS[2]]) == [1]
    check_unchanged(before, state_of(tier))


def test_clearing_forgets_content_and_keeps_counts() -> None:
    tier = OffloadTier(num_blocks=2)
    tier.store(KEYS[0])
    tier.clear()
    tier.check_integrity()
    assert (len(tier), tier.offloaded_blocks, tier.store(KEYS[0])) == (0, 1, 0)


def test_the_budget_note_says_whose_memory_it_is() -> None:
    def note(**more: Any) -> str:
        return OffloadTier(num_blocks=1024, block_bytes=1 << 20, **more).budget_note

    assert "1,024 blocks (1.00 GiB) of host memory" in note()
    assert "same budget as the KV cache" in note(unified_memory=True)
    assert note(kind="nvme") == note(kind="nvme", unified_memory=True)
    assert "no memory" in note(kind="nvme")
    assert "GiB" not in OffloadTier(num_blocks=4).budget_note


def test_tier_blocks_are_whole_blocks() -> None:
    assert (tier_blocks(100, 30), tier_blocks(30, 30)) == (3, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tier_blocks(29, 30), "29 bytes has no room for a block of 30"),
        (lambda: tier_blocks(29, 0), "blocks of 0 bytes: needs 1 or more"),
        (lambda: OffloadTier(num_blocks=-1), "second tier of -1 blocks"),
        (lambda: OffloadTier(num_blocks=1, block_bytes=0), "of 0 bytes: needs 0 or more, and 1 or more"),
        (lambda: OffloadTier(num_blocks=1, kind="hosts"), "unknown kind of tier 'hosts': did you mean host"),  # type: ignore[arg-type]
        (lambda: OffloadTier(num_blocks=1, eviction="slru"), "unknown eviction policy of a second tier 'slru': did you mean lru"),
        (lambda: OffloadTier(num_blocks=1).offloaded_bytes, "set its block_bytes"),
        (lambda: replace(POOL, offload_blocks=-1), "offload-blocks is -1"),
        (lambda: PagedOffloadAllocator(replace(POOL, offload_blocks=0)), "offload-blocks is 0: paged-offload needs 1 or more"),
        (lambda: PagedOffloadAllocator(POOL, tier_eviction="random"), "unknown eviction policy of a second tier"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_tier_of_no_blocks_keeps_nothing() -> None:
    tier = OffloadTier(num_blocks=0)
    assert (tier.store(KEYS[0]), tier.lookup(KEYS), tier.dropped_blocks) == (None, [], 1)
    tier.check_integrity()


def test_integrity_of_a_tier() -> None:
    tier = OffloadTier(num_blocks=2)
    tier.store(KEYS[0])
    tier._empty.append(0)
    with pytest.raises(IntegrityError, match="second tier"):
        tier.check_integrity()
