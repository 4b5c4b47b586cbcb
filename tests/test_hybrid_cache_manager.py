"""Groups of layers over one pool: the rules of each kind, one table per group, and what a shadow memory finds in them."""

import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedkv.allocation import NO_SLOT, KVPoolSettings
from pagedkv.allocators.hybrid import HybridAllocator
from pagedkv.block_hash import BlockHashChain
from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.group_rules import GroupRule, GroupTables
from pagedkv.hybrid_cache_manager import HybridCacheManager
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.kv_spec import LayerGroup
from pagedkv.layer_groups import plan_layer_groups

FULL = GroupRule(kind="full", block_size=4)
STATE = GroupRule(kind="state", block_size=4)


def window(size: int, block_size: int = 4) -> GroupRule:
    return GroupRule(kind="sliding_window", block_size=block_size, window=size)


def chunk(size: int, block_size: int = 4) -> GroupRule:
    return GroupRule(kind="chunked", block_size=block_size, window=size)


def request(tokens: Any, name: int | str = "r", block_size: int = 4) -> KVRequest:
    tokens = np.asarray(list(tokens), np.int32)
    chain = BlockHashChain(block_size=block_size)
    chain.extend(tokens)
    return KVRequest(request_id=name, num_tokens=tokens.size, block_keys=chain.keys, token_ids=tokens)


def manager(
    *rules: GroupRule, num_blocks: int = 33, caching: bool = True, batch: int | None = None, **pool: Any
) -> HybridCacheManager:
    pool = {"block_size": 4, "max_model_len": 64, "num_blocks": num_blocks, **pool}
    return HybridCacheManager(KVPoolSettings(**pool), rules, enable_caching=caching, max_num_batched_tokens=batch)


def tables(cache: HybridCacheManager, of: KVRequest) -> list[list[int]]:
    return [cache.block_table(of, group).tolist() for group in range(len(cache.rules))]


def grant(cache: HybridCacheManager, to: KVRequest, num_new_tokens: int, **options: Any) -> int:
    """Look up, allocate and count as computed; return the hit."""
    hits, num_hit_tokens = cache.get_computed_blocks(to) if not cache.block_table(to).size else ((), 0)
    assert cache.allocate_slots(to, num_new_tokens, hits, **options) is not None
    to.num_computed_tokens += num_hit_tokens + num_new_tokens
    cache.check_integrity()
    return num_hit_tokens


def grow(cache: HybridCacheManager, of: KVRequest, *num_new_tokens: int) -> None:
    for count in num_new_tokens:
        grant(cache, of, count)


# What is needed, and what is a hit


@pytest.mark.parametrize(
    ("kind", "computed", "skipped", "first"),
    [
        (FULL, 63, 0, 0),
        (window(6), 5, 0, 0),
        (window(6), 13, 8, 2),  # max(0, 13 - 6 + 1)
        (window(1), 8, 8, 2),
        (chunk(8), 7, 0, 0),
        (chunk(8), 17, 16, 4),
        (chunk(6), 17, 12, 3),
        (STATE, 8, 7, 1),  # the state behind token 7 is in block 1
        (STATE, 9, 8, 2),
    ],
)
def test_tokens_that_no_query_reads_any_more(kind: GroupRule, computed: int, skipped: int, first: int) -> None:
    assert (kind.num_skipped_tokens(computed), kind.first_block(computed)) == (skipped, first)


RULES = st.one_of(
    st.just(FULL),
    st.just(STATE),
    st.builds(window, st.integers(1, 20)),
    st.builds(chunk, st.integers(1, 20)),
)


def is_hit(kind: GroupRule, num_tokens: int, cached: Callable[[int], bool]) -> bool:
    """Whether every block that a query behind `num_tokens` reads is cached: told token by token."""
    last = num_tokens - 1
    reads = {
        "full": range(num_tokens),
        "state": range(max(last, 0), num_tokens),
        "sliding_window": range(max(0, num_tokens - (kind.window or 0) + 1), num_tokens),
        "chunked": [t for t in range(num_tokens) if kind.window and t // kind.window == num_tokens // kind.window],
    }[kind.kind]
    return all(cached(token // kind.block_size) for token in reads)


@given(kind=RULES, cached=st.lists(st.booleans(), min_size=12, max_size=12), most=st.integers(0, 48), blocks=st.integers(1, 3))
def test_a_hit_is_the_longest_prefix_behind_which_all_that_is_read_is_cached(
    kind: GroupRule, cached: list[bool], most: int, blocks: int
) -> None:
    lookups = 0

    def find_run(first: int, last: int) -> Any:
        nonlocal lookups
        run = next((i for i in range(first, last) if not cached[i]), last) - first
        lookups += run + 1
        return np.arange(first, first + run, dtype=np.int32) + 1

    expected = max(n for n in range(0, most + 1, 4 * blocks) if is_hit(kind, n, cached.__getitem__))
    length, hits = kind.longest_hit(most, 4 * blocks, find_run)
    assert length == expected
    assert hits.tolist() == list(range(kind.first_block(length) + 1, length // 4 + 1))
    assert lookups <= 3 * (12 + 1)  # each block is looked at a few times, however often the search begins anew


@pytest.mark.parametrize(
    ("kind", "cached", "num_tokens"),
    [
        (FULL, "xx.x.", 8),
        (window(6), "xx.xx", 20),  # cdiv(6 - 1, 4) = 2 blocks that end at the hit
        (window(6), "xx.x.", 8),  # a block alone is too little; the first two are enough
        (window(6), "x..x.", 4),  # a shorter run from block 0 counts too
        (window(5), "..xx.", 16),  # cdiv(5 - 1, 4) = 1
        (chunk(12), "...xx", 20),  # the current chunk is all that is needed
        (chunk(12), "...x.", 16),
        (chunk(12), "....x", 12),  # its second block alone is too little; at its start nothing is needed
        (chunk(32), "xx.xx", 8),
        (STATE, ".x.x.", 16),  # the right-most state
        (STATE, ".....", 0),
    ],
)
def test_hits_of_each_kind(kind: GroupRule, cached: str, num_tokens: int) -> None:
    def find_run(first: int, last: int) -> Any:
        return np.ones(len(cached[first:last].partition(".")[0]), np.int32)

    assert kind.longest_hit(20, 4, find_run)[0] == num_tokens


def test_all_groups_agree_on_a_hit() -> None:
    """The window lost the block that 16 tokens need; the full group, which has all four, gives way to what is left of it."""
    cache, first = manager(window(5), FULL, num_blocks=11), request(range(17))
    grow(cache, first, 17)
    cache.free(first)
    assert cache.free_queue().tolist() == [10, 5, 4, 3, 2, 1, 9, 8, 7, 6]
    assert cache.pool.get_new_blocks(3) is not None
    hits, num_tokens = cache.get_computed_blocks(request(range(17), "again"))
    assert num_tokens == 12
    assert [hit.tolist() for hit in hits] == [[0, 0, 3], [6, 7, 8]]
    assert cache.pool.get_new_blocks(4) is not None  # the other three of the window, and the tail of the full group
    assert cache.get_computed_blocks(request(range(17), "again"))[1] == 0


def test_a_group_that_agreed_is_asked_again() -> None:
    """Both have something for 16 and 12 tokens, but only for 8 do both."""
    cache, guest = manager(window(5), window(5)), request(range(17))
    for group, cached in enumerate(([1, 3], [1, 2])):
        for block in cached:
            taken = cache.pool.get_new_blocks(1)
            assert taken is not None
            cache.pool.cache_full_blocks(taken, cache.groups[group].keys(guest, block, block + 1))
    hits, num_tokens = cache.get_computed_blocks(guest)
    assert (num_tokens, [hit.tolist() for hit in hits]) == (8, [[0, 1], [0, 3]])


def test_groups_have_keys_of_their_own() -> None:
    """Blocks of the same tokens in two groups are not the same: only the window's content is in the window's blocks."""
    cache, first = manager(FULL, window(6)), request(range(9))
    grow(cache, first, 9)
    hits, _ = cache.get_computed_blocks(request(range(9), "again"))
    assert [hit.tolist() for hit in hits] == [[1, 2], [4, 5]]
    assert cache.pool.cache.lookup(first.block_keys).tolist() == [1, 2]  # the first group's are those of a single group


def test_a_hit_ends_at_a_multiple_of_all_block_sizes() -> None:
    cache = manager(FULL, GroupRule(kind="full", block_size=12), window(6, block_size=8))
    grow(cache, request(range(64)), 64)
    assert cache.alignment == 24
    assert cache.get_computed_blocks(request(range(49), "a"))[1] == 48
    hits, num_tokens = cache.get_computed_blocks(request(range(48), "b"))  # the last token is always computed
    assert (num_tokens, [hit.size for hit in hits]) == (24, [6, 2, 3])


def test_a_longer_block_is_known_by_all_its_tokens() -> None:
    cache, tokens = manager(GroupRule(kind="full", block_size=8)), list(range(16))
    grow(cache, request(tokens), 16)
    tokens[13] = 99  # in the second half of block 1
    assert cache.get_computed_blocks(request([*tokens, 1], "other"))[1] == 8


def test_where_nothing_before_a_chunk_is_read_nothing_needs_to_be_cached() -> None:
    cache = manager(chunk(8), caching=True)
    hits, num_tokens = cache.get_computed_blocks(request(range(20)))
    assert (num_tokens, hits[0].tolist()) == (16, [0, 0, 0, 0])


# Blocks come and go


def test_a_window_gives_back_whole_blocks_before_it_takes_new_ones() -> None:
    cache, first = manager(FULL, window(6), caching=False), request(range(20))
    grow(cache, first, 12)
    assert tables(cache, first) == [[1, 2, 3], [4, 5, 6]]
    grow(cache, first, 1)  # 12 - 6 + 1 = 7 tokens are skipped: one block
    assert tables(cache, first) == [[1, 2, 3, 4], [0, 5, 6, 7]]  # and is handed out first
    grow(cache, first, 1, 1, 1, 1)
    assert tables(cache, first) == [[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]]
    assert cache.num_blocks_held(first) == 8


def test_a_chunk_is_given_back_when_the_next_begins() -> None:
    cache, first = manager(chunk(8), caching=False), request(range(20))
    grow(cache, first, 7)
    grow(cache, first, 1)
    assert tables(cache, first) == [[1, 2]]
    grow(cache, first, 1)
    assert tables(cache, first) == [[0, 0, 2]]  # the tail of the chunk is handed out first


def test_what_has_left_a_window_is_given_back_even_if_the_rest_does_not_fit() -> None:
    cache, first = manager(FULL, window(6), num_blocks=8, caching=False, reserve_full_isl=False), request(range(40))
    grow(cache, first, 12)
    assert cache.allocate_slots(first, 28) is None
    assert tables(cache, first) == [[1, 2, 3], [0, 5, 6]]
    assert cache.free_queue().tolist() == [4, 7]
    before = pickle.dumps(cache)
    assert cache.allocate_slots(first, 28) is None  # nothing else has changed, nor does it now
    assert pickle.dumps(cache) == before
    cache.check_integrity()


def test_given_back_blocks_are_found_until_they_are_reused() -> None:
    cache, first = manager(FULL, window(6)), request(range(40))
    grow(cache, first, 12, 12)
    assert cache.block_table(first, 1).tolist()[:1] == [0]
    assert cache.get_computed_blocks(request(range(9), "again"))[1] == 8


def test_all_groups_get_their_blocks_or_none_does() -> None:
    cache, first = manager(FULL, FULL, num_blocks=6, caching=False), request(range(12))
    before = pickle.dumps(cache)
    assert cache.allocate_slots(first, 12) is None  # six blocks, five free
    assert pickle.dumps(cache) == before
    assert cache.allocate_slots(first, 8, full_sequence_must_fit=False) is not None


def test_hits_that_nobody_holds_need_room() -> None:
    cache, first, again = manager(FULL, window(5), num_blocks=7), request(range(12)), request(range(12), "again")
    grow(cache, first, 12)
    cache.free(first)
    hits, num_tokens = cache.get_computed_blocks(again)
    assert (num_tokens, [hit.tolist() for hit in hits]) == (8, [[1, 2], [0, 5]])
    holder = request(range(100, 104), "holder")
    assert cache.allocate_slots(holder, 4, full_sequence_must_fit=False) is not None
    hits, _ = cache.get_computed_blocks(again)
    assert cache.num_free_blocks == 4
    before = pickle.dumps((cache, again))
    assert cache.allocate_slots(again, 4, hits) is None  # three hits and two new blocks
    assert pickle.dumps((cache, again)) == before


def test_the_gate_asks_for_the_peak_of_a_window_only() -> None:
    """40 known tokens: 10 blocks of full attention; a window of 6 holds cdiv(6 - 1 + 8, 4) + 1 = 5 if a step computes 8."""
    for num_free, fits in ((14, False), (15, True)):
        cache, first = manager(FULL, window(6), num_blocks=num_free + 1, caching=False, batch=8), request(range(40))
        before = pickle.dumps(cache)
        assert (cache.allocate_slots(first, 8) is not None) is fits
        assert (pickle.dumps(cache) == before) is not fits
    first.num_computed_tokens = 8
    grow(cache, first, 8, 8, 8, 8)  # what the gate let in goes through
    assert cache.peak_blocks(40) == 15
    with pytest.raises(ConfigError, match="9 new tokens: a step computes 8 at most"):
        cache.allocate_slots(request(range(9), "b"), 9)


def test_the_gate_counts_null_blocks_of_a_hit_as_none() -> None:
    """A window of 6 with a hit of 16 tokens: two blocks of the hit, and three more until its peak of five."""
    for num_free, fits in ((4, False), (5, True)):
        cache, first = manager(window(6), num_blocks=9, batch=8), request(range(17))
        grow(cache, first, 8, 8, 1)
        cache.free(first)
        assert cache.pool.get_new_blocks(8 - num_free) is not None  # those without a key, then the oldest
        hits, num_tokens = cache.get_computed_blocks(guest := request(range(40), "guest"))
        assert (num_tokens, np.count_nonzero(hits[0])) == (16, 2)
        assert (cache.allocate_slots(guest, 8, hits) is not None) is fits


def test_the_watermark_holds_only_for_an_admission_while_something_runs() -> None:
    cache, first = manager(FULL, window(6), num_blocks=9, caching=False, watermark=0.2), request(range(16))
    assert cache.allocate_slots(first, 16, has_scheduled_reqs=True) is None
    grow(cache, first, 16)


def test_a_request_holds_one_state_to_read_and_one_to_write() -> None:
    cache, first = manager(STATE), request(range(40))
    grow(cache, first, 8)
    assert tables(cache, first) == [[0, 1]]  # the boundary in between leaves no state
    grow(cache, first, 8)
    assert tables(cache, first) == [[0, 1, 0, 2]]
    grow(cache, first, 1)
    assert tables(cache, first) == [[0, 0, 0, 2, 3]]
    grow(cache, first, 3)
    assert tables(cache, first) == [[0, 0, 0, 0, 3]]
    assert cache.get_computed_blocks(request(range(19), "again"))[1] == 16


def test_a_state_that_a_step_passes_is_not_cached() -> None:
    """6 tokens, then 6: the state of the boundary at 8 was overwritten, that at 12 is there."""
    cache, first = manager(STATE), request(range(40))
    grow(cache, first, 6, 6)
    assert tables(cache, first) == [[0, 1, 2]]
    assert cache.get_computed_blocks(request(range(12), "a"))[1] == 0
    assert cache.get_computed_blocks(request(range(13), "b"))[1] == 12


def test_a_state_per_request_is_one_block_and_shares_nothing() -> None:
    cache, first = manager(FULL, GroupRule(kind="state", block_size=64)), request(range(40))
    grow(cache, first, 12, 8, 20)
    assert tables(cache, first) == [[1, 2, 3, 5, 6, 7, 8, 9, 10, 11], [4]]
    assert cache.get_computed_blocks(request(range(40), "again"))[1] == 0


def test_groups_are_freed_one_after_the_other() -> None:
    cache, first = manager(FULL, window(60), num_blocks=8, caching=False), request(range(12))
    grow(cache, first, 12)
    cache.preempt(first)
    assert first.num_computed_tokens == 0
    assert cache.free_queue().tolist() == [6, 5, 4, 3, 2, 1, 7]


# One group of full attention


OPERATIONS = st.lists(
    st.tuples(st.sampled_from("admit admit grow grow grow free preempt reset".split()), st.integers(0, 9), st.integers(1, 24)),
    max_size=40,
)


@given(
    ops=OPERATIONS, num_blocks=st.integers(3, 16), caching=st.booleans(), state_slots=st.sampled_from([0, 0, 5]), gate=st.booleans()
)
@settings(max_examples=150)
def test_one_group_of_full_attention_does_what_the_plain_manager_does(
    ops: list[tuple[str, int, int]], num_blocks: int, caching: bool, state_slots: int, gate: bool
) -> None:
    caching = caching and not state_slots  # with a state per request nothing is shared here
    pool = KVPoolSettings(
        num_blocks=num_blocks,
        block_size=4,
        max_model_len=32,
        max_num_seqs=4,
        watermark=0.1,
        reserve_full_isl=gate,
        state_slots=state_slots,
    )
    per_request = (GroupRule(kind="state", block_size=32),) * -(-state_slots // 4)
    plain, hybrid = (
        KVCacheManager(pool, enable_caching=caching),
        HybridCacheManager(pool, (FULL, *per_request), enable_caching=caching),
    )
    running: list[tuple[KVRequest, KVRequest]] = []
    num_requests = 0
    for op, which, count in ops:
        if op == "admit" and len(running) < 4:
            tokens = np.arange(count) // (which + 1)
            num_requests += 1
            pair = request(tokens, num_requests), request(tokens, num_requests)
            hits, num_hit_tokens = plain.get_computed_blocks(pair[0])
            hybrid_hits, hybrid_num = hybrid.get_computed_blocks(pair[1])
            assert (hits.tolist(), num_hit_tokens) == (hybrid_hits[0].tolist(), hybrid_num)
            new = max(1, (count - num_hit_tokens) >> which % 3)
            options: Any = {"has_scheduled_reqs": bool(running)}
            taken, hybrid_taken = (
                plain.allocate_slots(pair[0], new, hits, **options),
                hybrid.allocate_slots(pair[1], new, hybrid_hits, **options),
            )
            assert (taken is None) == (hybrid_taken is None)
            if taken is not None:
                running.append(pair)
                for one in pair:
                    one.num_computed_tokens = num_hit_tokens + new
        elif op == "reset":
            assert plain.reset_prefix_cache() == hybrid.reset_prefix_cache()
        elif running:
            pair = running[which % len(running)]
            new = min(count, pair[0].num_tokens - pair[0].num_computed_tokens)
            if op == "grow" and new:
                taken, hybrid_taken = plain.allocate_slots(pair[0], new), hybrid.allocate_slots(pair[1], new)
                assert (taken is None) == (hybrid_taken is None)
                if taken is not None and hybrid_taken is not None:
                    assert taken.tolist() == hybrid_taken[0].tolist()
                    for one in pair:
                        one.num_computed_tokens += new
            elif op in ("free", "preempt"):
                getattr(plain, op)(pair[0])
                getattr(hybrid, op)(pair[1])
                running.remove(pair)
        assert plain.free_queue().tolist() == hybrid.free_queue().tolist()
        assert [plain.block_table(a).tolist() for a, _ in running] == [hybrid.block_table(b).tolist() for _, b in running]
        hybrid.check_integrity()


# A shadow memory over any groups


def is_cached(group: GroupTables, guest: KVRequest, block: int) -> bool:
    return group.find_run(guest, block, block + 1).size > 0


class HybridMachine(RuleBasedStateMachine):
    """Writes what every block must hold, for each token of attention and for each state, and reads what the next query reads."""

    @initialize(
        kinds=st.lists(
            st.one_of(
                st.just(("full", 0)),
                st.just(("state", 0)),
                st.tuples(st.sampled_from(["sliding_window", "chunked"]), st.integers(1, 14)),
            ),
            min_size=1,
            max_size=3,
        ),
        multiples=st.tuples(*[st.sampled_from([1, 1, 1, 2, 3])] * 3),
        size=st.sampled_from([1, 2, 3]),
        num_blocks=st.integers(6, 40),
        batch=st.sampled_from([None, 3, 7]),
        caching=st.sampled_from([True, True, False]),
        gate=st.booleans(),
    )
    def start(self, kinds: Any, multiples: Any, size: int, num_blocks: int, batch: int | None, caching: bool, gate: bool) -> None:
        rules = [
            GroupRule(
                kind=kind,
                block_size=32 if kind == "state" and not caching else size * multiple,
                window=length or None,
            )
            for (kind, length), multiple in zip(kinds, multiples, strict=False)
        ]
        pool = KVPoolSettings(num_blocks=num_blocks, block_size=size, max_model_len=32, max_num_seqs=4, reserve_full_isl=gate)
        self.size, self.batch = size, batch or 32
        self.cache = HybridCacheManager(pool, rules, enable_caching=caching, max_num_batched_tokens=batch)
        self.memory: dict[tuple[int, int], tuple[Any, ...]] = {}
        """By block and offset (of a state: 0): the group and all tokens up to that whose content it is."""
        self.running: list[KVRequest] = []
        self.waiting: list[KVRequest] = []
        self.num_requests = 0

    @rule(prefix=st.integers(0, 30), total=st.integers(1, 31), fork=st.integers(0, 2), new=st.integers(1, 32), resume=st.booleans())
    def admit(self, prefix: int, total: int, fork: int, new: int, resume: bool) -> None:
        if len(self.running) == 4:
            return
        if resume and self.waiting:
            guest = self.waiting.pop(0)
        else:
            self.num_requests += 1
            guest = request([0] * min(prefix, total) + [fork + 1] * max(total - prefix, 0), self.num_requests, self.size)
        hits, num_hit_tokens = self.cache.get_computed_blocks(guest)
        self.is_the_longest_hit(guest, num_hit_tokens)
        new = min(new, guest.num_tokens - num_hit_tokens, self.batch)
        before = pickle.dumps((self.cache, guest))
        if self.cache.allocate_slots(guest, new, hits, has_scheduled_reqs=bool(self.running)) is None:
            assert pickle.dumps((self.cache, guest)) == before
            assert self.running or self.cache.peak_blocks(guest.num_tokens) >= self.cache.pool.num_blocks
            return
        guest.num_computed_tokens = num_hit_tokens
        self.running.append(guest)
        self.compute(guest, new)

    def is_the_longest_hit(self, guest: KVRequest, num_hit_tokens: int) -> None:
        groups, most = self.cache.groups, guest.num_tokens - 1 if self.cache.pool.enable_caching else 0
        assert num_hit_tokens == max(
            length
            for length in range(0, most + 1, math.lcm(*(kind.block_size for kind in self.cache.rules)))
            if all(is_hit(group.rule, length, partial(is_cached, group, guest)) for group in groups)
        )

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), new=st.integers(1, 32), known=st.integers(0, 5), token=st.integers(0, 3))
    def grow(self, which: int, new: int, known: int, token: int) -> None:
        guest = self.running[which % len(self.running)]
        more = min(known, 32 - guest.num_tokens)
        if more:
            longer = request([*guest.token_ids.tolist(), *[token] * more], "", self.size)
            guest.token_ids, guest.num_tokens, guest.block_keys = longer.token_ids, longer.num_tokens, longer.block_keys
        new = min(new, guest.num_tokens - guest.num_computed_tokens, self.batch)
        if not new:
            return
        if self.cache.allocate_slots(guest, new) is None:
            before = pickle.dumps((self.cache, guest))
            assert self.cache.allocate_slots(guest, new) is None
            assert pickle.dumps((self.cache, guest)) == before
            assert len(self.running) > 1 or self.cache.peak_blocks(guest.num_tokens) >= self.cache.pool.num_blocks
            return
        self.compute(guest, new)

    def compute(self, guest: KVRequest, new: int) -> None:
        first, last = guest.num_computed_tokens, guest.num_computed_tokens + new
        for group, kind in enumerate(self.cache.rules):
            table = self.cache.block_table(guest, group)
            self.read(guest, group)
            for token in [last - 1] if kind.kind == "state" else range(first, last):
                block = int(table[token // kind.block_size])
                assert block, f"token {token} has no block in group {group}"
                offset = 0 if kind.kind == "state" else token % kind.block_size
                self.memory[block, offset] = (group, *guest.token_ids[: token + 1].tolist())
        guest.num_computed_tokens = last

    def read(self, guest: KVRequest, group: int) -> None:
        """What a query behind the computed tokens reads must be there."""
        kind, computed = self.cache.rules[group], guest.num_computed_tokens
        table = self.cache.block_table(guest, group)
        for token in range(kind.num_skipped_tokens(computed), computed):
            block, offset = int(table[token // kind.block_size]), 0 if kind.kind == "state" else token % kind.block_size
            assert self.memory[block, offset] == (group, *guest.token_ids[: token + 1].tolist())

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), preempt=st.booleans())
    def leave(self, which: int, preempt: bool) -> None:
        guest = self.running.pop(which % len(self.running))
        if preempt:
            self.cache.preempt(guest)
            self.waiting.append(guest)
        else:
            self.cache.free(guest)
        assert not self.cache.block_table(guest).size

    @invariant()
    def every_block_is_free_or_held_and_holds_what_it_should(self) -> None:
        self.cache.check_integrity()
        held: set[int] = set()
        for guest in self.running:
            for group in range(len(self.cache.rules)):
                self.read(guest, group)
            own = [block for table in tables(self.cache, guest) for block in table if block]
            assert self.cache.num_blocks_held(guest) == len(own) == len(set(own)) <= self.cache.peak_blocks(guest.num_tokens)
            held |= set(own)
        assert len(held) + self.cache.num_free_blocks == self.cache.pool.num_blocks - 1

    def teardown(self) -> None:
        while getattr(self, "running", []):
            self.leave(0, preempt=False)
        if hasattr(self, "cache"):
            self.every_block_is_free_or_held_and_holds_what_it_should()


TestHybridMachine = HybridMachine.TestCase
TestHybridMachine.settings = settings(max_examples=150, stateful_step_count=30)


# Bytes


@pytest.mark.parametrize(("model", "context", "at_most"), [("gpt-oss-20b", 65_536, 0.51), ("gemma-3-27b", 32_768, 0.25)])
def test_windows_save_what_full_length_budgeting_reserves(model: str, context: int, at_most: float) -> None:
    """Pages held at the end of a long context against every layer keeping every token; gpt-oss: half, Gemma 3: 17 % and padding."""
    layers = load_model(model).layer_groups
    plan, spec = plan_layer_groups(layers, block_size=16), load_model(model).kv_spec("auto")
    pool = KVPoolSettings(num_blocks=40_000, max_model_len=context, max_num_seqs=2)
    rules = plan.rules(max_model_len=context, enable_caching=False)
    cache = HybridCacheManager(pool, rules, enable_caching=False, max_num_batched_tokens=8192)
    guest, most = KVRequest(request_id=0, num_tokens=context), 0
    while guest.num_computed_tokens < context - 8:
        grant(cache, guest, min(8192, context - 8 - guest.num_computed_tokens))
        most = max(most, cache.num_blocks_held(guest))
    grow(cache, guest, *[1] * 8)
    full_length_bytes = spec.bytes_per_token * context
    held_bytes = cache.num_blocks_held(guest) * plan.page_bytes
    attended = sum(group.tokens_kept(context) * size for group, size in zip(layers, spec.group_bytes_per_token, strict=True))
    assert attended <= held_bytes <= at_most * full_length_bytes
    assert most <= cache.peak_blocks(context) < full_length_bytes / plan.page_bytes


# Misuse


MISUSE: dict[str, Callable[[HybridCacheManager, KVRequest], Any]] = {
    "holds no blocks": lambda cache, live: cache.free(request([1])),
    "0 new and 0 look-ahead": lambda cache, live: cache.allocate_slots(live, 0),
    "0 known tokens": lambda cache, live: cache.allocate_slots(request([]), 1),
    "65 tokens are more than max_model_len 64": lambda cache, live: cache.allocate_slots(live, 49),
    "a step computes 64 at most": lambda cache, live: cache.allocate_slots(live, 65),
    "65 known tokens": lambda cache, live: cache.get_computed_blocks(request(range(65))),
    "1 block keys for 2 full": lambda cache, live: cache.allocate_slots(
        KVRequest(request_id="x", num_tokens=8, block_keys=live.block_keys[:1]), 8
    ),
    "3 computed tokens, but it holds 0": lambda cache, live: cache.allocate_slots(
        KVRequest(request_id="x", num_tokens=3, num_computed_tokens=3), 1
    ),
    "given back when it had more": lambda cache, live: back_to(cache, live, 2),
    "only an admission takes hits": lambda cache, live: cache.allocate_slots(live, 1, cache.get_computed_blocks(live)[0]),
    "the last one must be": lambda cache, live: cache.allocate_slots(request(range(4), "x"), 1, [np.ones(1, np.int32)] * 2),
    "in 1 groups": lambda cache, live: cache.allocate_slots(request(range(9), "x"), 1, [np.ones(1, np.int32)]),
    r"hits of \[4, 8\] tokens in 2 groups": lambda cache, live: cache.allocate_slots(
        request(range(9), "x"), 1, [np.ones(1, np.int32), np.ones(2, np.int32)]
    ),
    "look them up again": lambda cache, live: cache.allocate_slots(request(range(9), "x"), 1, [np.array([7]), np.array([8])]),
    "raise max_num_seqs 1": lambda cache, live: cache.allocate_slots(request([1], "x"), 1),
}


def back_to(cache: HybridCacheManager, live: KVRequest, num_computed_tokens: int) -> None:
    saved, live.num_computed_tokens = live.num_computed_tokens, num_computed_tokens
    try:
        cache.allocate_slots(live, 1)
    finally:
        live.num_computed_tokens = saved


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_told_and_changes_nothing(message: str) -> None:
    cache, live = manager(FULL, window(6), max_num_seqs=1), request(range(20))
    grow(cache, live, 15, 1)
    before = pickle.dumps((cache, live))
    with pytest.raises(ConfigError, match=message):
        MISUSE[message](cache, live)
    assert pickle.dumps((cache, live)) == before


def test_a_state_cannot_be_read_where_none_was_left() -> None:
    cache, live = manager(STATE), request(range(40))
    grow(cache, live, 8, 12)  # states behind 8 and 20
    live.num_computed_tokens = 13
    with pytest.raises(ConfigError, match="preempt it"):
        cache.allocate_slots(live, 1)
    live.num_computed_tokens = 8
    with pytest.raises(ConfigError, match="preempt it"):
        cache.allocate_slots(live, 2)  # would write into a block that it does not have


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (manager, r"blocks of \[\] tokens"),
        (lambda: manager(GroupRule(kind="full", block_size=6)), "multiples of 4"),
        (lambda: manager(FULL, batch=0), "max-num-batched-tokens is 0"),
        (lambda: GroupRule(kind="ful", block_size=4), "unknown layer kind 'ful'"),  # type: ignore[arg-type]
        (lambda: GroupRule(kind="full", block_size=0), "block size 0"),
        (lambda: GroupRule(kind="full", block_size=4, window=4), "window 4"),
        (lambda: GroupRule(kind="chunked", block_size=4), "window None"),
        (lambda: window(0), "window 0"),
    ],
)
def test_groups_that_cannot_be_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("where", ["table", "given back", "hole", "rows", "keys", "count", "registered"])
def test_corruption_is_noticed(where: str) -> None:
    cache, live = manager(FULL, window(6)), request(range(16))
    grow(cache, live, 12, 4)
    row = cache._rows[live]
    full, windowed = cache.groups
    if where == "table":
        full.tables.blocks[row, 1] = 30
    elif where == "given back":
        windowed._num_given_back[row] = 3
    elif where == "hole":
        windowed._num_given_back[row] = 0
    elif where == "rows":
        cache._requests.free.pop()
    elif where == "keys":
        live.block_keys = request(range(1, 17)).block_keys
    elif where == "count":
        cache._num_held[row] += 1
    else:
        full._num_registered[row] = 9
    with pytest.raises(IntegrityError):
        cache.check_integrity()


# The allocator


def attention(kind: Any = "full", num_layers: int = 2, heads: int = 1, window: int | None = None) -> LayerGroup:
    return LayerGroup(kind=kind, num_layers=num_layers, num_kv_heads=heads, key_dim=8, value_dim=8, window=window)


def allocator(*layers: LayerGroup, num_blocks: int = 20, caching: bool = False, **pool: Any) -> HybridAllocator:
    pool = {"block_size": 4, "max_model_len": 64, "max_num_seqs": 4, "num_blocks": num_blocks, **pool}
    return HybridAllocator(KVPoolSettings(layer_groups=layers, enable_prefix_caching=caching, **pool))


def accounts(of: HybridAllocator, *live: KVRequest) -> None:
    held = np.concatenate([of.slots_held(guest, group) for guest in live for group in range(of.num_groups)])
    held = held[held != NO_SLOT]
    assert sum(of.num_slots_held(guest) for guest in live) == held.size
    assert of.free_slots + np.unique(held).size + of.state_slots * len(live) + of.rounding_slots == of.usable_slots
    assert not np.isin(of.cached_slots(), held).any()
    of.check_integrity()


def test_without_groups_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer-groups to give blocks to: needs those of the model"):
        allocator()


def test_a_window_gives_back_what_it_has_left_behind() -> None:
    pool, guest = allocator(attention(), attention("sliding_window", window=8)), request(range(20))
    assert [(kind.kind, kind.window) for kind in pool.manager.rules] == [("full", None), ("sliding_window", 8)]
    for _ in range(20):
        assert pool.allocate_slots(guest, 1) is not None
        guest.num_computed_tokens += 1
        accounts(pool, guest)
    slots = pool.slots_held(guest, 1)
    assert (slots[:12] == NO_SLOT).all()  # 19 - 8 + 1 = 12 tokens
    assert (slots[12:] >= 4).all()
    assert np.unique(pool.slots_held(guest)).size == 20
    pool.preempt(guest)
    assert pool.free_slots == pool.usable_slots


def test_pages_of_shorter_blocks_list_the_slots_that_they_leave_unused_at_the_end() -> None:
    pool, guest = allocator(attention(), attention("sliding_window", heads=2, window=9)), request(range(8))
    assert [kind.block_size for kind in pool.manager.rules] == [8, 4]
    assert pool.allocate_slots(guest, 8) is not None
    assert pool.slots_held(guest, 0).tolist() == [*range(8, 16)]
    assert pool.slots_held(guest, 1).tolist() == [16, 17, 18, 19, 24, 25, 26, 27, 20, 21, 22, 23, 28, 29, 30, 31]
    accounts(pool, guest)


def test_states_count_as_state_slots_without_caching_and_as_a_group_with_it() -> None:
    layers = attention(), LayerGroup(kind="state", num_layers=2, state_bytes=4 * 32)
    guest = request(range(14))
    alone, sharing = allocator(*layers), allocator(*layers, caching=True)
    assert (alone.num_groups, alone.state_slots) == (1, 4)
    assert (sharing.num_groups, sharing.state_slots) == (2, 0)
    for pool in (alone, sharing):
        assert pool.allocate_slots(guest, 12) is not None
        guest.num_computed_tokens = 12
        accounts(pool, guest)
        pool.preempt(guest)
    assert alone.get_computed_tokens(guest) == 0
    assert sharing.get_computed_tokens(guest) == 12
    assert sharing.cached_slots().size == 4 * 4


def test_a_model_of_states_only_has_no_slots_of_tokens() -> None:
    pool, guest = allocator(LayerGroup(kind="state", num_layers=2, state_bytes=100)), request(range(40))
    assert pool.allocate_slots(guest, 40) is not None
    assert (pool.num_groups, pool.state_slots, pool.num_slots_held(guest), pool.slots_held(guest).size) == (0, 4, 0, 0)
    assert pool.free_slots == pool.usable_slots - 4


def test_who_can_ever_fit_depends_on_the_tokens_of_a_step() -> None:
    """64 tokens: 16 blocks of full attention, and of a window of 8 either all 16, or cdiv(8 - 1 + 8, 4) + 1 = 5."""
    layers = attention(), attention("sliding_window", window=8)
    assert allocator(*layers, num_blocks=33).admission_slots(60, 5) == 0
    assert allocator(*layers, num_blocks=32).admission_slots(60, 5) is None
    assert allocator(*layers, num_blocks=22, max_num_batched_tokens=8).admission_slots(60, 5) == 0
    assert allocator(*layers, num_blocks=21, max_num_batched_tokens=8).admission_slots(60, 5) is None
    assert allocator(*layers, num_blocks=99).admission_slots(60, 6) is None  # longer than max_model_len


def test_state_layers_and_state_slots_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="state_slots is 4, but layer_groups"):
        allocator(LayerGroup(kind="state", num_layers=2, state_bytes=100), state_slots=4)
    assert allocator(attention(), state_slots=5).state_slots == 8
