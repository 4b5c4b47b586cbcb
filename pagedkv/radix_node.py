"""A node of the radix tree: a run of tokens, and the slots that hold their K and V. With what the tree answers about nodes."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.slot_allocator import Integers, int32_array

EdgeKey: TypeAlias = tuple[Hashable, bytes]
"""Namespace and first block of a run: what tells the children of a node apart."""


def edge_key(namespace: Hashable, tokens: Int32Array, block_size: int) -> EdgeKey:
    """Return the key of a run that begins with `tokens`."""
    return (namespace, tokens[:block_size].tobytes())


def are_whole_blocks(slots: Int32Array, block_size: int) -> bool:
    """Return whether `slots`, a multiple of block_size long, are blocks from their first slot to their last."""
    blocks = slots.reshape(-1, block_size)
    return not (blocks != blocks[:, :1] + np.arange(block_size)).any() and not (blocks[:, 0] % block_size).any()


@dataclass(slots=True, eq=False, kw_only=True)
class TreeNode:
    """One run. It has the attributes of an `EvictionCandidate`; the root is an empty run at depth 0."""

    tokens: Int32Array
    """The run, whole blocks."""
    slots: Int32Array
    """One slot per token. The tree owns them as long as the node is in it."""
    namespace: Hashable
    """Its extra_key; of no meaning for the root."""
    parent: "TreeNode | None"
    """None for the root, and for a node that was evicted."""
    depth: int
    """Tokens from the beginning of the sequence to the end of this run."""
    deepest: int = 0
    """The largest depth ever stored at or below this node."""
    children: dict[EdgeKey, "TreeNode"] = field(default_factory=dict)
    lock_ref: int = 0
    """Locks on this node and below."""
    hit_count: int = 0
    """Insertions that went through it."""
    priority: int = 0
    """The highest among these insertions."""
    last_access: float = 0.0
    """A reading of the tree's counter."""
    created: float = 0.0
    """A reading of the tree's counter."""
    expired: bool = False
    """The tree gives priorities for ever."""
    inflation: float = 0.0
    """The highest rank evicted before it was last used, if the tree's owner keeps it."""

    @property
    def num_tokens(self) -> int:
        """Tokens in this run."""
        return self.tokens.size

    def num_shared(self, tokens: Int32Array, block_size: int) -> int:
        """Return how many tokens, in whole blocks, this run and `tokens` begin with alike. O(the shorter one)."""
        length = min(self.num_tokens, tokens.size)
        differs = self.tokens[:length] != tokens[:length]
        first = int(differs.argmax())
        return (first if differs[first] else length) // block_size * block_size

    def path(self) -> list["TreeNode"]:
        """Return all nodes from the root, or from what is left of an evicted branch, down to this one."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[::-1]

    def below(self) -> Iterator["TreeNode"]:
        """Yield every node below this one, parents first."""
        stack = list(self.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def add_child(self, tokens: Int32Array, slots: Int32Array, namespace: Hashable, block_size: int) -> "TreeNode":
        """Continue this run by a new leaf."""
        leaf = TreeNode(tokens=tokens.copy(), slots=slots.copy(), namespace=namespace, parent=self, depth=self.depth + tokens.size)
        self.children[edge_key(namespace, tokens, block_size)] = leaf
        return leaf

    def detach(self, block_size: int) -> "TreeNode":
        """Take this leaf off its parent, which is returned."""
        parent = self.parent
        assert parent is not None
        del parent.children[edge_key(self.namespace, self.tokens, block_size)]
        self.parent = None
        return parent

    def split(self, length: int, block_size: int) -> "TreeNode":
        """Cut off the first `length` tokens as a new parent, which is returned. This node stays the end: locks do not move."""
        parent = self.parent
        assert parent is not None
        upper = TreeNode(
            tokens=self.tokens[:length].copy(),  # copies, so that evicting one part frees its memory
            slots=self.slots[:length].copy(),
            namespace=self.namespace,
            parent=parent,
            depth=self.depth - self.num_tokens + length,
            deepest=self.deepest,
            lock_ref=self.lock_ref,
            hit_count=self.hit_count,
            priority=self.priority,
            last_access=self.last_access,
            created=self.created,
            inflation=self.inflation,
        )
        parent.children[edge_key(self.namespace, self.tokens, block_size)] = upper
        self.tokens, self.slots, self.parent = self.tokens[length:].copy(), self.slots[length:].copy(), upper
        upper.children[edge_key(self.namespace, self.tokens, block_size)] = self
        return upper

    def check_integrity(self, block_size: int) -> None:
        """Raise IntegrityError unless the node fits its parent and its own arrays."""
        parent = self.parent
        if parent is None or parent.children.get(edge_key(self.namespace, self.tokens, block_size)) is not self:
            raise IntegrityError(f"a node is not the child of its parent: {self}")
        if not 0 < self.num_tokens == self.slots.size == self.depth - parent.depth or self.num_tokens % block_size:
            raise IntegrityError(f"a run does not fit its slots, its depth or blocks of {block_size}: {self}")
        top = parent.parent is None
        if self.lock_ref < 0 or not (top or (self.lock_ref <= parent.lock_ref and self.namespace == parent.namespace)):
            raise IntegrityError(f"a node has more locks than its parent, or another namespace: {self}")
        if self.deepest < self.depth or not (top or self.deepest <= parent.deepest):
            raise IntegrityError(f"a node does not know how deep it goes: {self}")
        if not are_whole_blocks(self.slots, block_size):
            raise IntegrityError(f"the slots are no whole blocks of {block_size}: {self}")

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


def checked_slots(slots: Integers, num_tokens: int, held: int, path: Sequence[TreeNode], block_size: int) -> Int32Array:
    """Return the slots that an insertion brings for `num_tokens` tokens, whose beginning is stored in `path`.

    Raises:
        ConfigError: If they are not one per token in whole blocks, or one that is not `held` is the tree's already.
    """
    array = int32_array(slots, what="slots")
    if array.size < num_tokens or not 0 <= held <= num_tokens or held % block_size:
        raise ConfigError(f"{array.size} slots for {num_tokens} tokens, {held} held: needs one each, and whole blocks held")
    array = array[:num_tokens]
    if not are_whole_blocks(array, block_size):
        raise ConfigError(f"slots {array.tolist()} are no whole blocks of {block_size}")
    stored = np.concatenate([array[:0], *(node.slots for node in path)])[:num_tokens]
    own = array[held : stored.size] == stored[held:]
    if own.any():
        raise ConfigError(f"slot {array[held + own.argmax()]} is the tree's own: held must count it, not be {held}")
    return array
