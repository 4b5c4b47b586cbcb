"""The radix tree and its slot allocator, step by step against a plain dict of the stored tokens."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pagedkv.errors import ConfigError
from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings
from pagedkv.radix_arrays import NUM_CANDIDATES, NUM_PLACES
from pagedkv.radix_node import TreeNode
from pagedkv.radix_rules import RadixCacheRules, UnifiedRules
from pagedkv.radix_tree import RadixTree
from pagedkv.slot_allocator import SlotAllocator

Prefix = tuple[str | None, tuple[int, ...]]
Place = tuple[Prefix, int]
"""A stored token: its prefix up to the end of its block, and where it stands in that."""
NUM_BLOCKS = 24
SEQUENCES = st.lists(st.integers(0, 1), max_size=14)
NAMESPACES = st.sampled_from([None, "a"])


def state_of(thing: Any) -> Any:
    """Everything a tree or an allocator is made of, as plain values."""
    if isinstance(thing, RadixTree):
        number = int(thing.arrays.sizes[NUM_PLACES])
        sizes, leaves = thing.arrays.sizes.tolist(), thing.arrays.candidates[: thing.arrays.sizes[NUM_CANDIDATES]].tolist()
        runs = [(node.tokens.tolist(), node.slots.tolist()) for node in thing.root.below()]
        return thing.arrays.nodes[:number].tolist(), sizes, thing.arrays.times.tolist(), leaves, runs
    if isinstance(thing, SlotAllocator):
        return {name: state_of(part) for name, part in vars(thing).items()}
    if isinstance(thing, tuple):
        return [state_of(part) for part in thing]
    return thing.tolist() if isinstance(thing, np.ndarray) else thing


class RadixMachine(RuleBasedStateMachine):
    """The oracle is `stored`, the one slot of each stored token, and `locks`, the prefixes that are locked."""

    tree_rules: type[RadixCacheRules] | type[UnifiedRules]
    eviction: str

    @initialize(block_size=st.sampled_from([1, 2, 3]))
    def start(self, block_size: int) -> None:
        self.block_size = block_size
        self.allocator = SlotAllocator(num_blocks=NUM_BLOCKS, block_size=block_size)
        wants = EvictionSettings(threshold=2, next_prompt_estimate=1)
        self.tree = RadixTree(block_size=block_size, rules=self.tree_rules(), eviction=self.eviction, eviction_settings=wants)
        self.stored: dict[Place, int] = {}
        self.locks: list[tuple[Prefix, TreeNode]] = []
        self.evicted: list[TreeNode] = []

    def whole(self, tokens: list[int]) -> tuple[int, ...]:
        return tuple(tokens[: len(tokens) // self.block_size * self.block_size])

    def places(self, namespace: str | None, key: tuple[int, ...]) -> list[Place]:
        size = self.block_size
        return [((namespace, key[: (n // size + 1) * size]), n) for n in range(len(key))]

    def expected(self, namespace: str | None, tokens: list[int]) -> list[int]:
        """The slots of the longest stored prefix, in whole blocks."""
        places = self.places(namespace, self.whole(tokens))
        return [self.stored[place] for place in takewhile(self.stored.__contains__, places)]

    @rule(tokens=SEQUENCES, namespace=NAMESPACES, lock=st.booleans())
    def match(self, tokens: list[int], namespace: str | None, lock: bool) -> None:
        slots, node = self.tree.match_prefix(tokens, extra_key=namespace)
        assert slots.tolist() == self.expected(namespace, tokens)
        assert node.depth == len(slots)
        if lock:
            self.lock((namespace, tuple(tokens[: node.depth])), node)

    @rule(
        tokens=SEQUENCES,
        namespace=NAMESPACES,
        hold=st.booleans(),
        lock=st.booleans(),
        priority=st.integers(0, 2),
        checkpoint=st.none() | st.integers(0, 14),
    )
    def insert(
        self, tokens: list[int], namespace: str | None, hold: bool, lock: bool, priority: int, checkpoint: int | None
    ) -> None:
        key = self.whole(tokens)
        present = self.expected(namespace, tokens)
        held = present if hold else []
        taken = self.allocator.alloc(len(key) - len(held))
        if taken is None:
            return
        slots = [*held, *taken.tolist()]
        done = self.tree.insert(key, slots, extra_key=namespace, held=len(held), priority=priority)
        assert done.num_present == len(present)
        assert [slot for piece in done.duplicates for slot in piece.tolist()] == slots[len(held) : len(present)]
        assert done.node.depth == len(key)
        for piece in done.duplicates:
            self.allocator.free_segment(piece)
        self.stored |= dict(list(zip(self.places(namespace, key), slots, strict=True))[len(present) :])
        if checkpoint is not None and not done.node.children:
            prompt = self.tree.checkpoint(done.node, checkpoint)
            assert prompt == done.node or prompt.depth == checkpoint // self.block_size * self.block_size
        if lock:
            self.lock((namespace, key), done.node)

    def lock(self, prefix: Prefix, node: TreeNode) -> None:
        self.tree.inc_lock_ref(node)
        self.locks.append((prefix, node))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        _, node = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.tree.dec_lock_ref(node)

    def is_locked(self, prefix: Prefix) -> bool:
        namespace, tokens = prefix
        return any(ns == namespace and key[: len(tokens)] == tokens for (ns, key), _ in self.locks)

    @rule(num_tokens=st.integers(-1, 12) | st.just(1000))
    def evict(self, num_tokens: int) -> None:
        nodes = list(self.tree.root.below())
        freed = self.tree.evict(num_tokens)
        left = set(self.tree.root.below())
        self.evicted = [node for node in nodes if node not in left]
        unlocked = sum(not self.is_locked(prefix) for prefix, _ in self.stored)
        gone = {slot for piece in freed for slot in piece.tolist()}
        assert len(gone) == sum(len(piece) for piece in freed)
        assert len(gone) == unlocked or len(gone) >= num_tokens
        assert not freed or len(gone) - len(freed[-1]) < num_tokens
        assert not any(self.is_locked(prefix) for (prefix, _), slot in self.stored.items() if slot in gone)
        self.stored = {place: slot for place, slot in self.stored.items() if slot not in gone}
        for piece in freed:
            self.allocator.free_segment(piece)

    @rule(data=st.data(), tokens=SEQUENCES, namespace=NAMESPACES)
    def wrong_calls_change_nothing(self, data: st.DataObject, tokens: list[int], namespace: str | None) -> None:
        key, present, size = self.whole(tokens), self.expected(namespace, tokens), self.block_size
        fresh = [10_000 * size + i for i in range(len(key))]
        wrong: list[Callable[[], object]] = [
            lambda: self.tree.match_prefix([0.5]),  # type: ignore[list-item]
            lambda: self.tree.insert(key, fresh, extra_key=namespace, held=-size),
            lambda: self.tree.insert(key, fresh, extra_key=namespace, held=len(key) + size),
            lambda: self.allocator.alloc(-size),
            lambda: self.allocator.free([0]),
            lambda: self.allocator.free([(NUM_BLOCKS + 1) * size]),
            lambda: self.allocator.alloc_extend(pre=[2], seq=[1], last=[size]),
        ]
        if key:
            wrong.append(lambda: self.tree.insert(key, fresh[:-1], extra_key=namespace))
        if present:
            wrong.append(lambda: self.tree.insert(key, present + fresh[len(present) :], extra_key=namespace))
        if size > 1 and key:
            wrong.append(lambda: self.tree.insert(key, [slot + 1 for slot in fresh], extra_key=namespace))
            wrong.append(lambda: self.tree.insert(key, fresh, extra_key=namespace, held=1))
        free = self.allocator.free_list().tolist()
        if free:
            wrong.append(lambda: self.allocator.free([free[0] * size]))
            wrong.append(lambda: self.allocator.free_group(segments=[[free[-1] * size]]))
        if self.stored:
            slot = next(iter(self.stored.values())) // size * size
            wrong.append(lambda: self.allocator.free_group(whole=[[slot]], segments=[[slot]]))
        wrong += [lambda node=node: self.tree.inc_lock_ref(node) for node in self.evicted]  # type: ignore[misc]
        unlocked = [node for node in self.tree.root.below() if node.lock_ref == 0]
        wrong += [lambda node=node: self.tree.dec_lock_ref(node) for node in unlocked]  # type: ignore[misc]
        call = data.draw(st.sampled_from(wrong))
        before = state_of(self.tree), state_of(self.allocator)
        with pytest.raises(ConfigError):
            call()
        assert (state_of(self.tree), state_of(self.allocator)) == before

    @invariant()
    def agrees(self) -> None:
        self.tree.check_integrity()
        self.allocator.check_integrity()
        assert self.tree.total_size == len(self.stored)
        assert self.tree.protected_size == sum(self.is_locked(prefix) for prefix, _ in self.stored)
        assert self.allocator.num_free_slots + self.tree.total_size == NUM_BLOCKS * self.block_size
        for node in self.tree.root.below():
            places = self.places(str(node.namespace) if node.namespace else None, tuple(tokens_to(node)))
            assert [self.stored[place] for place in places[-node.num_tokens :]] == node.slots.tolist()

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for _, node in self.locks:
            self.tree.dec_lock_ref(node)
        self.locks.clear()
        self.evict(1000)
        self.agrees()
        assert self.tree.total_size == 0


def tokens_to(node: TreeNode) -> list[int]:
    return [token for above in node.path() for token in above.tokens.tolist()]


@pytest.mark.parametrize("eviction", EVICTION_POLICIES.names())
@pytest.mark.parametrize("rules", [RadixCacheRules, UnifiedRules])
def test_tree_agrees_with_its_oracle(rules: Any, eviction: str) -> None:
    machine = type("Machine", (RadixMachine,), {"tree_rules": rules, "eviction": eviction})
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=40))
