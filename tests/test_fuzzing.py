"""The fuzzer and its oracle: what a seed means, what a failure tells, and that nothing escapes the shadow memory."""

import json
from collections import OrderedDict, deque
from contextlib import nullcontext
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import NO_SLOT, Forkable, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzz_owner import MISUSES
from pagedkv.fuzzing import FuzzFailure, fuzz, fuzz_owner, fuzz_settings, settings_read
from pagedkv.heaps import HEAPS
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import ShadowMemory, check_unchanged, prefix_identities, state_of
from pagedkv.sims.fuzz_command import ALL, choose_from, run_fuzz

POOL = KVPoolSettings(num_blocks=12, block_size=4, max_num_seqs=4, max_model_len=16, enable_prefix_caching=True)
PROMPTS = st.tuples(st.sampled_from(["", "tenant"]), st.lists(st.integers(0, 2), max_size=6))


@given(PROMPTS, PROMPTS)
def test_identities_tell_prefixes_and_namespaces_apart(one: tuple[str, list[int]], other: tuple[str, list[int]]) -> None:
    for i, a in enumerate(prefix_identities(one[1], one[0])):
        for j, b in enumerate(prefix_identities(other[1], other[0])):
            assert (a == b) == (one[0] == other[0] and one[1][: i + 1] == other[1][: j + 1])


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_random_operations_keep_the_laws(name: str) -> None:
    for i, pool in enumerate(fuzz_settings(name)):
        counts = fuzz(name, pool, choose_from(i), ops=1500, seed=i)
        assert counts.grants > 100
        assert counts.misuses > 5


def test_a_run_tries_what_it_should() -> None:
    counts = fuzz("paged", POOL, choose_from(1), ops=10_000, seed=1)
    assert min(counts.grants, counts.refusals, counts.hit_tokens, counts.misuses) > 100


@pytest.mark.parametrize(("name", "missing"), [("paged", {"tokens left out"}), ("llama-cpp-unified", {"keys left out"})])
def test_every_misuse_is_refused(name: str, missing: set[str]) -> None:
    owner, script = fuzz_owner(name, POOL), Script(tokens=np.arange(16, dtype=np.int32), block_size=4)
    guests = [Guest(script, name=i, prompt_tokens=5, output_tokens=2) for i in range(5)]
    refused = set()
    for guest in guests:
        assert owner.arrive(guest)
    for running in range(5):
        for kind in MISUSES:
            before = owner.counts.misuses
            owner.misuse(kind, guests[0])
            owner.misuse(kind, guests[4])
            if owner.counts.misuses > before:
                refused.add(kind)
        if running < 4:
            assert owner.admit(guests[running], 5)
    forks = set() if isinstance(owner.allocator, Forkable) else {"fork of nothing", "fork onto slots"}
    assert refused == set(MISUSES) - missing - forks


def test_same_seed_same_operations() -> None:
    runs = [fuzz("paged", POOL, choose_from(seed), ops=2000, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert fuzz("paged", POOL, choose_from(1), ops=2000, seed=1, check_every=1) == runs[0]  # checks draw nothing


class MiscountsLater(PagedAllocator):
    """Goes wrong with its 500th allocation, where only the full checks look."""

    allocations = 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        grant = super().allocate_slots(request, num_new_tokens, has_scheduled_reqs=has_scheduled_reqs)
        self.allocations += grant is not None
        return grant

    @property
    def rounding_slots(self) -> int:
        return int(self.allocations >= 500)


@pytest.fixture
def miscounting(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(ALLOCATORS._registered, "miscounting", MiscountsLater)
    return "miscounting"


def test_a_failure_tells_all_that_shows_it_again(miscounting: str) -> None:
    with pytest.raises(FuzzFailure) as found:
        fuzz(miscounting, POOL, choose_from("s"), ops=10_000, seed="s")
    failure = found.value
    text = str(failure)
    assert all(
        part in text for part in ("1 of rounding", miscounting, "num_blocks=12", "seed 's'", f"operation {failure.operation}")
    )
    assert "growth of request" in text
    with pytest.raises(FuzzFailure) as again:
        fuzz(miscounting, failure.settings, choose_from(failure.seed), ops=failure.operation + 1, seed=failure.seed)
    assert str(again.value) == text


def test_a_failure_is_traced_to_the_operation_that_caused_it(miscounting: str) -> None:
    result = next(r for r in run_fuzz((miscounting,), ops=24_000, seed=3) if r.settings == fuzz_settings(miscounting)[0])
    assert result.failure
    first = result.ops - 1
    fuzz(miscounting, result.settings, choose_from(result.seed), ops=first, seed=result.seed)
    with pytest.raises(FuzzFailure):
        fuzz(miscounting, result.settings, choose_from(result.seed), ops=result.ops, seed=result.seed)


def test_an_error_of_the_allocator_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashes(PagedAllocator):
        def preempt(self, request: KVRequest) -> None:
            raise IndexError("index 7 is out of bounds")

    monkeypatch.setitem(ALLOCATORS._registered, "crashes", Crashes)
    with pytest.raises(FuzzFailure, match="index 7"):
        fuzz("crashes", POOL, choose_from(1), ops=1000, seed=1)


def test_run_fuzz_shares_the_operations_among_pools() -> None:
    seen: list[tuple[str, float]] = []
    results = run_fuzz(("contiguous-max", "paged"), ops=999, seed=5, progress=lambda what, share: seen.append((what, share)))
    for name in ("contiguous-max", "paged"):
        assert sum(r.ops for r in results if r.allocator == name) == 999
        assert [r.settings for r in results if r.allocator == name] == list(fuzz_settings(name))
    assert not any(r.failure for r in results)
    assert [what for what, _ in seen] == sorted(what for what, _ in seen)
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert 0.0 <= seen[0][1] < seen[-1][1] < 1.0
    again = run_fuzz(("contiguous-max", "paged"), ops=999, seed=5)
    assert json.dumps([r.document() for r in again]) == json.dumps([r.document() for r in results])


def test_run_fuzz_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="did you mean paged"):
        run_fuzz(("pagd",), ops=10)
    with pytest.raises(ConfigError, match="needs 1 or more"):
        run_fuzz((ALL,), ops=0)


def test_settings_try_what_concerns_an_allocator() -> None:
    assert {pool.contiguous_heap for pool in fuzz_settings("contiguous-oracle")} == set(HEAPS.names())
    assert {pool.contiguous_heap for pool in fuzz_settings("paged")} == {"buddy"}
    assert {pool.block_size for pool in fuzz_settings("paged")} >= {1, 2, 4}
    assert {pool.enable_prefix_caching for pool in fuzz_settings("paged")} == {True, False}
    assert {pool.eviction for pool in fuzz_settings("radix")} == set(EVICTION_POLICIES.names())
    assert {pool.prefix_match_unit for pool in fuzz_settings("paged")} == {0, 1, 2}
    assert {pool.prefix_match_unit for pool in fuzz_settings("radix")} == {0}
    assert {pool.freed_to_front for pool in fuzz_settings("paged")} == {True, False}
    assert {0, 1} < {pool.offload_blocks for pool in fuzz_settings("tensorrt-llm")}
    assert {pool.max_num_batched_tokens for pool in fuzz_settings("hybrid")} == {None, 3}


def test_every_setting_that_an_allocator_reads_is_tried_with_two_values() -> None:
    told = {"max_model_len", "num_slots"}  # the first in a pool that not every allocator can work with, the second follows
    for name in ALLOCATORS.names():
        pools = fuzz_settings(name)
        for setting in settings_read(name, pools[0]) - told:
            assert len({getattr(pool, setting) for pool in pools}) > 1, (name, setting)


NO_IDENTITIES: Int64Array = np.empty(0, np.int64)


class Tables:
    """As much of an allocator as the shadow memory needs; the test says what each request holds."""

    num_slots = usable_slots = free_slots = 8
    max_model_len = max_num_seqs = 8
    state_slots = rounding_slots = 0

    def __init__(self, num_groups: int = 1) -> None:
        self.num_groups = num_groups
        self.held: dict[tuple[KVRequest, int], list[int]] = {}

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        return np.array(self.held.get((request, group), []), np.int64)


def memory_of(slots: list[int], *, windows: bool = False) -> tuple[Any, ShadowMemory, KVRequest]:
    """A request whose tokens 0, 1, 2 are in `slots`."""
    tables: Any = Tables()
    memory, request = ShadowMemory(tables, windows=windows), KVRequest(request_id="a", num_tokens=3)
    tables.held[request, 0] = slots
    memory.write(request, prefix_identities(range(4), ""), Grant(), 3)
    return tables, memory, request


MOVES = [[0, 3], [1, 0], [2, 1]]


@pytest.mark.parametrize(("moves", "is_right"), [(MOVES, True), (MOVES[::-1], False)])
def test_copies_are_made_in_order(moves: list[list[int]], is_right: bool) -> None:
    tables, memory, request = memory_of([0, 1, 2])
    tables.held[request, 0] = [3, 0, 1, 2]
    grant = Grant(copies=np.array(moves))
    with nullcontext() if is_right else pytest.raises(IntegrityError, match="slot 3 of its token 0"):
        memory.write(request, NO_IDENTITIES, grant, 1)
        memory.check_request(request)


def test_slots_of_a_host_tier_are_slots() -> None:
    tables, memory, request = memory_of([0, 1, 2])
    tables.held[request, 0] = [20, 21, 22, 23]
    memory.write(request, NO_IDENTITIES, Grant(copies=np.array([[0, 20], [1, 21], [2, 22]])), 1)
    memory.check_request(request)
    tables.held[request, 0] = [20, 21, 22, 33]
    with pytest.raises(IntegrityError, match="slot 33 of its token 3"):
        memory.check_request(request)


def test_windows_may_give_back_all_slots_but_the_last() -> None:
    tables, memory, request = memory_of([0, 1, 2], windows=True)
    tables.held[request, 0] = [NO_SLOT, 1, 2]
    memory.check_request(request)
    tables.held[request, 0] = [NO_SLOT, 1, NO_SLOT]
    with pytest.raises(IntegrityError, match="last computed token, 2, has no slot"):
        memory.check_request(request)


def test_without_windows_no_slot_may_be_missing() -> None:
    tables, memory, request = memory_of([0, 1, 2])
    tables.held[request, 0] = [NO_SLOT, 1, 2]
    with pytest.raises(IntegrityError, match="slot -1 of its token 0"):
        memory.check_request(request)


def test_groups_do_not_share_slots() -> None:
    tables: Any = Tables(num_groups=2)
    memory, request = ShadowMemory(tables), KVRequest(request_id="a", num_tokens=2)
    tables.held = {(request, 0): [0, 1], (request, 1): [2, 1]}
    memory.write(request, prefix_identities([5, 6], ""), Grant(), 2)
    with pytest.raises(IntegrityError, match="group 0"):
        memory.check_request(request)


class Thing:
    """A bit of everything that state is made of."""

    __slots__ = ("__dict__", "slot")

    def __init__(self) -> None:
        self.slot = 1
        self.array = np.arange(3)
        self.by_name = OrderedDict(a=[1, 2], b=[3])
        self.queue = deque([1, 2])
        self.names = {"x", "y"}
        self.clock = count()
        self.me = self


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: setattr(t, "slot", 2), "slot"),
        (lambda t: t.array.__setitem__(1, 7), "array"),
        (lambda t: setattr(t, "array", t.array.astype(np.int32)), "array"),
        (lambda t: t.by_name.move_to_end("a"), "by_name"),
        (lambda t: t.by_name["b"].append(4), "by_name"),
        (lambda t: t.queue.rotate(), "queue"),
        (lambda t: t.names.add("z"), "names"),
        (lambda t: next(t.clock), "clock"),
        (lambda t: setattr(t, "me", Thing()), "me"),
    ],
)
def test_no_change_of_state_escapes(change: Any, name: str) -> None:
    thing = Thing()
    before = state_of(thing)
    check_unchanged(before, state_of(thing))
    change(thing)
    with pytest.raises(IntegrityError, match=f"near '{name}'"):
        check_unchanged(before, state_of(thing))
