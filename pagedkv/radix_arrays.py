"""SGLang's radix tree as arrays for compiled code: its nodes, what leads to them, and how they come and go.

A node is a number; 0 is the root, and stands for no node where the root cannot be meant.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array, Int32Array, Int64Array
from pagedkv.jit import lean_jit

ROOT = NO_NODE = 0

RADIX_NODE = np.dtype(
    [
        ("serial", "<i8"),
        ("depth", "<i8"),
        ("deepest", "<i8"),
        ("num_tokens", "<i8"),
        ("lock_ref", "<i8"),
        ("hit_count", "<i8"),
        ("priority", "<i8"),
        ("expired", "<i8"),
        ("last_access", "<f8"),
        ("created", "<f8"),
        ("inflation", "<f8"),
        ("rank", "<f8"),
        ("second_rank", "<f8"),
        ("candidate_since", "<i8"),
        ("heap_place", "<i4"),
        ("namespace", "<i4"),
        ("parent", "<i4"),
        ("first_child", "<i4"),
        ("last_child", "<i4"),
        ("older", "<i4"),
        ("younger", "<i4"),
        ("same_bucket", "<i4"),
        ("first_block", "<i4"),
        ("last_block", "<i4"),
        ("weight", "<i4"),
        ("first_request", "<i4"),
    ],
    align=True,
)
"""A node:

* serial: of all nodes that ever were, its number; 0 if the place is empty;
* depth to expired, last_access to inflation: see `pagedkv.radix_node.TreeNode`; the tree gives priorities for ever;
* rank, second_rank, candidate_since, heap_place: of an unlocked leaf: what eviction goes by, and where in the heap it is, from 1;
* namespace: its number; parent; first_child, last_child, older, younger: its children and siblings, in the order of their coming;
* same_bucket: the next node that lookups may mean;
* first_block, last_block: of its slots: `RadixArrays.next_block` leads from one to the next;
* weight, first_request: for whom a queue policy walks the tree: see `pagedkv.scheduling.sglang_order`.
"""

RadixNodes: TypeAlias = npt.NDArray[np.void]
"""`RADIX_NODE`, by number."""

EVICTABLE, PROTECTED, NUM_PLACES, FREE_PLACE, NUM_CANDIDATES, LAST_SERIAL, LAST_CANDIDATE, NUM_SIZES = range(8)
"""In `RadixArrays.sizes`: tokens in nodes that nobody locks, and in others; places of nodes ever used, the first of those that are
empty again (`younger` leads to the next); unlocked leaves; how many nodes and unlocked leaves ever were."""
CLOCK, INFLATION = 0, 1
"""In `RadixArrays.times`: how often the clock was read; the highest rank ever evicted."""

MOST_BUCKETS = 1 << 16


class RadixArrays(NamedTuple):
    """The tree."""

    nodes: RadixNodes
    tokens: Int32Array
    """By slot: its token."""
    next_block: Int32Array
    """By block, but the last of a run: the next one."""
    buckets: Int32Array
    """From what tells children of a node apart to the first node that may be meant; a power of two long."""
    candidates: Int32Array
    """The unlocked leaves, a heap: who is evicted first comes first."""
    path: Int32Array
    """The nodes that the last walk met, from the top."""
    sizes: Int64Array
    times: Float64Array

    @classmethod
    def empty(cls, num_blocks: int, block_size: int) -> "RadixArrays":
        """Return a tree for blocks 1 to `num_blocks`. What it does not use yet takes no memory."""
        places, buckets = num_blocks + 2, 16  # each node has a block, and a split makes one before it takes one away
        while buckets < min(num_blocks, MOST_BUCKETS):
            buckets *= 2
        sizes = np.zeros(NUM_SIZES, np.int64)
        sizes[NUM_PLACES] = sizes[LAST_SERIAL] = 1
        nodes = np.zeros(places, RADIX_NODE)
        nodes["serial"][ROOT] = 1
        return cls(
            nodes=nodes,
            tokens=np.zeros((num_blocks + 1) * block_size, np.int32),
            next_block=np.zeros(num_blocks + 1, np.int32),
            buckets=np.zeros(buckets, np.int32),
            candidates=np.zeros(places, np.int32),
            path=np.zeros(places, np.int32),
            sizes=sizes,
            times=np.zeros(2),
        )

    def larger(self, num_blocks: int, block_size: int) -> "RadixArrays":
        """Return the same tree with room for blocks 1 to `num_blocks`."""
        grown = RadixArrays.empty(num_blocks, block_size)
        for name in ("nodes", "tokens", "next_block", "candidates", "path", "sizes", "times"):
            mine = getattr(self, name)
            getattr(grown, name)[: mine.size] = mine
        return grown._replace(buckets=self.buckets)


class RadixRules(NamedTuple):
    """What is the same for all nodes, as plain numbers for compiled code."""

    block_size: int
    """Keys count in whole blocks."""
    policy: int
    """How candidates for eviction are ranked: a place in `pagedkv.radix_eviction.POLICIES`."""
    eviction: Any
    """What policies need to be told: `pagedkv.radix_eviction.EvictionNumbers`."""
    stamps: Any
    """When a node counts as used: a kind of `pagedkv.radix_rules`."""


@lean_jit
def tick(tree: RadixArrays) -> float:
    """Read the clock: each reading is one more than the last."""
    tree.times[CLOCK] += 1.0
    return float(tree.times[CLOCK])
