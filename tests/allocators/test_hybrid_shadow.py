"""Groups of layers over one pool: one group against the plain manager, any groups against a shadow memory."""

import math
import pickle
from functools import partial
from typing import Any

import numpy as np
from hybrid_requests import FULL, is_hit, request, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedkv.allocation import KVPoolSettings
from pagedkv.group_rules import GroupRule, GroupTables
from pagedkv.hybrid_cache_manager import HybridCacheManager
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest

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
