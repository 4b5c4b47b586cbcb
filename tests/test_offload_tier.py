"""The second tier: what it keeps, by which policy, and that blocks come back from it as they left, under random use."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.paged_offload import PagedOffloadAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.events import BlockRemoved, EventLog, key_bytes
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzz_owner import FuzzCounts, FuzzOwner
from pagedkv.fuzzing import FuzzFailure, fuzz
from pagedkv.offload_tier import TIER_POLICIES, OffloadTier, tier_blocks
from pagedkv.shadow_memory import check_unchanged, state_of
from pagedkv.sims.fuzz_command import choose_from

POOL = KVPoolSettings(num_blocks=6, block_size=4, max_num_seqs=4, max_model_len=24, enable_prefix_caching=True, offload_blocks=4)
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


class World:
    """An allocator and its owner; every operation is checked against the shadow of its memory, host slots included."""

    def __init__(self, pool: KVPoolSettings = POOL, **more: Any) -> None:
        self.pool = pool
        self.allocator = PagedOffloadAllocator(pool, **more)
        self.owner = FuzzOwner(self.allocator, pool)
        self.log = EventLog()
        self.allocator.events = self.log
        self.num_guests = 0

    @property
    def tier(self) -> OffloadTier:
        return self.allocator.tier

    def guest(self, tokens: Any, output: int = 1) -> Guest:
        self.num_guests += 1
        script = Script(tokens=np.array([*tokens, *[99] * output], np.int32), block_size=self.pool.block_size)
        return Guest(script, name=self.num_guests, prompt_tokens=len(list(tokens)), output_tokens=output)

    def cached(self, tokens: Any) -> int:
        return self.allocator.get_computed_tokens(self.guest(tokens).request)

    def admit(self, tokens: Any) -> Guest:
        guest = self.guest(tokens)
        assert self.owner.admit(guest, guest.prompt_tokens)
        return guest

    def run(self, tokens: Any) -> None:
        self.owner.free(self.admit(tokens))


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


def test_a_tier_of_no_blocks_keeps_nothing() -> None:
    tier = OffloadTier(num_blocks=0)
    assert (tier.store(KEYS[0]), tier.lookup(KEYS), tier.dropped_blocks) == (None, [], 1)
    tier.check_integrity()


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


def test_integrity_of_a_tier() -> None:
    tier = OffloadTier(num_blocks=2)
    tier.store(KEYS[0])
    tier._empty.append(0)
    with pytest.raises(IntegrityError, match="second tier"):
        tier.check_integrity()


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
