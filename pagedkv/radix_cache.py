"""SGLang's prefix cache over its slots: a radix tree of what was computed, and the free list that its evictions refill.

Source: behaviour of SGLang 0.5.23.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.radix_arrays import EVICTABLE, NO_NODE, RadixArrays, RadixRules
from pagedkv.radix_eviction import evict_leaf
from pagedkv.radix_rules import TreeRules
from pagedkv.radix_tree import RadixTree
from pagedkv.slot_allocator import SlotAllocator
from pagedkv.slot_list import SlotList, make_place, num_listed


class CacheArrays(NamedTuple):
    """A tree and the free list that share one pool."""

    tree: RadixArrays
    slots: SlotList


@lean_jit
def num_free_slots(cache: CacheArrays, rules: RadixRules) -> int:
    """Return the slots in the free list and in nodes that nobody locks."""
    return num_listed(cache.slots) * rules.block_size + int(cache.tree.sizes[EVICTABLE])


@lean_jit
def make_room(cache: CacheArrays, rules: RadixRules, num_slots: int) -> bool:
    """Evict whole leaves as far as the free list is short of `num_slots`; return whether that many are in it now."""
    tree, slots, size = cache.tree, cache.slots, rules.block_size
    while num_listed(slots) * size < num_slots:
        leaf = evict_leaf(tree, rules)
        if leaf == NO_NODE:
            return False
        number = tree.nodes["num_tokens"][leaf] // size
        place = make_place(slots, number, size > 1)
        block = tree.nodes["first_block"][leaf]
        for i in range(number):
            slots.order[place + i] = block
            slots.is_free[block] = True
            block = tree.next_block[block]
    return True


class RadixCache:
    """A `RadixTree` and a `SlotAllocator` that share one pool: each block is free, in the tree, or taken.

    Whole leaves are evicted, and only when the free list is short.

    Example:
        >>> cache = RadixCache(num_blocks=3, block_size=2)
        >>> cache.store(np.array([7, 8, 9, 9], np.int32), cache.take(4))
        >>> cache.peek(np.array([7, 8, 9, 5], np.int32)), cache.slots.num_free_slots, cache.free_slots
        ((2, 2), 2, 6)
        >>> cache.take(4).tolist()  # the leaf goes whole, and to the front
        [2, 3, 4, 5]
    """

    def __init__(self, *, num_blocks: int, block_size: int = 1, eviction: str = "lru", rules: TreeRules | None = None) -> None:
        """Make an empty one; the tree is the server's unless `rules` say otherwise. Block 0 is padding and comes on top.

        Raises:
            ConfigError: If there is no block, or no such eviction policy.
        """
        self.slots = SlotAllocator(num_blocks=num_blocks, block_size=block_size)
        self.tree = RadixTree(block_size=block_size, rules=rules, eviction=eviction, num_blocks=num_blocks)
        self.block_size = block_size
        self.arrays = CacheArrays(self.tree.arrays, self.slots.arrays)
        """Both, for compiled code; with `rules`."""
        self.rules = self.tree.rules
        self._make_room = fixed_types(make_room)  # in one cache their types are the same

    @property
    def free_slots(self) -> int:
        """Slots in the free list and in nodes that nobody locks."""
        return self.slots.num_free_slots + self.tree.evictable_size

    def cached_slots(self) -> Int64Array:
        """Return the slots of the nodes that nobody locks. O(nodes + slots)."""
        return np.concatenate([NO_SLOTS, *(node.slots for node in self.tree.root.below() if not node.lock_ref)])

    def peek(self, tokens: Int32Array, namespace: str = "") -> tuple[int, int]:
        """Return how many tokens a lookup would find, and how many of them nobody locks. Unlike a lookup it is no use of them."""
        met = self.tree.peek(tokens, extra_key=namespace)
        return sum(number for _, number in met), sum(number for node, number in met if not node.lock_ref)

    def make_room(self, num_slots: int) -> bool:
        """Evict whole leaves as far as the free list is short of `num_slots`; return whether that many are in it now."""
        return bool(self._make_room(self.arrays, self.rules, int(num_slots)))

    def take(self, num_slots: int) -> Int32Array:
        """Return so many slots in whole blocks, at most `free_slots`, evicting as far as the free list is short of them.

        For one request that grows by whole blocks these are the slots of `SlotAllocator.alloc_extend`, in its order.
        """
        self.make_room(num_slots)
        taken = self.slots.alloc(num_slots)
        assert taken is not None
        return taken

    def store(
        self,
        tokens: Int32Array,
        slots: Int32Array,
        *,
        namespace: str = "",
        held: int = 0,
        hits_beyond: int = 0,
        priority: int = 0,
    ) -> None:
        """Insert `tokens`, whole blocks, as `RadixTree.insert` does, and give back the slots that the tree did not take."""
        inserted = self.tree.insert(tokens, slots, extra_key=namespace, held=held, hits_beyond=hits_beyond, priority=priority)
        for duplicates in inserted.duplicates:
            self.slots.free_segment(duplicates)

    def check_integrity(self, taken: Sequence[Int32Array]) -> None:
        """Raise IntegrityError unless each block is free, in the tree, or in one of the runs `taken`, and only once."""
        self.slots.check_integrity()
        self.tree.check_integrity()
        free, nodes = self.slots.free_list(), list(self.tree.root.below())
        blocks = (slots[:: self.block_size] // self.block_size for slots in (*taken, *(node.slots for node in nodes)))
        if not np.array_equal(np.sort(np.concatenate([free, *blocks])), np.arange(1, self.slots.num_blocks + 1)):
            raise IntegrityError(f"blocks lost or given twice: {free.tolist()} are free, {nodes} in the tree, {taken} taken")
