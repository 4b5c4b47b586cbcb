"""The tree of stored blocks, and the pool of blocks on GPU and host that it keeps.

A node is one block, its children are the blocks that followed it in some sequence. Blocks are found by their tokens themselves, so
nothing that only looks alike is ever taken for a hit.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import IntegrityError
from pagedkv.priority_queue import PriorityQueue, Retention

BlockCopies: TypeAlias = list[tuple[int, int, int]]
"""Copies to be done in order: source block, destination block, tokens."""

NO_BLOCK = -1
"""The block of a root."""
OFFLOAD_PRIORITY = 30
"""Lowest retention priority at which an evicted block moves to the host. Source: TensorRT-LLM, secondary_offload_min_priority."""
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


class Tier:
    """The blocks of GPU or host that nobody holds."""

    def __init__(self, blocks: range) -> None:
        self.blank = list(blocks)[::-1]
        """Those that keep nothing, the next to be taken last."""
        self.queue: PriorityQueue[ReuseNode] = PriorityQueue()
        """Those that are stored."""

    @property
    def num_free(self) -> int:
        """Blocks that can be had."""
        return len(self.blank) + len(self.queue)


class ReusePool:
    """Blocks 0 to num_blocks - 1 on the GPU, the next host_blocks on the host, and the tree of what is stored in them.

    A block of the GPU is held by requests, or blank, or stored and in the queue; one of the host is never held, only pinned for the
    time of an admission. A node on the GPU is ready to go when no free child on the GPU would go with it: then only what live
    requests hold can lie behind it, and the host's copies. A node on the host is when it has no children.
    """

    def __init__(self, *, num_blocks: int, host_blocks: int, block_size: int) -> None:
        self.num_blocks, self.num_host_blocks = num_blocks, host_blocks
        self.tree = ReuseTree(block_size=block_size)
        self.gpu, self.host = Tier(range(num_blocks)), Tier(range(num_blocks, num_blocks + host_blocks))
        self.ref_cnt = [0] * num_blocks
        """By block of the GPU: how many hold it."""
        self.node_of: list[ReuseNode | None] = [None] * num_blocks
        """By block of the GPU: its node, None if it is not stored."""
        self.offloaded_slots = self.onboarded_slots = 0

    def is_on_gpu(self, node: ReuseNode) -> bool:
        """Return whether the block of `node` is one of the GPU."""
        return node.block < self.num_blocks

    def take(self, copies: BlockCopies) -> int:
        """Return a block of the GPU for one holder, evicting if need be. There must be a free one. O(log blocks)."""
        if self.gpu.blank:
            return self._taken(self.gpu.blank.pop())
        node = self.gpu.queue.lowest()
        assert node is not None
        self._dequeue(node)
        block = node.block
        host_block = self._take_on_host() if node.retention.priority >= OFFLOAD_PRIORITY else None
        if host_block is None:
            return self.take_over(node)
        copies.append((block, host_block, node.num_tokens))
        self.offloaded_slots += node.num_tokens
        self.node_of[block], node.block = None, host_block
        self._enqueue(node)
        return self._taken(block)

    def take_over(self, node: ReuseNode) -> int:
        """Forget a node of the GPU that nobody holds, and all behind it; return its block for one holder. O(nodes behind it)."""
        return self._taken(self._forget(node))

    def hold(self, node: ReuseNode) -> None:
        """Add a holder of a node, or pin it on the host."""
        if self.is_on_gpu(node):
            self.ref_cnt[node.block] += 1
        self._dequeue(node)

    def unhold(self, node: ReuseNode) -> None:
        """Take a holder back, or the pin. What nobody holds then is the last released."""
        if self.is_on_gpu(node):
            self.ref_cnt[node.block] -= 1
            if self.ref_cnt[node.block]:
                return
        self._enqueue(node)

    def release(self, block: int, retention: Retention | None) -> None:
        """Take a holder of `block` back. If it is stored, it is worth `retention` from now on, None: as before."""
        node = self.node_of[block]
        if node is not None:
            node.retention = retention or node.retention
            self.unhold(node)
            return
        self.ref_cnt[block] -= 1
        if not self.ref_cnt[block]:
            self.gpu.blank.append(block)

    def onboard(self, node: ReuseNode, copies: BlockCopies) -> None:
        """Bring a pinned node back from the host, for one holder."""
        block = self.take(copies)
        copies.append((node.block, block, node.num_tokens))
        self.onboarded_slots += node.num_tokens
        self.host.blank.append(node.block)
        node.block, self.node_of[block] = block, node

    def take_copy(self, node: ReuseNode, num_tokens: int, copies: BlockCopies) -> int:
        """Return a block for one holder, with a copy of the first tokens of a node that is held or pinned."""
        block = self.take(copies)
        copies.append((node.block, block, num_tokens))
        self.onboarded_slots += 0 if self.is_on_gpu(node) else num_tokens
        return block

    def store(self, parent: ReuseNode, key: bytes, block: int) -> ReuseNode:
        """Store a block that is held, behind `parent`."""
        node = self.node_of[block] = self.tree.insert(parent, key, block)
        self._update_ready(parent)
        return node

    def _taken(self, block: int) -> int:
        self.ref_cnt[block] = 1
        return block

    def _take_on_host(self) -> int | None:
        if self.host.blank:
            return self.host.blank.pop()
        node = self.host.queue.lowest()
        return None if node is None else self._forget(node)

    def _forget(self, node: ReuseNode) -> int:
        """Take a node out of the tree, with all behind it: held blocks become private, the others blank. Return its own block."""
        for gone in node.subtree():
            self._dequeue(gone)
            if self.is_on_gpu(gone):
                self.node_of[gone.block] = None
            if gone is not node and not (self.is_on_gpu(gone) and self.ref_cnt[gone.block]):
                self._tier(gone).blank.append(gone.block)
        parent = node.parent
        self.tree.remove(node)
        self._update_ready(parent)
        return node.block

    def _enqueue(self, node: ReuseNode) -> None:
        self._tier(node).queue.add(node, node.retention, ready=self._is_ready(node))
        self._count_free_child(node, 1)

    def _dequeue(self, node: ReuseNode) -> None:
        """Take a node out of its queue, if it is there."""
        queue = self._tier(node).queue
        if node in queue:
            node.retention = queue.remove(node)
            self._count_free_child(node, -1)

    def _count_free_child(self, node: ReuseNode, change: int) -> None:
        if node.parent is not None and self.is_on_gpu(node):
            node.parent.num_free_children += change
            self._update_ready(node.parent)

    def _update_ready(self, node: ReuseNode | None) -> None:
        if node is not None and node in self._tier(node).queue:
            self._tier(node).queue.set_ready(node, ready=self._is_ready(node))

    def _is_ready(self, node: ReuseNode) -> bool:
        return not (node.num_free_children if self.is_on_gpu(node) else node.children)

    def _tier(self, node: ReuseNode) -> Tier:
        return self.gpu if self.is_on_gpu(node) else self.host

    def check_integrity(self, held: Sequence[int]) -> None:
        """Raise IntegrityError unless all fits together, when `held` lists the blocks of all holders. O(blocks + nodes)."""
        self.tree.check_integrity()
        nodes = self.tree.nodes()
        state = f"held {held}, ref_cnt {self.ref_cnt}, nodes {nodes}, blank {self.gpu.blank} and {self.host.blank} on the host"
        if Counter(held) != {block: count for block, count in enumerate(self.ref_cnt) if count}:
            raise IntegrityError(f"reference counts are not those of the holders: {state}")
        by_block = {node.block: node for node in nodes}
        stored = {block: node for block, node in enumerate(self.node_of) if node is not None}
        if len(by_block) != len(nodes) or stored != {block: node for block, node in by_block.items() if block < self.num_blocks}:
            raise IntegrityError(f"blocks do not know their nodes, {stored}: {state}")
        for tier in (self.gpu, self.host):
            tier.queue.check_integrity()
            free = [node for node in nodes if self._tier(node) is tier and not (self.is_on_gpu(node) and self.ref_cnt[node.block])]
            if set(free) != set(tier.queue) or any(tier.queue.is_ready(node) != self._is_ready(node) for node in free):
                raise IntegrityError(f"queued are {list(tier.queue)}, free {free}, or one has the wrong rank: {state}")
        for node in nodes:
            if node.num_free_children != sum(child in self.gpu.queue for child in node.children.values()):
                raise IntegrityError(f"a node has another number of free children: {node.num_free_children}, {node}: {state}")
        blocks = [
            *set(held),
            *self.gpu.blank,
            *self.host.blank,
            *(node.block for tier in (self.gpu, self.host) for node in tier.queue),
        ]
        if sorted(blocks) != list(range(self.num_blocks + self.num_host_blocks)):
            raise IntegrityError(f"a block is lost, or in two places: {state}")


def _num_shared(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other)) // _TOKEN_BYTES
    differs = np.frombuffer(one, np.int32, length) != np.frombuffer(other, np.int32, length)
    return int(differs.argmax()) if differs.any() else length
