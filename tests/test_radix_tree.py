"""The radix tree and its slot allocator: single rules, wrong use, and corruption that integrity checks must notice."""

from collections.abc import Callable
from typing import Any

import pytest

from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings
from pagedkv.radix_arrays import EVICTABLE, NUM_CANDIDATES
from pagedkv.radix_eviction import POLICIES
from pagedkv.radix_node import TreeNode
from pagedkv.radix_rules import RadixCacheRules, UnifiedRules
from pagedkv.radix_tree import RadixTree
from pagedkv.slot_allocator import SlotAllocator


def test_a_checkpoint_lets_an_output_go_before_its_prompt() -> None:
    tree = RadixTree(block_size=2, eviction="priority")
    finished = tree.insert([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7])
    prompt = tree.checkpoint(finished.node, 3)
    assert (prompt.depth, prompt.priority, finished.node.priority) == (2, 1, 0)
    tree.insert([9, 9], [8, 9])
    assert [piece.tolist() for piece in tree.evict(6)] == [[4, 5, 6, 7], [8, 9]]  # the prompt outlives what is newer
    assert tree.checkpoint(prompt, 2) == prompt
    assert prompt.priority == 1


@pytest.mark.parametrize("rules", [RadixCacheRules, UnifiedRules])
def test_a_split_does_not_move_a_lock(rules: Any) -> None:
    tree = RadixTree(rules=rules())
    node = tree.insert([1, 2, 3, 4], [11, 12, 13, 14]).node
    tree.inc_lock_ref(node)
    assert tree.match_prefix([1, 2, 9]).slots.tolist() == [11, 12]
    assert (tree.evict(9), tree.protected_size) == ([], 4)
    tree.dec_lock_ref(node)
    assert [piece.tolist() for piece in tree.evict(3)] == [[13, 14], [11, 12]]


def test_an_evicted_node_cannot_be_locked() -> None:
    tree = RadixTree()
    lower = tree.insert([1, 2, 3], [11, 12, 13]).node
    upper = tree.match_prefix([1]).node
    for node, size in ((lower, 2), (upper, 1)):
        assert sum(len(piece) for piece in tree.evict(1)) == size
        with pytest.raises(ConfigError, match="not in this tree"):
            tree.inc_lock_ref(node)
        tree.check_integrity()
    with pytest.raises(ConfigError, match="not in this tree"):
        tree.inc_lock_ref(RadixTree().root)


def test_a_refused_allocation_takes_nothing() -> None:
    slots = SlotAllocator(num_blocks=3, block_size=4, need_sort=True)
    slots.alloc(12)
    slots.free([12])
    slots.free([4])
    before = sorted(slots.free_list().tolist())
    assert slots.alloc(12) is None
    assert slots.alloc_extend(pre=[0, 0], seq=[5, 4], last=[-1, -1]) is None
    assert sorted(slots.free_list().tolist()) == before == [1, 3]
    slots.check_integrity()


@pytest.mark.parametrize("need_sort", [False, True])
def test_a_free_list_that_goes_round_many_times(need_sort: bool) -> None:
    slots, queue = SlotAllocator(num_blocks=7, need_sort=need_sort), list(range(1, 8))
    for n in range(100):
        taken = slots.alloc(1 + n % 5)
        assert taken is not None
        if not need_sort:
            assert taken.tolist() == queue[: taken.size]
            queue = queue[taken.size :] + taken.tolist()
        slots.free(taken)
        slots.check_integrity()


def test_a_tree_has_room_for_blocks_beyond_those_it_began_with() -> None:
    tree = RadixTree(block_size=2)
    node = tree.insert([1, 2, 3, 4], [2, 3, 4, 5]).node
    tree.insert([1, 2, 7, 7], [2, 3, 2 * 5000, 2 * 5000 + 1], held=2)
    tree.insert([9, 9], [2 * 90_000, 2 * 90_000 + 1])
    tree.check_integrity()
    assert tree.match_prefix([1, 2, 7, 7]).slots.tolist() == [2, 3, 10_000, 10_001]
    assert (node.tokens.tolist(), node.slots.tolist()) == ([3, 4], [4, 5])
    assert sum(piece.size for piece in tree.evict(99)) == 8
    fixed = RadixTree(num_blocks=3)
    with pytest.raises(ConfigError, match="block 4 is not of this pool"):
        fixed.insert([1], [4])


def test_every_policy_has_a_number_for_compiled_code() -> None:
    assert sorted(POLICIES) == sorted(EVICTION_POLICIES.names())


def spoil(tree: RadixTree, node: TreeNode, name: str, value: int) -> None:
    tree.arrays.nodes[name][node.index] = value


def same_slots(tree: RadixTree, upper: TreeNode, lower: TreeNode) -> None:
    for name in ("first_block", "last_block"):
        spoil(tree, lower, name, tree.arrays.nodes[name][upper.index])


CORRUPTIONS: dict[str, Callable[[RadixTree, TreeNode, TreeNode], object]] = {
    "wrong size": lambda tree, upper, lower: tree.arrays.sizes.__setitem__(EVICTABLE, 3),
    "lock below an unlocked parent": lambda tree, upper, lower: spoil(tree, lower, "lock_ref", 2),
    "candidate forgotten": lambda tree, upper, lower: tree.arrays.sizes.__setitem__(NUM_CANDIDATES, 0),
    "locked candidate": lambda tree, upper, lower: tree.arrays.candidates.__setitem__(0, upper.index),
    "candidates out of order": lambda tree, upper, lower: spoil(tree, lower, "rank", 99),
    "slot twice": same_slots,
    "run too short": lambda tree, upper, lower: spoil(tree, lower, "last_block", 1),
    "wrong depth": lambda tree, upper, lower: spoil(tree, lower, "depth", 8),
    "deepest too small": lambda tree, upper, lower: spoil(tree, upper, "deepest", 2),
    "parent lost": lambda tree, upper, lower: spoil(tree, lower, "parent", 7),
    "child under another key": lambda tree, upper, lower: tree.arrays.tokens.__setitem__(slice(4, 6), (1, 2)),
    "another namespace": lambda tree, upper, lower: spoil(tree, lower, "namespace", tree.namespace_number("b")),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_tree_notices_corruption(corrupt: Callable[[RadixTree, TreeNode, TreeNode], object]) -> None:
    tree = RadixTree(block_size=2)
    lower = tree.insert([1, 2, 3, 4], [2, 3, 4, 5]).node
    upper = tree.match_prefix([1, 2]).node
    tree.insert([8, 8], [6, 7])
    tree.inc_lock_ref(upper)
    tree.check_integrity()
    corrupt(tree, upper, lower)
    with pytest.raises(IntegrityError):
        tree.check_integrity()


@pytest.mark.parametrize("wrong", [{"block_size": 0}, {"eviction": "lrv"}])
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RadixTree(**wrong)
    with pytest.raises(ConfigError):
        SlotAllocator(num_blocks=0)
    with pytest.raises(ConfigError):
        EvictionSettings(threshold=-1)
