"""The tree of stored blocks, for one call at a time, and what must be true of it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import IntegrityError
from pagedkv.reuse_nodes import (
    HIGHER,
    LOWER,
    NO_NODE,
    NODE,
    TOP,
    TreeArrays,
    find_child,
    insert_node,
    match_prefix,
    remove_node,
    write_below,
)
from pagedkv.token_source import GivenTokens


class ReuseMatch(NamedTuple):
    """The longest stored prefix of some tokens."""

    path: list[int]
    """The nodes of its full blocks, in order."""
    partial: int | None = None
    """The node that begins with what follows them; None if there is none."""
    num_partial: int = 0
    """With how many tokens it does."""


class ReuseTree:
    """Up to `capacity` stored blocks of `block_size` tokens, by namespace and by all tokens up to their end.

    Example:
        >>> tree = ReuseTree(capacity=4, block_size=2)
        >>> node = tree.insert(tree.root(""), np.array([7, 8], np.int32), block=5)
        >>> tree.match("", np.array([7, 9, 9], np.int32)), tree.describe(node)
        (ReuseMatch(path=[], partial=0, num_partial=1), "node 0: [7, 8] in block 5, namespace '', 0 children")
    """

    def __init__(self, *, capacity: int, block_size: int, max_path: int | None = None) -> None:
        num_roots = capacity + 2  # more than can have children, and that of no namespace
        nodes = np.zeros(capacity + num_roots, NODE)
        for name in ("parent", "first_child", "last_child", "next", "previous"):
            nodes[name] = NO_NODE
        self.arrays = TreeArrays(
            nodes,
            np.zeros((capacity, block_size), np.int32),
            np.full((capacity + num_roots, 3), NO_NODE, np.int32),
            np.arange(capacity, dtype=np.int32)[::-1].copy(),
            np.full(1, capacity, np.int64),
            np.zeros(block_size, np.int32),
            np.zeros(capacity if max_path is None else max_path, np.int32),
            np.zeros(capacity + 1, np.int32),
        )
        self._roots = {"": capacity}
        """By namespace; those in which nothing is stored any more, but for the first, give way to others."""
        self._free_roots = list(range(capacity + 1, capacity + num_roots))

    def root(self, namespace: str) -> int:
        """Return where the sequences of `namespace` begin, to insert below. O(1) amortised."""
        if namespace not in self._roots:
            if not self._free_roots:
                empty = [name for name, root in self._roots.items() if name and self.arrays.links[root, TOP] == NO_NODE]
                self._free_roots = [self._roots.pop(name) for name in empty]
            self._roots[namespace] = self._free_roots.pop()
        return self._roots[namespace]

    def find_root(self, namespace: str) -> int:
        """Return where the sequences of `namespace` begin, NO_NODE if nothing was stored there."""
        return self._roots.get(namespace, NO_NODE)

    def match(self, namespace: str, tokens: Int32Array) -> ReuseMatch:
        """Return the longest stored prefix of `tokens`, int32 [n]: `match_prefix`. Its path must not exceed max_path."""
        number, partial, shared = match_prefix(self.arrays, self.find_root(namespace), GivenTokens(tokens), tokens.size)
        return ReuseMatch(self.arrays.path[:number].tolist(), None if partial == NO_NODE else partial, shared)

    def child(self, parent: int, tokens: Int32Array) -> int | None:
        """Return the child of `parent` that has these tokens, if there is one."""
        self.arrays.key[: tokens.size] = tokens
        child = find_child(self.arrays, parent, tokens.size)
        return None if child == NO_NODE else child

    def insert(self, parent: int, tokens: Int32Array, block: int) -> int:
        """Store `block`, which has these tokens, behind `parent`, which has no such child."""
        self.arrays.key[: tokens.size] = tokens
        return int(insert_node(self.arrays, parent, tokens.size, block))

    def remove(self, node: int) -> None:
        """Take a node out, with all below."""
        remove_node(self.arrays, node, write_below(self.arrays, node))

    def tokens_of(self, node: int) -> list[int]:
        """Return the tokens stored in `node`."""
        if not 0 <= node < len(self.arrays.tokens):  # a root
            return []
        tokens: list[int] = self.arrays.tokens[node, : self.arrays.nodes["num_tokens"][node]].tolist()
        return tokens

    def tokens_up_to(self, node: int) -> list[int]:
        """Return the tokens from the beginning of its sequence to the end of `node`."""
        tokens: list[int] = []
        while 0 <= node < len(self.arrays.tokens):
            tokens = self.tokens_of(node) + tokens
            node = int(self.arrays.nodes["parent"][node])
        return tokens

    def children(self, node: int) -> Iterator[int]:
        """Yield its children, oldest first."""
        child = int(self.arrays.nodes["first_child"][node])
        while child != NO_NODE:
            yield child
            child = int(self.arrays.nodes["next"][child])

    def nodes(self, namespace: str | None = None) -> list[int]:
        """Return all stored nodes, or those of one namespace, parents first. O(nodes)."""
        roots = self._roots.values() if namespace is None else [self._roots[namespace]] if namespace in self._roots else []
        return [node for root in roots for node in self.arrays.below[1 : write_below(self.arrays, root)].tolist()]

    def describe(self, node: int) -> str:
        """Return a line for a message."""
        root = node
        while 0 <= root < len(self.arrays.tokens):
            root = int(self.arrays.nodes["parent"][root])
        where = next((name for name, number in self._roots.items() if number == root), None)
        block, number = self.arrays.nodes["block"][node], sum(1 for _ in self.children(node))
        return f"node {node}: {self.tokens_of(node)} in block {block}, namespace {where!r}, {number} children"

    def check_integrity(self) -> None:
        """Raise IntegrityError unless links, tokens and numbers fit together. O(nodes)."""
        tree, capacity = self.arrays, len(self.arrays.tokens)
        nodes = self.nodes()
        free = tree.free[: tree.num_free[0]].tolist()
        if sorted([*nodes, *free]) != list(range(capacity)) or (tree.nodes["parent"][free] != NO_NODE).any():
            raise IntegrityError(f"nodes {nodes} and free numbers {free} are not the {capacity} that there are")
        roots = [*self._roots.values(), *self._free_roots]
        if sorted(roots) != list(range(capacity, len(tree.nodes))) or (tree.links[self._free_roots, TOP] != NO_NODE).any():
            raise IntegrityError(f"a root is lost, or one that is none has children: {self._roots}, free {self._free_roots}")
        for node in [*self._roots.values(), *nodes]:
            children = list(self.children(node))
            record, size = tree.nodes[node], tree.tokens.shape[1]
            if node < capacity and not (0 < record["num_tokens"] <= size and (record["num_tokens"] == size or not children)):
                raise IntegrityError(f"a block has no or too many tokens, or is not full and has children: {self.describe(node)}")
            ordered = sorted(children, key=lambda child: np.array(self.tokens_of(child), np.int32).tobytes())
            if ordered != self._in_order(node) or any(tree.nodes["parent"][child] != node for child in children):
                raise IntegrityError(f"children {children} have another parent, or are not those in order: {self.describe(node)}")
            linked = [NO_NODE, *children, NO_NODE]
            ends = (record["first_child"].item(), record["last_child"].item())
            if ends != (linked[1], linked[-2]) or linked[:-2] != tree.nodes["previous"][children].tolist():
                raise IntegrityError(f"the list of children {children} is not whole: {self.describe(node)}")

    def _in_order(self, parent: int) -> list[int]:
        """Return the children of `parent` as their treap has them."""
        ordered: list[int] = []
        stack: list[int] = []
        node = int(self.arrays.links[parent, TOP])
        while stack or node != NO_NODE:
            while node != NO_NODE:
                stack.append(node)
                node = int(self.arrays.links[node, LOWER])
            node = stack.pop()
            ordered.append(node)
            node = int(self.arrays.links[node, HIGHER])
        return ordered
