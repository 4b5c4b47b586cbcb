"""How blocks of GPU and host are taken, held, stored, evicted and given back: TensorRT-LLM's rules over a tree of stored blocks.

Compiled functions over the arrays of `pagedkv.reuse_pool.ReusePool`.
"""

from typing import NamedTuple

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.priority_queue import (
    NOBODY,
    NUM_QUEUED,
    QueueArrays,
    dequeue,
    enqueue,
    is_queued,
    lowest_item,
    set_ready,
)
from pagedkv.retention import DEFAULT_PRIORITY, FOR_GOOD
from pagedkv.reuse_nodes import NO_NODE, TreeArrays, insert_node, remove_node, write_below

OFFLOAD_PRIORITY = 30
"""Lowest retention priority at which an evicted block moves to the host. Source: TensorRT-LLM, secondary_offload_min_priority."""
UNSAID = -1
"""A retention priority that nobody said."""
NO_BLOCK = -1

NUM_BLANK, NUM_HOST_BLANK, NUM_HOLDERS, NUM_COPIES, OFFLOADED, ONBOARDED, NUM_COUNTS = range(7)
"""In `PoolArrays.counts`: blank blocks of GPU and host; all reference counts together; copies wanted; slots copied so far."""


class PoolArrays(NamedTuple):
    """Blocks 0 to num_blocks - 1 on the GPU, the next ones on the host, and the tree of what is stored in them."""

    tree: TreeArrays
    gpu: QueueArrays
    """By node: those on the GPU that nobody holds."""
    host: QueueArrays
    """Those on the host that nobody has pinned."""
    blank: Int32Array
    """The first counts[NUM_BLANK] are blocks of the GPU that keep nothing, the next to be taken last; behind num_blocks the same of
    the host, counts[NUM_HOST_BLANK] of them."""
    ref_cnt: Int32Array
    """By block of the GPU: how many hold it."""
    node_of: Int32Array
    """By block of the GPU: its node, NO_NODE if it is not stored."""
    copies: Int64Array
    """The first counts[NUM_COPIES] are to be done, in order: source block, destination block, tokens."""
    counts: Int64Array


@lean_jit
def is_on_gpu(pool: PoolArrays, node: int) -> bool:
    """Return whether the block of `node` is one of the GPU."""
    return bool(pool.tree.nodes["block"][node] < pool.ref_cnt.size)


@lean_jit
def num_free_blocks(pool: PoolArrays) -> int:
    """Return how many blocks of the GPU can be had."""
    return int(pool.counts[NUM_BLANK] + pool.gpu.counts[NUM_QUEUED])


@lean_jit
def _is_free(pool: PoolArrays, node: int) -> bool:
    return is_queued(pool.gpu, node) if is_on_gpu(pool, node) else is_queued(pool.host, node)


@lean_jit
def is_ready(pool: PoolArrays, node: int) -> bool:
    """Return whether `node` may be given up, if nobody holds it: on the GPU without a free child there, on the host without any."""
    if is_on_gpu(pool, node):
        return bool(pool.tree.nodes["num_free_children"][node] == 0)
    return bool(pool.tree.nodes["first_child"][node] == NO_NODE)


@lean_jit
def _update_ready(pool: PoolArrays, node: int) -> None:
    """Let the queue know whether `node`, which may be a root, is a leaf now. O(log blocks)."""
    if node < pool.blank.size and _is_free(pool, node):
        if is_on_gpu(pool, node):
            set_ready(pool.gpu, node, is_ready(pool, node))
        else:
            set_ready(pool.host, node, is_ready(pool, node))


@lean_jit
def _count_free_child(pool: PoolArrays, node: int, change: int) -> None:
    if is_on_gpu(pool, node):
        parent = pool.tree.nodes["parent"][node]
        pool.tree.nodes["num_free_children"][parent] += change
        _update_ready(pool, parent)


@lean_jit
def _enqueue(pool: PoolArrays, node: int) -> None:
    nodes, ready = pool.tree.nodes, is_ready(pool, node)
    if is_on_gpu(pool, node):
        enqueue(pool.gpu, node, nodes["priority"][node], nodes["duration"][node], ready)
    else:
        enqueue(pool.host, node, nodes["priority"][node], nodes["duration"][node], ready)
    _count_free_child(pool, node, 1)


@lean_jit
def _dequeue(pool: PoolArrays, node: int) -> None:
    """Take a node out of its queue, if it is there."""
    if not _is_free(pool, node):
        return
    nodes, queue = pool.tree.nodes, pool.gpu if is_on_gpu(pool, node) else pool.host
    dequeue(queue, node)
    nodes["priority"][node], nodes["duration"][node] = queue.items["priority"][node], queue.items["duration"][node]
    _count_free_child(pool, node, -1)


@lean_jit
def _taken(pool: PoolArrays, block: int) -> int:
    pool.ref_cnt[block] = 1
    pool.counts[NUM_HOLDERS] += 1
    return block


@lean_jit
def _put_blank(pool: PoolArrays, block: int) -> None:
    if block < pool.ref_cnt.size:
        pool.blank[pool.counts[NUM_BLANK]] = block
        pool.counts[NUM_BLANK] += 1
    else:
        pool.blank[pool.ref_cnt.size + pool.counts[NUM_HOST_BLANK]] = block
        pool.counts[NUM_HOST_BLANK] += 1


@lean_jit
def _forget(pool: PoolArrays, node: int) -> int:
    """Take a node out of the tree, with all behind it: held blocks become private, the others blank. Return its own block."""
    tree = pool.tree
    number, parent = write_below(tree, node), tree.nodes["parent"][node]
    for i in range(number):
        gone = tree.below[i]
        block = tree.nodes["block"][gone]
        _dequeue(pool, gone)
        on_gpu = block < pool.ref_cnt.size
        if on_gpu:
            pool.node_of[block] = NO_NODE
        if gone != node and not (on_gpu and pool.ref_cnt[block] > 0):
            _put_blank(pool, block)
    remove_node(tree, node, number)
    _update_ready(pool, parent)
    return int(tree.nodes["block"][node])


@lean_jit
def take_over(pool: PoolArrays, node: int) -> int:
    """Forget a node of the GPU that nobody holds, and all behind it; return its block for one holder. O(nodes behind it)."""
    return _taken(pool, _forget(pool, node))


@lean_jit
def _take_on_host(pool: PoolArrays) -> int:
    if pool.counts[NUM_HOST_BLANK] > 0:
        pool.counts[NUM_HOST_BLANK] -= 1
        return int(pool.blank[pool.ref_cnt.size + pool.counts[NUM_HOST_BLANK]])
    node = lowest_item(pool.host)
    return NO_BLOCK if node == NOBODY else _forget(pool, node)


@lean_jit
def _add_copy(pool: PoolArrays, source: int, target: int, num_tokens: int) -> None:
    number = pool.counts[NUM_COPIES]
    pool.copies[number, 0], pool.copies[number, 1], pool.copies[number, 2] = source, target, num_tokens
    pool.counts[NUM_COPIES] = number + 1


@lean_jit
def take_block(pool: PoolArrays) -> int:
    """Return a block of the GPU for one holder, evicting if need be. There must be a free one. O(log blocks)."""
    counts, nodes = pool.counts, pool.tree.nodes
    if counts[NUM_BLANK] > 0:
        counts[NUM_BLANK] -= 1
        return _taken(pool, int(pool.blank[counts[NUM_BLANK]]))
    node = lowest_item(pool.gpu)
    _dequeue(pool, node)
    block = int(nodes["block"][node])
    host_block = _take_on_host(pool) if nodes["priority"][node] >= OFFLOAD_PRIORITY else NO_BLOCK
    if host_block == NO_BLOCK:
        return take_over(pool, node)
    _add_copy(pool, block, host_block, nodes["num_tokens"][node])
    counts[OFFLOADED] += nodes["num_tokens"][node]
    pool.node_of[block], nodes["block"][node] = NO_NODE, host_block
    _enqueue(pool, node)
    return _taken(pool, block)


@lean_jit
def hold_node(pool: PoolArrays, node: int) -> None:
    """Add a holder of a node, or pin it on the host."""
    if is_on_gpu(pool, node):
        pool.ref_cnt[pool.tree.nodes["block"][node]] += 1
        pool.counts[NUM_HOLDERS] += 1
    _dequeue(pool, node)


@lean_jit
def unhold_node(pool: PoolArrays, node: int) -> None:
    """Take a holder back, or the pin. What nobody holds then is the last released."""
    if is_on_gpu(pool, node):
        block = pool.tree.nodes["block"][node]
        pool.ref_cnt[block] -= 1
        pool.counts[NUM_HOLDERS] -= 1
        if pool.ref_cnt[block] > 0:
            return
    _enqueue(pool, node)


@lean_jit
def release_block(pool: PoolArrays, block: int, priority: int, duration: float) -> None:
    """Take a holder of `block` back. If it is stored, that is what it is worth from now on; UNSAID: what it was before."""
    node = pool.node_of[block]
    if node != NO_NODE:
        if priority != UNSAID:
            pool.tree.nodes["priority"][node], pool.tree.nodes["duration"][node] = priority, duration
        unhold_node(pool, node)
        return
    pool.ref_cnt[block] -= 1
    pool.counts[NUM_HOLDERS] -= 1
    if pool.ref_cnt[block] == 0:
        _put_blank(pool, block)


@lean_jit
def onboard_node(pool: PoolArrays, node: int) -> None:
    """Bring a pinned node back from the host, for one holder."""
    block, nodes = take_block(pool), pool.tree.nodes
    _add_copy(pool, nodes["block"][node], block, nodes["num_tokens"][node])
    pool.counts[ONBOARDED] += nodes["num_tokens"][node]
    _put_blank(pool, nodes["block"][node])
    nodes["block"][node], pool.node_of[block] = block, node


@lean_jit
def take_copy(pool: PoolArrays, node: int, num_tokens: int) -> int:
    """Return a block for one holder, with a copy of the first tokens of a node that is held or pinned."""
    block = take_block(pool)
    _add_copy(pool, pool.tree.nodes["block"][node], block, num_tokens)
    if not is_on_gpu(pool, node):
        pool.counts[ONBOARDED] += num_tokens
    return block


@lean_jit
def store_block(pool: PoolArrays, parent: int, num_tokens: int, block: int) -> int:
    """Store a block that is held, whose tokens are the tree's key, behind `parent`; return its node."""
    node = insert_node(pool.tree, parent, num_tokens, block)
    pool.node_of[block] = node
    pool.tree.nodes["priority"][node], pool.tree.nodes["duration"][node] = DEFAULT_PRIORITY, FOR_GOOD
    _update_ready(pool, parent)
    return node
