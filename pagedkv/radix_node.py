"""A node of the radix tree as Python sees it: a run of tokens, and the slots that hold their K and V."""

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import IntegrityError
from pagedkv.radix_arrays import NO_NODE, ROOT

if TYPE_CHECKING:
    from pagedkv.radix_tree import RadixTree


def slots_of_blocks(blocks: Int32Array, block_size: int) -> Int32Array:
    """Return the slots of `blocks`, in order."""
    slots: Int32Array = np.add.outer(blocks * np.int32(block_size), np.arange(block_size, dtype=np.int32)).ravel()
    return slots


def are_whole_blocks(slots: Int32Array, block_size: int) -> bool:
    """Return whether `slots`, a multiple of block_size long, are blocks from their first slot to their last."""
    blocks = slots.reshape(-1, block_size)
    return not (blocks != blocks[:, :1] + np.arange(block_size)).any() and not (blocks[:, 0] % block_size).any()


class TreeNode:
    """One run, a look at a record of its tree: what it says is so now. It is equal to any other look at the same node.

    The root is an empty run at depth 0. What is said of a node that was evicted means nothing, but for `is_stored`.
    """

    __slots__ = ("_tree", "index", "serial")

    def __init__(self, tree: "RadixTree", index: int) -> None:
        self._tree, self.index = tree, index
        self.serial = int(tree.arrays.nodes["serial"][index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeNode) and self._tree is other._tree and self.serial == other.serial

    def __hash__(self) -> int:
        return hash((id(self._tree), self.serial))

    def is_stored_in(self, tree: "RadixTree") -> bool:
        """Return whether it is one of `tree` (still)."""
        return self._tree is tree and self.serial == int(tree.arrays.nodes["serial"][self.index])

    @property
    def num_tokens(self) -> int:
        """Tokens in this run, whole blocks."""
        return int(self._record["num_tokens"])

    @property
    def slots(self) -> Int32Array:
        """One slot per token. The tree owns them as long as the node is in it. A copy."""
        return slots_of_blocks(self.blocks(), self._tree.block_size)

    @property
    def tokens(self) -> Int32Array:
        """The run. A copy."""
        return self._tree.arrays.tokens[self.slots]

    @property
    def namespace(self) -> Hashable:
        """Its extra_key; of no meaning for the root."""
        return self._tree.namespaces[int(self._record["namespace"])]

    @property
    def parent(self) -> "TreeNode | None":
        """None for the root."""
        return None if self.index == ROOT else TreeNode(self._tree, int(self._record["parent"]))

    @property
    def children(self) -> list["TreeNode"]:
        """The runs that continue this one, in the order in which they came."""
        found, child = [], int(self._record["first_child"])
        while child != NO_NODE:
            found.append(TreeNode(self._tree, child))
            child = int(self._tree.arrays.nodes["younger"][child])
        return found

    @property
    def depth(self) -> int:
        """Tokens from the beginning of the sequence to the end of this run."""
        return int(self._record["depth"])

    @property
    def deepest(self) -> int:
        """The largest depth ever stored at or below this node."""
        return int(self._record["deepest"])

    @property
    def lock_ref(self) -> int:
        """Locks on this node and below."""
        return int(self._record["lock_ref"])

    @property
    def hit_count(self) -> int:
        """Insertions that went through it."""
        return int(self._record["hit_count"])

    @property
    def priority(self) -> int:
        """The highest among these insertions."""
        return int(self._record["priority"])

    @property
    def last_access(self) -> float:
        """A reading of the tree's clock."""
        return float(self._record["last_access"])

    @property
    def created(self) -> float:
        """A reading of the tree's clock."""
        return float(self._record["created"])

    @property
    def inflation(self) -> float:
        """The highest rank evicted before it was last used."""
        return float(self._record["inflation"])

    def path(self) -> list["TreeNode"]:
        """Return all nodes from the root down to this one."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[::-1]

    def below(self) -> Iterator["TreeNode"]:
        """Yield every node below this one, parents first."""
        stack = self.children
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children)

    def blocks(self) -> Int32Array:
        """Return the blocks of its slots. A copy."""
        arrays, number = self._tree.arrays, self.num_tokens // self._tree.block_size
        blocks = np.zeros(number, np.int32)
        block = int(self._record["first_block"])
        for i in range(number):
            blocks[i] = block
            block = int(arrays.next_block[block])
        return blocks

    @property
    def _record(self) -> np.void:
        record: np.void = self._tree.arrays.nodes[self.index]
        return record

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the node fits its parent, its siblings and its own run."""
        parent, size = self.parent, self._tree.block_size
        if parent is None or not parent.is_stored_in(self._tree) or not self._tree.finds(self):
            raise IntegrityError(f"a node is not the child of its parent: {self}")
        if not 0 < self.num_tokens == self.depth - parent.depth or self.num_tokens % size:
            raise IntegrityError(f"a run does not fit its depth or blocks of {size}: {self}")
        top = parent.index == ROOT
        if self.lock_ref < 0 or not (top or (self.lock_ref <= parent.lock_ref and self.namespace == parent.namespace)):
            raise IntegrityError(f"a node has more locks than its parent, or another namespace: {self}")
        if self.deepest < self.depth or not (top or self.deepest <= parent.deepest):
            raise IntegrityError(f"a node does not know how deep it goes: {self}")
        if self.blocks()[-1] != self._record["last_block"]:
            raise IntegrityError(f"a run does not end with its last block {self._record['last_block']}: {self}")

    def __repr__(self) -> str:
        return (
            f"TreeNode({self.tokens.tolist()} in slots {self.slots.tolist()}, namespace {self.namespace!r}, depth {self.depth} "
            f"of {self.deepest}, {len(self.children)} children, lock_ref {self.lock_ref})"
        )


class PrefixMatch(NamedTuple):
    """The longest stored prefix of a sequence, in whole blocks."""

    slots: Int32Array
    """One slot per matched token."""
    node: TreeNode
    """Where the match ends: what to lock. The root if nothing matched."""


class Insertion(NamedTuple):
    """What became of the slots of an inserted sequence."""

    num_present: int
    """Tokens that were stored already; the tree owns the slots of the others now."""
    node: TreeNode
    """Where the sequence ends: what to lock."""
    duplicates: list[Int32Array]
    """Slots of the caller that the tree did not take: to be given back with `SlotAllocator.free_segment`, in this order."""
