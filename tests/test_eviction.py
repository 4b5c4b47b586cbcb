"""Eviction policies, and the order of a pool's cached blocks against the plain rule: the candidate of lowest key goes first."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings
from pagedkv.eviction_order import EvictionOrder
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.retention import DEFAULT_PRIORITY

SIZE = 4
NUM_BLOCKS = 12
SETTINGS = EvictionSettings(threshold=6, next_prompt_estimate=1, attention_cost_per_token=0.05, priority_lifetime=4)
Prefix = tuple[int, ...]


@dataclass(slots=True)
class Run:
    """A cached block as the oracle knows it."""

    block: int
    last_access: float
    created: float
    priority: int
    depth: int
    deepest: int
    inflation: float
    expires: float = inf
    hit_count: int = 1
    expired: bool = False
    num_tokens: int = SIZE


class OrderMachine(RuleBasedStateMachine):
    """Sequences of block contents come, share prefixes, and end. The oracle keeps `runs` by prefix and searches all of them."""

    eviction: str

    def __init__(self) -> None:
        super().__init__()
        self.order = EvictionOrder(num_blocks=NUM_BLOCKS, block_size=SIZE, eviction=self.eviction, settings=SETTINGS)
        self.key = EVICTION_POLICIES.load(self.eviction)
        self.runs: dict[Prefix, Run] = {}
        self.live: list[Prefix] = []
        self.now, self.inflation = 0, 0.0

    def prefixes(self, sequence: Prefix) -> list[Prefix]:
        return [sequence[: i + 1] for i in range(len(sequence))]

    def held(self) -> set[Prefix]:
        return {prefix for sequence in self.live for prefix in self.prefixes(sequence)}

    def ends(self, gone: set[Prefix]) -> list[Prefix]:
        free = self.runs.keys() - self.held() - gone
        return [prefix for prefix in free if not any(other[:-1] == prefix for other in free)]

    def rank(self, prefix: Prefix) -> tuple[float, ...]:
        run = self.runs[prefix]
        run.expired = run.expires <= self.now
        return self.key(run, SETTINGS)

    def check_victims(self, victims: list[int]) -> list[Prefix]:
        """Follow `victims` one by one; each must be a candidate of the lowest key."""
        prefix_of = {run.block: prefix for prefix, run in self.runs.items()}
        gone = list[Prefix]()
        for block in victims:
            candidates = self.ends(set(gone))
            assert prefix_of[block] in candidates
            assert self.rank(prefix_of[block]) == min(map(self.rank, candidates))
            gone.append(prefix_of[block])
        return gone

    @rule(sequence=st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple), priority=st.integers(0, 60))
    def admit(self, sequence: Prefix, priority: int) -> None:
        path, held = self.prefixes(sequence), self.held()
        num_hits = sum(prefix in self.runs for prefix in path)
        hits, new = path[:num_hits], path[num_hits:]
        if len(held | set(path)) >= NUM_BLOCKS:
            return
        hit_blocks = [self.runs[prefix].block for prefix in hits]
        if hits:
            self.now += 1
            self.order.used(hit_blocks, priority)
            for prefix in hits:
                run = self.runs[prefix]
                run.last_access, run.inflation, run.hit_count = self.now, self.inflation, run.hit_count + 1
                run.priority = max(run.priority, priority)
        self.live.append(sequence)  # held from here on, though the new runs are not there yet
        unused = sorted(set(range(1, NUM_BLOCKS)) - {run.block for run in self.runs.values()})
        if len(unused) < len(new):
            unused += self.take_victims(len(new) - len(unused))
        if new:
            self.now += 1
            taken = unused[: len(new)]
            self.order.stored(taken, len(hits) * SIZE, priority, before=hit_blocks)
            for prefix, block in zip(new, taken, strict=True):
                depth = len(prefix) * SIZE
                self.runs[prefix] = Run(block, self.now, self.now, priority, depth, len(sequence) * SIZE, self.inflation)
            for prefix in hits:
                self.runs[prefix].deepest = max(self.runs[prefix].deepest, len(sequence) * SIZE)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.live:
            path = self.prefixes(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))
            let_go = [self.runs[prefix] for prefix in path if prefix not in self.held()]
            self.now += 1
            self.order.released([run.block for run in let_go])
            for run in let_go:
                run.last_access, run.inflation, run.expires = self.now, self.inflation, self.now + SETTINGS.priority_lifetime

    @rule(num_blocks=st.integers(0, 4))
    def evict(self, num_blocks: int) -> None:
        self.take_victims(num_blocks)

    def take_victims(self, num_blocks: int) -> list[int]:
        victims: list[int] = self.order.victims(num_blocks).tolist()
        for prefix in self.check_victims(victims):
            self.inflation = max(self.inflation, self.rank(prefix)[0])
        self.order.removed(victims)
        self.runs = {prefix: run for prefix, run in self.runs.items() if run.block not in victims}
        return victims

    @invariant()
    def all_free_blocks_come_up_in_order(self) -> None:
        self.order.check_integrity()
        victims = self.order.victims(NUM_BLOCKS).tolist()
        assert len(self.check_victims(victims)) == len(self.runs.keys() - self.held())
        assert self.order.victims(2).tolist() == victims[:2]  # asking changes nothing


@pytest.mark.parametrize("eviction", EVICTION_POLICIES.names())
def test_the_lowest_key_among_the_ends_goes_first(eviction: str) -> None:
    machine = type("Machine", (OrderMachine,), {"eviction": eviction})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 1), min_size=1, max_size=5), st.integers(0, 3)), min_size=1, max_size=40
    )
)
def test_lru_is_the_order_of_the_free_queue(steps: list[tuple[bool, list[int], int]]) -> None:
    """Under lru the order agrees with the ring, in which released blocks with a key go to the back, tail first."""
    manager = KVCacheManager(KVPoolSettings(num_blocks=NUM_BLOCKS, block_size=SIZE, max_model_len=32, max_num_seqs=4))
    order = EvictionOrder(num_blocks=NUM_BLOCKS, block_size=SIZE)
    live = list[KVRequest]()
    for ends, contents, which in steps:
        if ends and live:
            request = live.pop(which % len(live))
            table = manager.block_table(request).copy()
            manager.free(request)
            order.released(table[manager.pool.ref_cnt[table] == 0])
        elif not ends and len(live) < 4:
            chain = BlockHashChain(block_size=SIZE)
            chain.extend(np.repeat(contents, SIZE))
            chain.extend([7])  # so that all full blocks may be hits
            request = KVRequest(request_id=len(live), num_tokens=chain.num_tokens, block_keys=chain.keys)
            hits, num_cached = manager.get_computed_blocks(request)
            taken = manager.allocate_slots(request, request.num_tokens - num_cached, hits)
            if taken is not None:
                live.append(request)
                order.removed(taken)
                order.used(hits)
                order.stored(taken[:-1], num_cached, before=hits)
        queue = manager.free_queue()
        keyed = queue[np.isin(queue, manager.pool.cache.blocks())]
        assert order.victims(NUM_BLOCKS).tolist() == keyed.tolist()


def order_of(eviction: str, **wants: Any) -> EvictionOrder:
    return EvictionOrder(num_blocks=NUM_BLOCKS, block_size=SIZE, eviction=eviction, settings=EvictionSettings(**wants))


def test_a_priority_counts_until_its_time_is_over() -> None:
    order = order_of("retention", priority_lifetime=3)
    order.stored([1], 0, 80)
    order.stored([2], 0, 10)
    order.stored([3], 0, DEFAULT_PRIORITY + 1)
    order.released([1, 2])
    assert order.victims(9).tolist() == [2, 1]
    order.released([3])
    assert order.victims(9).tolist() == [2, 3, 1]
    order.used([3])
    order.stored([4], 0)  # three readings since 1 and 2 were released: both are worth 35 now, and equally old
    order.released([3])
    assert order.victims(9).tolist() == [1, 2, 3]
    order.check_integrity()


def test_a_dear_run_outlives_a_cheap_one_until_it_is_overtaken() -> None:
    order = order_of("cost-aware", linear_cost=1, attention_cost_per_token=1)
    order.stored([1], 40 * SIZE)
    order.stored([2], 0)
    order.released([1])
    order.released([2])
    assert order.victims(2).tolist() == [2, 1]  # 2 costs (1 + 2) a token, 1 costs (1 + 162), though 1 is older
    for _ in range(60):  # others come and go, each worth more than the last by what was evicted before it
        order.removed(victims := order.victims(1))
        if victims[0] == 1:
            break
        order.stored([2], 0)
        order.released([2])
    assert victims.tolist() == [1]
    assert order.victims(1).tolist() == [2]


def test_uses_multiply_a_cost() -> None:
    order = order_of("cost-aware", linear_cost=1, attention_cost_per_token=0)
    order.stored([1], 0)
    order.stored([2], 90)
    order.used([1])
    order.released([1])
    order.released([2])
    assert order.victims(2).tolist() == [2, 1]


def test_a_copy_in_the_middle_of_a_held_sequence_can_go() -> None:
    """Two requests computed one content at once, so a sequence continues a copy that its next reader does not hold."""
    order = order_of("lru")
    order.stored([1], 0)
    order.stored([2], 0)
    order.stored([3], SIZE, before=[2])
    order.released([1, 2, 3])
    order.used([1, 3])  # by key: of the copies 1 and 2, the first is found
    assert order.victims(9).tolist() == [2]
    order.released([1, 3])
    assert order.victims(9).tolist() == [1, 3, 2]
    order.check_integrity()


def test_a_block_with_another_content_is_nobodys_parent() -> None:
    order = order_of("lfu")
    order.stored([1, 2], 0)
    order.released([1, 2])
    order.removed([1])  # against the order: what continues it stays
    order.stored([1, 3], 0)
    order.used([3])
    order.released([1, 3])
    order.check_integrity()
    assert order.victims(9).tolist() == [2, 3, 1]
    order.removed([2])
    order.check_integrity()
    assert order.victims(9).tolist() == [3, 1]


def test_blocks_without_a_key_are_nobodys_business() -> None:
    order = order_of("lru")
    order.stored([1, 2], 0)
    order.used([5])
    order.released([2, 1, 7])
    order.removed([7, 8])
    assert order.victims(9).tolist() == [2, 1]
    order.released([1])  # known already
    assert order.victims(9).tolist() == [2, 1]


def test_stale_entries_do_not_pile_up() -> None:
    order = order_of("lfu")
    order.stored([1], 0)
    for _ in range(1000):
        order.released([1])
        order.used([1])
    assert len(order._heap) <= 64
    order.released([1])
    assert order.victims(1).tolist() == [1]


def test_a_second_key_is_refused_and_changes_nothing() -> None:
    order = order_of("lru")
    order.stored([1, 2], 0)
    before = [column.tolist() for column in order.records]
    with pytest.raises(ConfigError, match=r"blocks \[3, 2\] carry a key, some of them already"):
        order.stored([3, 2], 0)
    assert [column.tolist() for column in order.records] == before
    with pytest.raises(ConfigError, match="unknown eviction policy 'lruu': did you mean lru"):
        order_of("lruu")


CORRUPTIONS: dict[str, Callable[[EvictionOrder], object]] = {
    "candidate lost": lambda order: order._heap.clear(),
    "free without a key": lambda order: order.records.created.__setitem__(2, 0),
    "held candidate": lambda order: order.records.free.__setitem__(2, False),
    "children miscounted": lambda order: order.records.free_children.__setitem__(1, 0),
    "the null block": lambda order: order.records.created.__setitem__(0, 1),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_corruption_is_noticed(corrupt: Callable[[EvictionOrder], object]) -> None:
    order = order_of("lru")
    order.stored([1, 2], 0)
    order.released([1, 2])
    order.check_integrity()
    corrupt(order)
    with pytest.raises(IntegrityError, match="candidates are"):
        order.check_integrity()


@pytest.mark.parametrize(
    "name", ["threshold", "next_prompt_estimate", "linear_cost", "attention_cost_per_token", "priority_lifetime"]
)
def test_settings_must_make_sense(name: str) -> None:
    values: list[Any] = [-1] if name in ("threshold", "next_prompt_estimate") else [-1.0, nan]
    for value in [*values, *([inf] if name.endswith(("cost", "per_token")) else [])]:
        with pytest.raises(ConfigError, match=f"eviction {name} is {value}.*it must be 0 or more"):
            EvictionSettings(**{name: value})
