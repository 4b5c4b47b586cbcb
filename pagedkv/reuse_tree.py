"""The tree of stored blocks.

A node is one block, its children are the blocks that followed it in some sequence. Blocks are found by their tokens themselves, so
nothing that only looks alike is ever taken for a hit.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import IntegrityError
from pagedkv.retention import Retention

NO_BLOCK = -1
"""The block of a root."""
_TOKEN_BYTES = 4


@dataclass(slots=True, eq=False, kw_only=True)
class ReuseNode:
    """One stored block. A block that is not full has no children."""

    key: bytes
    """Its tokens, int32."""
    block: int
    """Which block holds them."""
    namespace: str
    """Namespace of the whole tree that it is in."""
    parent: "ReuseNode | None" = None
    """None for a root, and for a node that is in the tree no more."""
    children: dict[bytes, "ReuseNode"] = field(default_factory=dict)
    """By key."""
    sorted_keys: list[bytes] = field(default_factory=list)
    """The keys of its children: those that begin alike are neighbours."""
    num_free_children: int = 0
    """For the pool: children on the GPU that nobody holds."""
    retention: Retention = field(default_factory=Retention)
    """For the pool: what it is worth when nobody holds it."""

    @property
    def num_tokens(self) -> int:
        """Tokens stored in it."""
        return len(self.key) // _TOKEN_BYTES

    def path(self) -> list["ReuseNode"]:
        """Return the nodes from the beginning of its sequence, without the root, to this one."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[-2::-1]

    def subtree(self) -> list["ReuseNode"]:
        """Return this node and all below, parents first. O(nodes)."""
        nodes = [self]
        for node in nodes:
            nodes += node.children.values()
        return nodes

    def nearest_child(self, key: bytes) -> tuple["ReuseNode | None", int]:
        """Return the child that begins with the most tokens of `key`, and how many; None if none begins with its first token.

        O(log children): in sorted order no other shares more than the two neighbours of `key`. On a tie it is the lower one.
        """
        place = bisect_left(self.sorted_keys, key)
        best, most = None, 0
        for candidate in self.sorted_keys[max(place - 1, 0) : place + 1]:
            shared = _num_shared(candidate, key)
            if shared > most:
                best, most = self.children[candidate], shared
        return best, most

    def __repr__(self) -> str:
        tokens, count = np.frombuffer(self.key, np.int32).tolist(), len(self.children)
        return f"ReuseNode({tokens} in block {self.block}, namespace {self.namespace!r}, {count} children, {self.retention})"


class ReuseMatch(NamedTuple):
    """The longest stored prefix of some tokens."""

    path: list[ReuseNode]
    """Its full blocks, in order."""
    partial: ReuseNode | None = None
    """The block that begins with what follows them; None if there is none."""
    num_partial: int = 0
    """With how many tokens it does."""


class ReuseTree:
    """Stored blocks of `block_size` tokens, by namespace and by all tokens up to their end.

    Example:
        >>> tree = ReuseTree(block_size=2)
        >>> node = tree.insert(tree.root(""), np.array([7, 8], np.int32).tobytes(), block=5)
        >>> tree.match("", np.array([7, 9, 9], np.int32))
        ReuseMatch(path=[], partial=ReuseNode([7, 8] in block 5, namespace '', 0 children, Retention(priority=35, duration=None)), \
num_partial=1)
    """

    def __init__(self, *, block_size: int) -> None:
        self.block_bytes = block_size * _TOKEN_BYTES
        self._roots: dict[str, ReuseNode] = {}
        """By namespace, for those in which something is stored."""

    def match(self, namespace: str, tokens: Int32Array) -> ReuseMatch:
        """Return the longest stored prefix of `tokens`, int32 [n]. O(n + blocks hit + log children)."""
        path: list[ReuseNode] = []
        node, data = self._roots.get(namespace), tokens.tobytes()
        for key in self.keys(data):
            if node is None:
                break
            child = node.children.get(key)
            if child is None or len(key) < self.block_bytes:
                return ReuseMatch(path, *node.nearest_child(key))
            path.append(child)
            node = child
        return ReuseMatch(path)

    def keys(self, data: bytes) -> Iterator[bytes]:
        """Yield the tokens in `data` block by block; the last one may be shorter."""
        return (data[at : at + self.block_bytes] for at in range(0, len(data), self.block_bytes))

    def root(self, namespace: str) -> ReuseNode:
        """Return where the sequences of `namespace` begin, to insert below."""
        return self._roots.setdefault(namespace, ReuseNode(key=b"", block=NO_BLOCK, namespace=namespace))

    def insert(self, parent: ReuseNode, key: bytes, block: int) -> ReuseNode:
        """Store `block` behind `parent`, which has no child of that key. O(log children), and moving their sorted keys."""
        node = ReuseNode(key=key, block=block, namespace=parent.namespace, parent=parent)
        parent.children[key] = node
        insort(parent.sorted_keys, key)
        return node

    def remove(self, node: ReuseNode) -> None:
        """Take a node out, with all below. O(nodes below)."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del parent.sorted_keys[bisect_left(parent.sorted_keys, node.key)]
        if parent.block == NO_BLOCK and not parent.children:
            del self._roots[parent.namespace]
        for gone in node.subtree():
            gone.parent, gone.children, gone.sorted_keys = None, {}, []

    def nodes(self) -> list[ReuseNode]:
        """Return all stored nodes, parents first. O(nodes)."""
        return [node for root in self._roots.values() for node in root.subtree()[1:]]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless links, keys and namespaces fit together. O(nodes)."""
        for namespace, root in self._roots.items():
            if not root.children or root.block != NO_BLOCK or root.namespace != namespace or root.parent is not None:
                raise IntegrityError(f"the root of {namespace!r} is none, or has no children: {root}")
            for node in root.subtree():
                if sorted(node.children) != node.sorted_keys or (node is not root and not 0 < len(node.key) <= self.block_bytes):
                    raise IntegrityError(f"keys of children are not those sorted, or the block has no or too many tokens: {node}")
                if node.children and node is not root and len(node.key) < self.block_bytes:
                    raise IntegrityError(f"a block that is not full has children: {node}")
                for key, child in node.children.items():
                    if child.key != key or child.parent is not node or child.namespace != namespace:
                        raise IntegrityError(f"a child has another key, parent or namespace: {child} below {node}")


def _num_shared(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other)) // _TOKEN_BYTES
    differs = np.frombuffer(one, np.int32, length) != np.frombuffer(other, np.int32, length)
    return int(differs.argmax()) if differs.any() else length
