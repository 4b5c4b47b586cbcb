"""SGLang's prefix cache over its slots: a radix tree of what was computed, and the free list that its evictions refill.

Source: behaviour of SGLang 0.5.23.
"""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.radix_node import edge_key
from pagedkv.radix_rules import TreeRules
from pagedkv.radix_tree import RadixTree
from pagedkv.slot_allocator import SlotAllocator


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
        self.tree = RadixTree(block_size=block_size, rules=rules, eviction=eviction)
        self.block_size = block_size

    @property
    def free_slots(self) -> int:
        """Slots in the free list and in nodes that nobody locks."""
        return self.slots.num_free_slots + self.tree.evictable_size

    def cached_slots(self) -> Int64Array:
        """Return the slots of the nodes that nobody locks. O(nodes + slots)."""
        return np.concatenate([NO_SLOTS, *(node.slots for node in self.tree.root.below() if not node.lock_ref)])

    def peek(self, tokens: Int32Array, namespace: str = "") -> tuple[int, int]:
        """Return how many tokens a lookup would find, and how many of them nobody locks. Unlike a lookup it is no use of them."""
        node, found, num_unlocked = self.tree.root, 0, 0
        while found == node.depth and tokens.size - found >= self.block_size:
            rest = tokens[found:]
            child = node.children.get(edge_key(namespace, rest, self.block_size))
            if child is None:
                break
            shared = child.num_shared(rest, self.block_size)
            found, num_unlocked = found + shared, num_unlocked + (0 if child.lock_ref else shared)
            node = child
        return found, num_unlocked

    def take(self, num_slots: int) -> Int32Array:
        """Return so many slots in whole blocks, at most `free_slots`, evicting as far as the free list is short of them.

        For one request that grows by whole blocks these are the slots of `SlotAllocator.alloc_extend`, in its order.
        """
        if num_slots > self.slots.num_free_slots:
            for slots in self.tree.evict(num_slots - self.slots.num_free_slots):
                self.slots.free_segment(slots)
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
