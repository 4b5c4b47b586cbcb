"""What requests share beyond full blocks of a prompt: forks with copy on write, tails by copy; and eviction by other policies."""

from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pagedkv.allocation import Forkable, KVPoolSettings
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.block_grant import BlockCopy
from pagedkv.block_hash import BlockHashChain
from pagedkv.errors import ConfigError
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.fuzzing import FuzzOwner, Guest, Script
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import ShadowMemory, check_unchanged, prefix_identities, state_of

SIZE = 4


def request(tokens: Any, name: str = "r", *, unit: int = 0, priority: int = 0) -> KVRequest:
    ids = np.array(list(tokens), np.int32)
    chain, units = BlockHashChain(block_size=SIZE), BlockHashChain(block_size=unit or SIZE)
    chain.extend(ids)
    units.extend(ids)
    return KVRequest(
        request_id=name, num_tokens=ids.size, token_ids=ids, block_keys=chain.keys, unit_keys=units.keys, priority=priority
    )


def pool(num_blocks: int = 9, **more: Any) -> KVPoolSettings:
    return KVPoolSettings(num_blocks=num_blocks, block_size=SIZE, max_model_len=32, **more)


def serve(cache: KVCacheManager, live: KVRequest, num_new_tokens: int | None = None, **more: Any) -> list[int] | None:
    """Allocate and count as computed what was asked for, all known tokens by default; return the blocks it has then."""
    hits, tail = cache.get_computed_blocks(live)[0], None
    if not cache.holds_blocks(live):
        tail = cache.get_computed_tail(live, hits.size)
    else:
        hits = hits[:0]
    cached = hits.size * SIZE + (tail.num_tokens if tail else 0)
    new = live.num_tokens - cached - live.num_computed_tokens if num_new_tokens is None else num_new_tokens
    if cache.allocate_slots(live, new, hits, computed_tail=tail, **more) is None:
        return None
    live.num_computed_tokens += cached + new
    cache.note_computed(live)
    cache.check_integrity()
    return cache.block_table(live).tolist()


def fork(cache: KVCacheManager, parent: KVRequest, child: KVRequest) -> None:
    """As an owner does it."""
    cache.fork(parent, child)
    assert child.num_computed_tokens == 0  # that is the owner's
    child.num_computed_tokens = parent.num_computed_tokens


def family(cache: KVCacheManager, tokens: Any, *names: str) -> list[KVRequest]:
    """Return a served request and its forks."""
    parent = request(tokens, "parent")
    serve(cache, parent)
    children = [request(tokens, name) for name in names]
    for child in children:
        fork(cache, parent, child)
    cache.check_integrity()
    return [parent, *children]


def goes_on(live: KVRequest, tokens: Any, *, unit: int = 0) -> None:
    longer = request([*live.token_ids.tolist(), *tokens], unit=unit)
    live.num_tokens, live.token_ids = longer.num_tokens, longer.token_ids
    live.block_keys, live.unit_keys = longer.block_keys, longer.unit_keys


def test_a_fork_holds_the_same_blocks_and_takes_none() -> None:
    cache = KVCacheManager(pool())
    parent, child = family(cache, range(6), "child")
    assert cache.block_table(child).tolist() == cache.block_table(parent).tolist() == [1, 2]
    assert child.num_computed_tokens == 6
    assert cache.num_free_blocks == 6
    cache.free(parent)
    assert cache.num_free_blocks == 6
    cache.free(child)
    assert cache.num_free_blocks == 8


@pytest.mark.parametrize("enable_caching", [False, True])
def test_the_first_writer_gets_a_copy_and_the_last_one_none(enable_caching: bool) -> None:
    cache = KVCacheManager(pool(), enable_caching=enable_caching)
    parent, child = family(cache, range(6), "child")
    for live, last in ((parent, 7), (child, 8)):
        goes_on(live, [last])
    assert serve(cache, child) == [1, 3]
    assert list(cache.take_copies()) == [BlockCopy(2, 3, 2)]
    assert serve(cache, parent) == [1, 2]
    assert not cache.take_copies()


def test_a_full_block_needs_no_copy_and_neither_does_an_empty_one() -> None:
    cache = KVCacheManager(pool())
    parent, child = request(range(4), "parent"), request(range(4), "child")
    serve(cache, parent, num_lookahead_tokens=4)
    fork(cache, parent, child)
    goes_on(child, [9])
    assert serve(cache, child) == [1, 3]  # block 2 was for drafts of the parent: nothing of the child is in it
    assert not cache.take_copies()


def test_a_block_that_the_parent_keeps_for_later_is_shared_until_it_is_written() -> None:
    cache = KVCacheManager(pool())
    parent, child = request(range(6), "parent"), request(range(6), "child")
    serve(cache, parent, num_lookahead_tokens=6)
    fork(cache, parent, child)
    goes_on(child, [9])
    assert serve(cache, child) == [1, 4, 3]
    assert list(cache.take_copies()) == [BlockCopy(2, 4, 2)]
    goes_on(child, [9])
    assert serve(cache, child, num_lookahead_tokens=4) == [1, 4, 5]  # block 4 is its own by now, and stays where it is
    assert not cache.take_copies()


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_a_full_block_is_not_written_though_its_key_came_from_another_fork(eviction: str) -> None:
    """Two tokens are drafts. They turn out right for the parent only, which registers the block and goes."""
    cache = KVCacheManager(pool(eviction=eviction))
    parent, child = request(range(6), "parent"), request(range(6), "child")
    serve(cache, parent, 8)
    fork(cache, parent, child)
    goes_on(parent, [6, 7, 8])
    serve(cache, parent)
    cache.free(parent)
    goes_on(child, [66, 77])
    child.num_computed_tokens = 6
    assert serve(cache, child) == [1, 3]
    assert list(cache.take_copies()) == [BlockCopy(2, 3, 2)]
    assert cache.get_computed_blocks(request(range(9)))[0].tolist() == [1, 2]
    assert cache.get_computed_blocks(child)[0].tolist() == [1]
    cache.free(child)
    cache.check_integrity()


def test_one_key_on_a_shared_full_block_is_enough() -> None:
    """The drafts turn out right for both: the block carries their common key once, besides a block of somebody else."""
    cache = KVCacheManager(pool())
    serve(cache, request(range(8), "other"))
    parent, child = request(range(6), "parent"), request(range(6), "child")
    serve(cache, parent, 4)
    fork(cache, parent, child)
    for live in (parent, child):
        goes_on(live, [6, 7, 8])
        serve(cache, live)
        assert cache.block_table(live)[:2].tolist() == [1, 3]
    assert not cache.take_copies()


def test_replacements_count_and_a_refusal_changes_nothing() -> None:
    cache = KVCacheManager(pool(num_blocks=4))
    parent, child = family(cache, range(6), "child")
    for live in (parent, child):
        goes_on(live, [1, 2, 3])
    before = state_of(cache)
    assert serve(cache, child) is None  # one block to go on in, one to replace the shared one, and one is free
    check_unchanged(before, state_of(cache))
    assert serve(cache, child, 2) == [1, 3]
    assert serve(cache, parent) is None
    cache.free(child)
    assert serve(cache, parent) == [1, 2, 3]


def test_beams_part_and_go_and_every_one_finds_what_it_computed() -> None:
    """Beam search: each step forks the winners, drops the losers, and every beam writes a token of its own."""
    allocator = PagedAllocator(pool(num_blocks=40, enable_prefix_caching=True, max_num_seqs=8))
    assert isinstance(allocator, Forkable)
    memory, names = ShadowMemory(allocator), count()

    def write(live: KVRequest, num_tokens: int) -> int:
        grant = allocator.allocate_slots(live, num_tokens)
        assert grant is not None
        memory.write(live, prefix_identities(live.token_ids, ""), grant, num_tokens)
        return len(grant.copies)

    def beam_like(parent: KVRequest) -> KVRequest:
        child = request(parent.token_ids, f"beam {next(names)}")
        allocator.fork(parent, child)
        memory.fork(parent, child, prefix_identities(child.token_ids, ""))
        return child

    beams, copied = [request(range(6), "first")], 0
    write(beams[0], 6)
    beams += [beam_like(beams[0]) for _ in range(3)]
    for step in range(20):
        for i, beam in enumerate(beams):
            goes_on(beam, [100 * i + step])
            memory.identities[beam] = (prefix_identities(beam.token_ids, ""),)
            copied += write(beam, 1)
        memory.check()
        winners, losers = beams[step % 3 : step % 3 + 2], [*beams[: step % 3], *beams[step % 3 + 2 :]]
        for loser in losers:
            allocator.free(loser)
            memory.forget(loser)
        beams = [child for winner in winners for child in (winner, beam_like(winner))]
        memory.check()
    assert copied > 40
    for beam in beams:
        allocator.free(beam)
        memory.forget(beam)
    memory.check()


def test_a_fork_that_cannot_be_is_told_and_changes_nothing() -> None:
    cache = KVCacheManager(pool(max_num_seqs=2))
    parent, child = family(cache, range(6), "child")
    stateful, only = KVCacheManager(pool(state_slots=1)), request(range(6))
    serve(stateful, only)
    before = state_of((cache, stateful))
    bad = {
        "holds no blocks": (cache, request(range(6)), request(range(6))),
        "holds blocks already": (cache, parent, child),
        "7 known tokens: needs the 6": (cache, parent, request(range(7))),
        "its keys are not those": (cache, parent, request(range(1, 7))),
        "2 requests hold slots already": (cache, parent, request(range(6))),
        "cannot share a state": (stateful, only, request(range(6))),
    }
    for message, (manager, one, other) in bad.items():
        with pytest.raises(ConfigError, match=message):
            manager.fork(one, other)
    check_unchanged(before, state_of((cache, stateful)))


def tails(num_blocks: int = 9, unit: int = 1, **more: Any) -> KVCacheManager:
    return KVCacheManager(pool(num_blocks, prefix_match_unit=unit, **more))


def test_a_tail_is_copied_into_a_block_of_its_own() -> None:
    cache, first, second = tails(), request(range(10), "first", unit=1), request([*range(7), 77, 88, 99], "second", unit=1)
    assert serve(cache, first) == [1, 2, 3]
    cache.free(first)
    assert cache.get_computed_tail(second, 1) == (2, 3)
    assert serve(cache, second) == [1, 3, 4]
    assert second.num_computed_tokens == 10
    assert list(cache.take_copies()) == [BlockCopy(2, 3, 3)]
    assert cache.get_computed_blocks(first)[0].tolist() == [1, 2]


def test_a_tail_ends_with_a_unit_and_before_the_last_token() -> None:
    cache, first = tails(unit=2), request(range(8), unit=2)
    serve(cache, first)
    for tokens, expected in (
        ([0, 1, 2, 9], (1, 2)),
        ([0, 1, 2, 3], (1, 2)),
        ([0, 1], None),
        ([0, 9, 2], None),
        ([0, 1, 2], (1, 2)),
    ):
        assert cache.get_computed_tail(request(tokens, unit=2), 0) == expected


def test_the_unfinished_block_of_a_finished_request_serves_until_it_is_reused() -> None:
    cache, first, other = tails(num_blocks=4), request(range(6), unit=1), request(range(100, 105), "other", unit=1)
    serve(cache, first)
    cache.free(first)
    follower = request([*range(6), 77], unit=1)
    assert cache.get_computed_tail(follower, 1) == (2, 2)
    assert serve(cache, other) == [2, 3]
    assert cache.get_computed_blocks(follower)[0].tolist() == [1]
    assert cache.get_computed_tail(follower, 1) is None


def test_a_tail_is_found_only_once_it_is_computed() -> None:
    cache, first, second = tails(), request(range(8), unit=1), request([0, 1, 2, 9], unit=1)
    cache.allocate_slots(first, 8)
    assert cache.get_computed_tail(second, 0) is None
    first.num_computed_tokens = 6
    cache.note_computed(first)
    assert cache.get_computed_tail(second, 0) == (1, 3)
    assert cache.get_computed_tail(request([*range(7), 9], unit=1), 1) == (2, 2)


def test_what_was_copied_is_found_when_its_source_is_gone() -> None:
    cache, parent, child = tails(num_blocks=4), request(range(2), "parent", unit=1), request(range(2), "child", unit=1)
    serve(cache, parent)
    old = request([60, 61], "old", unit=1)
    assert serve(cache, old) == [2]
    cache.free(old)
    fork(cache, parent, child)
    assert cache.get_computed_tail(old, 0) == (2, 1)
    goes_on(child, [2], unit=1)
    assert serve(cache, child) == [2]
    assert cache.get_computed_tail(old, 0) is None
    cache.free(parent)
    assert serve(cache, request([50], "other", unit=1)) == [1]
    assert cache.get_computed_tail(request([0, 9], unit=1), 0) == (2, 1)


@pytest.mark.parametrize("eviction", EVICTION_POLICIES.names())
@pytest.mark.parametrize("prompt", [8, 6])
def test_where_there_is_no_room_besides_the_source_is_taken_over(eviction: str, prompt: int) -> None:
    """A hit never makes a request fail that would fit without it. Whether the block is full or not."""
    cache = tails(num_blocks=4, eviction=eviction)
    first, second = request(range(prompt), "first", unit=1), request([*range(6), *range(90, 96)], "second", unit=1)
    serve(cache, first)
    cache.free(first)
    tail = cache.get_computed_tail(second, 1)
    assert tail == (2, 2)
    assert serve(cache, second) == [1, 2, 3]
    assert not cache.take_copies()
    assert cache.get_computed_tail(request([*range(6), 90, 1], unit=1), 1) == (2, 3)
    cache.free(second)
    cache.check_integrity()


def test_taking_a_source_over_evicts_nobody_else() -> None:
    """The gate leaves no room for a source besides, though only one block is taken now."""
    cache, prompts = tails(num_blocks=5, eviction="lfu"), [[i] * SIZE for i in range(4)]
    for tokens in prompts:
        live = request(tokens, unit=1)
        serve(cache, live)
        cache.free(live)
    assert serve(cache, request([3, 3, *range(50, 64)], unit=1), 1) == [4]
    assert [bool(cache.get_computed_blocks(request([*tokens, 9], unit=1))[1]) for tokens in prompts] == [True, True, True, False]


def test_a_refused_tail_changes_nothing_and_misuse_is_told() -> None:
    cache, first, live = tails(num_blocks=5), request(range(7), "first", unit=1), request([50], "live", unit=1)
    serve(cache, first)
    serve(cache, live)
    before, longer = state_of(cache), request([*range(6), *range(50, 58)], unit=1)
    assert serve(cache, longer) is None
    tail = cache.get_computed_tail(longer, 1)
    assert tail is not None
    short, keyless = request(range(6), unit=1), request(range(6), unit=1)
    keyless.unit_keys = keyless.unit_keys[:5]
    bad: dict[str, tuple[KVRequest, Any, Any]] = {
        "the last one must be": (short, [1], tail),
        "look them up again": (longer, [1], tail._replace(block=3)),
        "do not carry its keys": (longer, [], tail),
        "only an admission takes hits": (live, [], tail),
        "5 unit keys for 6 full units": (keyless, [], None),
    }
    for message, (who, hits, what) in bad.items():
        with pytest.raises(ConfigError, match=message):
            cache.allocate_slots(who, 1, hits, computed_tail=what)
    with pytest.raises(ConfigError, match="holds no blocks"):
        cache.note_computed(longer)
    check_unchanged(before, state_of(cache))
    with pytest.raises(ConfigError, match="prefix-match-unit is 3: needs 0, or a divisor"):
        tails(unit=3)


def test_eviction_by_name() -> None:
    with pytest.raises(ConfigError, match="eviction policy"):
        KVCacheManager(pool(eviction="newest"))
    with pytest.raises(ConfigError, match="eviction policy"):
        KVCacheManager(pool(eviction="newest"), enable_caching=False)


def left_over(eviction: str) -> list[str]:
    """Return which of three prompts are still cached after another one needed the room of one; "b" was hit once."""
    cache = KVCacheManager(pool(num_blocks=5, eviction=eviction))
    prompts = {name: [i] * SIZE for i, name in enumerate("abc")}
    for name, priority in (("a", 5), ("b", 1), ("c", 3)):
        cache_request = request([*prompts[name], 9], name, priority=priority)
        serve(cache, cache_request, SIZE)
        cache.free(cache_request)
    again = request([*prompts["b"], 9], "again")
    serve(cache, again)
    cache.free(again)
    serve(cache, request([7] * 8, "other"))
    return [name for name, tokens in prompts.items() if cache.get_computed_blocks(request([*tokens, 9]))[1]]


@pytest.mark.parametrize(
    ("eviction", "kept"), [("lru", "bc"), ("lfu", "bc"), ("fifo", "bc"), ("filo", "ab"), ("mru", "ac"), ("priority", "ac")]
)
def test_a_policy_chooses_who_goes(eviction: str, kept: str) -> None:
    assert "".join(left_over(eviction)) == kept


def test_blocks_without_a_key_go_before_any_victim() -> None:
    cache = KVCacheManager(pool(num_blocks=5, eviction="mru"))
    first = request(range(8))
    serve(cache, first)
    cache.free(first)
    assert serve(cache, request(range(50, 58), "other")) == [3, 4]
    assert cache.get_computed_blocks(request(range(9)))[0].tolist() == [1, 2]


MAX_MODEL_LEN = 12
WORDS = st.lists(st.integers(0, 1), min_size=2, max_size=MAX_MODEL_LEN)
PLACES = st.integers(0, 4)


class SharingMachine(RuleBasedStateMachine):
    """Tails, forks and policies together: `FuzzOwner` checks every law; a table of what each block holds checks every tail."""

    eviction: str

    @initialize(unit=st.sampled_from([1, 2]), num_blocks=st.integers(4, 9), state_slots=st.sampled_from([0, 0, 1]))
    def start(self, unit: int, num_blocks: int, state_slots: int) -> None:
        self.pool = KVPoolSettings(
            num_blocks=num_blocks,
            block_size=SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=3,
            enable_prefix_caching=True,
            prefix_match_unit=unit,
            state_slots=state_slots,
            eviction=self.eviction,
        )
        self.allocator = PagedAllocator(self.pool)
        self.owner = FuzzOwner(self.allocator, self.pool)
        self.names = count()
        self.computed: dict[int, list[int]] = {}
        """By block: the identities of the tokens that are known to be computed in it."""

    def guest(self, tokens: list[int], prompt: int, priority: int = 0) -> Guest:
        script = Script.for_pool(self.pool, np.array(tokens, np.int32))
        output = len(tokens) - prompt + 1
        return Guest(script, name=next(self.names), prompt_tokens=prompt, output_tokens=output, priority=priority)

    def tail(self, guest: Guest, hit: int) -> int:
        """Return the tokens that some block has in common with what follows `hit` tokens of `guest`, in whole units."""
        wanted, unit = (
            guest.script.identities[hit : min(hit + SIZE, guest.request.num_tokens) - 1].tolist(),
            self.pool.prefix_match_unit,
        )
        return max(
            (
                len(wanted[:n])
                for held in self.computed.values()
                for n in range(unit, len(wanted) + 1, unit)
                if held[:n] == wanted[:n]
            ),
            default=0,
        )

    def granted(self, guest: Guest, kept: list[int], *, tell: bool) -> None:
        manager = self.allocator.manager
        table, states = manager.block_table(guest.request).tolist(), manager._states[manager._rows[guest.request]].tolist()
        for block in {*table, *states} - set(kept):
            self.computed.pop(block, None)
        if tell:
            self.owner.note_computed(guest)
            for place, block in enumerate(table):
                first, last = place * SIZE, min((place + 1) * SIZE, guest.request.num_computed_tokens)
                self.computed[block] = guest.script.identities[first:last].tolist()

    @rule(
        words=WORDS, prompt=st.integers(1, MAX_MODEL_LEN), most=st.integers(1, MAX_MODEL_LEN), tell=st.booleans(), priority=PLACES
    )
    def admit(self, words: list[int], prompt: int, most: int, tell: bool, priority: int) -> None:
        guest = self.guest(words, min(prompt, len(words)), priority)
        if len(self.owner.running) == self.pool.max_num_seqs or not self.owner.arrive(guest):
            return
        hits, hit = self.allocator.manager.get_computed_blocks(guest.request)
        assert self.allocator.get_computed_tokens(guest.request) == hit + self.tail(guest, hit)
        if self.owner.admit(guest, most):
            self.granted(guest, hits.tolist(), tell=tell)

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES, most=st.integers(1, 5), tell=st.booleans())
    def grow(self, which: int, most: int, tell: bool) -> None:
        guest = self.owner.running[which % len(self.owner.running)]
        kept = self.allocator.manager.block_table(guest.request).tolist()
        if not guest.uncomputed:
            guest.know(min(guest.request.num_tokens + most, guest.last))
        if guest.uncomputed and self.owner.grow(guest, most):
            self.granted(guest, kept, tell=tell)

    @precondition(lambda self: self.owner.running and self.owner.can_fork)
    @rule(which=PLACES, words=WORDS)
    def fork(self, which: int, words: list[int]) -> None:
        parent = self.owner.running[which % len(self.owner.running)]
        known = parent.request.num_tokens
        child = self.guest([*parent.script.tokens[:known].tolist(), *words][: max(known, MAX_MODEL_LEN)], known)
        if self.owner.arrive(child):
            self.owner.fork(parent, child)

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES, comes_back=st.booleans())
    def leave(self, which: int, comes_back: bool) -> None:
        guest = self.owner.running[which % len(self.owner.running)]
        (self.owner.preempt if comes_back else self.owner.free)(guest)

    @rule()
    def reset(self) -> None:
        if self.allocator.manager.reset_prefix_cache():
            self.computed.clear()


@pytest.mark.parametrize("eviction", ["lru", "lfu", "priority", "cost-aware"])
def test_sharing_keeps_every_law(eviction: str) -> None:
    machine = type("Machine", (SharingMachine,), {"eviction": eviction})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))
