"""How nodes of SGLang's radix tree hang together, compiled: how a child is found, and how nodes come, go and are cut in two."""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.jit import lean_jit
from pagedkv.radix_arrays import FREE_PLACE, LAST_SERIAL, NO_NODE, NUM_PLACES, RadixArrays


@lean_jit
def _bucket_of(tree: RadixArrays, parent: int, namespace: int, tokens: Int32Array, first: int, block_size: int) -> int:
    """Return where a child of `parent` is found whose run begins with the block of `tokens` from `first` on."""
    word = np.uint64(parent) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(namespace)
    for i in range(block_size):
        word = (word ^ np.uint64(tokens[first + i])) * np.uint64(0xBF58476D1CE4E5B9)
        word = word ^ (word >> np.uint64(29))
    return int(word & np.uint64(tree.buckets.size - 1))


@lean_jit
def same_block(tree: RadixArrays, block: int, tokens: Int32Array, first: int, block_size: int) -> bool:
    """Return whether the tokens of `block` are those of `tokens` from `first` on."""
    slot = block * block_size
    for i in range(block_size):  # noqa: SIM110 - compiled code has no all()
        if tree.tokens[slot + i] != tokens[first + i]:
            return False
    return True


@lean_jit
def find_child(tree: RadixArrays, block_size: int, parent: int, namespace: int, tokens: Int32Array, first: int) -> int:
    """Return the child of `parent` whose run begins with the block of `tokens` from `first` on, or NO_NODE."""
    nodes = tree.nodes
    node = tree.buckets[_bucket_of(tree, parent, namespace, tokens, first, block_size)]
    while node != NO_NODE:
        if (
            nodes["parent"][node] == parent
            and nodes["namespace"][node] == namespace
            and same_block(tree, nodes["first_block"][node], tokens, first, block_size)
        ):
            return int(node)
        node = nodes["same_bucket"][node]
    return NO_NODE


@lean_jit
def _own_bucket(tree: RadixArrays, block_size: int, node: int) -> int:
    nodes = tree.nodes
    slot = nodes["first_block"][node] * block_size
    return _bucket_of(tree, nodes["parent"][node], nodes["namespace"][node], tree.tokens, slot, block_size)


@lean_jit
def _enter_bucket(tree: RadixArrays, block_size: int, node: int) -> None:
    bucket = _own_bucket(tree, block_size, node)
    tree.nodes["same_bucket"][node] = tree.buckets[bucket]
    tree.buckets[bucket] = node


@lean_jit
def _leave_bucket(tree: RadixArrays, block_size: int, node: int, successor: int) -> None:
    """Let `successor` be found where `node` is: the next one there, or one that takes its place."""
    nodes, bucket = tree.nodes, _own_bucket(tree, block_size, node)
    if tree.buckets[bucket] == node:
        tree.buckets[bucket] = successor
        return
    other = tree.buckets[bucket]
    while nodes["same_bucket"][other] != node:
        other = nodes["same_bucket"][other]
    nodes["same_bucket"][other] = successor


@lean_jit
def _new_place(tree: RadixArrays) -> int:
    sizes = tree.sizes
    node = sizes[FREE_PLACE]
    if node != NO_NODE:
        sizes[FREE_PLACE] = tree.nodes["younger"][node]
        return int(node)
    sizes[NUM_PLACES] += 1
    return int(sizes[NUM_PLACES] - 1)


@lean_jit
def _new_serial(tree: RadixArrays) -> int:
    tree.sizes[LAST_SERIAL] += 1
    return int(tree.sizes[LAST_SERIAL])


@lean_jit
def add_child(
    tree: RadixArrays, block_size: int, parent: int, namespace: int, tokens: Int32Array, blocks: Int32Array, first: int, last: int
) -> int:
    """Continue the run of `parent` by a new leaf: tokens[first:last] in their `blocks`; return it."""
    nodes, leaf = tree.nodes, _new_place(tree)
    depth = nodes["depth"][parent] + last - first
    nodes["serial"][leaf], nodes["depth"][leaf], nodes["num_tokens"][leaf] = _new_serial(tree), depth, last - first
    nodes["deepest"][leaf] = nodes["lock_ref"][leaf] = nodes["hit_count"][leaf] = nodes["priority"][leaf] = 0
    nodes["expired"][leaf] = nodes["heap_place"][leaf] = nodes["weight"][leaf] = nodes["first_request"][leaf] = 0
    nodes["inflation"][leaf] = 0.0
    nodes["namespace"][leaf], nodes["parent"][leaf] = namespace, parent
    nodes["first_child"][leaf] = nodes["last_child"][leaf] = nodes["younger"][leaf] = NO_NODE
    older = nodes["last_child"][parent]
    nodes["older"][leaf] = older
    nodes["last_child"][parent] = leaf
    if older == NO_NODE:
        nodes["first_child"][parent] = leaf
    else:
        nodes["younger"][older] = leaf
    begin, end = first // block_size, last // block_size
    nodes["first_block"][leaf], nodes["last_block"][leaf] = blocks[begin], blocks[end - 1]
    for i in range(begin, end):
        block = blocks[i]
        if i + 1 < end:
            tree.next_block[block] = blocks[i + 1]
        for j in range(block_size):
            tree.tokens[block * block_size + j] = tokens[i * block_size + j]
    _enter_bucket(tree, block_size, leaf)
    return leaf


@lean_jit
def detach(tree: RadixArrays, block_size: int, leaf: int) -> int:
    """Take `leaf` out of the tree; return its parent. What its record says stays until another node comes."""
    nodes = tree.nodes
    _leave_bucket(tree, block_size, leaf, nodes["same_bucket"][leaf])
    parent, older, younger = nodes["parent"][leaf], nodes["older"][leaf], nodes["younger"][leaf]
    if older == NO_NODE:
        nodes["first_child"][parent] = younger
    else:
        nodes["younger"][older] = younger
    if younger == NO_NODE:
        nodes["last_child"][parent] = older
    else:
        nodes["older"][younger] = older
    nodes["serial"][leaf] = 0
    nodes["younger"][leaf], tree.sizes[FREE_PLACE] = tree.sizes[FREE_PLACE], leaf
    return int(parent)


@lean_jit
def cut(tree: RadixArrays, block_size: int, lower: int, length: int) -> int:
    """Cut off the first `length` tokens of `lower` as a new parent, which is returned. It stays the end: locks do not move."""
    nodes, upper = tree.nodes, _new_place(tree)
    nodes[upper] = nodes[lower]
    nodes["serial"][upper], nodes["num_tokens"][upper], nodes["heap_place"][upper] = _new_serial(tree), length, 0
    nodes["depth"][upper] = nodes["depth"][lower] - nodes["num_tokens"][lower] + length
    nodes["first_child"][upper] = nodes["last_child"][upper] = lower
    _leave_bucket(tree, block_size, lower, upper)
    parent, older, younger = nodes["parent"][lower], nodes["older"][lower], nodes["younger"][lower]
    if older == NO_NODE:
        nodes["first_child"][parent] = upper
    else:
        nodes["younger"][older] = upper
    if younger == NO_NODE:
        nodes["last_child"][parent] = upper
    else:
        nodes["older"][younger] = upper
    block = nodes["first_block"][lower]
    for _ in range(length // block_size - 1):
        block = tree.next_block[block]
    nodes["last_block"][upper], nodes["first_block"][lower] = block, tree.next_block[block]
    nodes["parent"][lower], nodes["older"][lower], nodes["younger"][lower] = upper, NO_NODE, NO_NODE
    nodes["num_tokens"][lower] -= length
    _enter_bucket(tree, block_size, lower)
    return upper
