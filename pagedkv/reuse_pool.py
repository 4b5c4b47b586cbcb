"""The blocks of GPU and host, and who may lose what is stored in them: TensorRT-LLM's pool over a tree of stored blocks."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import IntegrityError
from pagedkv.priority_queue import PriorityQueue
from pagedkv.reuse_moves import NUM_BLANK, NUM_COUNTS, NUM_HOLDERS, NUM_HOST_BLANK, PoolArrays, is_ready, take_block
from pagedkv.reuse_nodes import NO_NODE
from pagedkv.reuse_tree import ReuseTree


class ReusePool:
    """`num_blocks` blocks on the GPU, `host_blocks` on the host, and the tree of what is stored in them.

    A block of the GPU is held by requests, or blank, or stored and in the queue; one of the host is never held, only pinned for the
    time of an admission. A node on the GPU is ready to go when no free child on the GPU would go with it: then only what live
    requests hold can lie behind it, and the host's copies. A node on the host is when it has no children.
    """

    def __init__(self, *, num_blocks: int, host_blocks: int, block_size: int, max_path: int, max_copies: int) -> None:
        self.num_blocks, self.num_host_blocks = num_blocks, host_blocks
        capacity = num_blocks + host_blocks
        self.tree = ReuseTree(capacity=capacity, block_size=block_size, max_path=max_path)
        self.gpu, self.host = PriorityQueue(capacity=capacity), PriorityQueue(capacity=capacity)
        counts = np.zeros(NUM_COUNTS, np.int64)
        counts[NUM_BLANK], counts[NUM_HOST_BLANK] = num_blocks, host_blocks
        self.arrays = PoolArrays(
            self.tree.arrays,
            self.gpu.arrays,
            self.host.arrays,
            np.concatenate((np.arange(num_blocks)[::-1], np.arange(num_blocks, capacity)[::-1])).astype(np.int32),
            np.zeros(num_blocks, np.int32),
            np.full(num_blocks, NO_NODE, np.int32),
            np.zeros((max_copies, 3), np.int64),
            counts,
        )

    @property
    def num_free(self) -> int:
        """Blocks of the GPU that can be had."""
        return int(self.arrays.counts[NUM_BLANK]) + len(self.gpu)

    def blank(self) -> list[int]:
        """Return the blocks of the GPU that keep nothing, the next to be taken last."""
        blocks: list[int] = self.arrays.blank[: self.arrays.counts[NUM_BLANK]].tolist()
        return blocks

    def host_blank(self) -> list[int]:
        """Return those of the host."""
        blocks: list[int] = self.arrays.blank[self.num_blocks :][: self.arrays.counts[NUM_HOST_BLANK]].tolist()
        return blocks

    def cached_blocks(self) -> Int32Array:
        """Return the stored blocks on the GPU that nobody holds, first released first."""
        blocks: Int32Array = self.arrays.tree.nodes["block"][list(self.gpu)]
        return blocks

    def take(self) -> int:
        """Return a block of the GPU for one holder, evicting if need be. There must be a free one. O(log blocks)."""
        return int(take_block(self.arrays))

    def check_integrity(self, held: Sequence[int]) -> None:
        """Raise IntegrityError unless all fits together, when `held` lists the blocks of all holders. O(blocks + nodes)."""
        self.tree.check_integrity()
        pool, nodes = self.arrays, self.tree.nodes()
        block_of = dict(zip(nodes, pool.tree.nodes["block"][nodes].tolist(), strict=True))
        state = (
            f"held {held}, ref_cnt {pool.ref_cnt.tolist()}, nodes {[self.tree.describe(node) for node in nodes]}, "
            f"blank {self.blank()} and {self.host_blank()} on the host"
        )
        ref_cnt = {block: count for block, count in enumerate(pool.ref_cnt.tolist()) if count}
        if Counter(held) != ref_cnt or pool.counts[NUM_HOLDERS] != len(held):
            raise IntegrityError(f"reference counts are not those of the holders: {state}")
        stored = {block: node for block, node in enumerate(pool.node_of.tolist()) if node != NO_NODE}
        if len(set(block_of.values())) != len(nodes) or stored != {
            block: node for node, block in block_of.items() if block < self.num_blocks
        }:
            raise IntegrityError(f"blocks do not know their nodes, {stored}: {state}")
        for queue, free in (
            (self.gpu, {node for node, block in block_of.items() if block < self.num_blocks and not pool.ref_cnt[block]}),
            (self.host, {node for node, block in block_of.items() if block >= self.num_blocks}),
        ):
            queue.check_integrity()
            ready = {node for node in free if is_ready(pool, node)}
            if free != set(queue) or ready != set(queue.ready()):
                raise IntegrityError(f"queued are {list(queue)}, free {free}, or one has the wrong rank: {state}")
        for node in nodes:
            number = int(pool.tree.nodes["num_free_children"][node])
            if number != sum(child in self.gpu for child in self.tree.children(node)):
                raise IntegrityError(f"a node has another number of free children: {number}, node {node}: {state}")
        free_blocks = [block_of[node] for queue in (self.gpu, self.host) for node in queue]
        blocks = [*set(held), *self.blank(), *self.host_blank(), *free_blocks]
        if sorted(blocks) != list(range(self.num_blocks + self.num_host_blocks)):
            raise IntegrityError(f"a block is lost, or in two places: {state}")
