"""The blocks of GPU and host, and who may lose what is stored in them: TensorRT-LLM's pool over a tree of stored blocks."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from pagedkv.errors import IntegrityError
from pagedkv.priority_queue import PriorityQueue
from pagedkv.retention import Retention
from pagedkv.reuse_tree import ReuseNode, ReuseTree

BlockCopies: TypeAlias = list[tuple[int, int, int]]
"""Copies to be done in order: source block, destination block, tokens."""

OFFLOAD_PRIORITY = 30
"""Lowest retention priority at which an evicted block moves to the host. Source: TensorRT-LLM, secondary_offload_min_priority."""


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
