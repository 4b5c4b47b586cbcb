"""The nodes of the tree of stored blocks, as compiled functions over arrays.

A node is one block, its children are the blocks that followed it in some sequence. Blocks are found by their tokens themselves, so
nothing that only looks alike is ever taken for a hit. The children of a node are a treap in the order of their tokens: those that
begin alike are neighbours there. Source: Seidel and Aragon, Randomized Search Trees, 1996.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.splitmix import mixed_one
from pagedkv.token_source import write_tokens

NO_NODE = -1
TOP, LOWER, HIGHER = range(3)
"""In `TreeArrays.links`: of a node's children the one at the top of their treap; of a child those below it there, by order."""

NODE = np.dtype(
    [
        ("stamp", "<i8"),
        ("priority", "<i8"),
        ("duration", "<f8"),
        ("parent", "<i4"),
        ("block", "<i4"),
        ("num_tokens", "<i4"),
        ("first_child", "<i4"),
        ("last_child", "<i4"),
        ("next", "<i4"),
        ("previous", "<i4"),
        ("num_free_children", "<i4"),
    ]
)
"""A stored block:

* stamp: how many blocks had this number in the tree before: who remembers both sees whether its node is there still;
* priority, duration: for the pool: what it is worth when nobody holds it, and for how long from its release on;
* parent: NO_NODE of a root, and of what is not in the tree;
* block: which one holds its tokens; num_tokens: how many, and without children if it is not full;
* first_child, last_child: the ends of the list of its children, oldest first; next, previous: its place in such a list;
* num_free_children: for the pool: children on the GPU that nobody holds.
"""


class TreeArrays(NamedTuple):
    """Nodes 0 to capacity - 1, and the roots behind them."""

    nodes: npt.NDArray[np.void]
    """`NODE`, by number."""
    tokens: Int32Array
    """By node: its tokens, int32 [capacity, block_size]."""
    links: Int32Array
    """By node: TOP, LOWER and HIGHER, or NO_NODE."""
    free: Int32Array
    """The first num_free[0] are the numbers that no node has, the next to be given last."""
    num_free: Int64Array
    """Length 1."""
    key: Int32Array
    """The tokens that are looked for."""
    path: Int32Array
    """The nodes that `match_prefix` found."""
    below: Int32Array
    """Room for a node, or a root, and all below."""


@lean_jit
def _compare(tree: TreeArrays, num_tokens: int, node: int) -> tuple[int, int]:
    """Return with how many tokens of the key `node` begins, and its order: -1 if the key comes before it, 0 if it is the same.

    The order is that of the bytes in memory.
    """
    length = tree.nodes["num_tokens"][node]
    for i in range(min(num_tokens, length)):
        if tree.key[i] != tree.tokens[node, i]:
            one, other = np.int64(tree.key[i]), np.int64(tree.tokens[node, i])
            while one & 255 == other & 255:
                one, other = one >> 8, other >> 8
            return i, -1 if one & 255 < other & 255 else 1
    return min(num_tokens, length), -1 if num_tokens < length else int(num_tokens > length)


@lean_jit
def nearest_child(tree: TreeArrays, parent: int, num_tokens: int) -> tuple[int, int]:
    """Return the child that begins with the most tokens of the key, and how many; NO_NODE if none begins with its first token.

    Expected O(log children): in order no other shares more than the two neighbours of the key. On a tie it is the lower one.
    """
    node, lower, higher = tree.links[parent, TOP], NO_NODE, NO_NODE
    most_lower = most_higher = 0
    while node != NO_NODE:
        shared, order = _compare(tree, num_tokens, node)
        if order > 0:
            lower, most_lower = node, shared
            node = tree.links[node, HIGHER]
        else:
            higher, most_higher = node, shared
            if order == 0:
                break
            node = tree.links[node, LOWER]
    if node != NO_NODE:  # the key itself: no other has all its tokens and is lower
        return int(node), num_tokens
    if max(most_lower, most_higher) == 0:
        return NO_NODE, 0
    return (int(lower), int(most_lower)) if most_lower >= most_higher else (int(higher), int(most_higher))


@lean_jit
def find_child(tree: TreeArrays, parent: int, num_tokens: int) -> int:
    """Return the child whose tokens are the key, NO_NODE if there is none. Expected O(log children)."""
    node = tree.links[parent, TOP]
    while node != NO_NODE:
        order = _compare(tree, num_tokens, node)[1]
        if order == 0:
            break
        node = tree.links[node, HIGHER if order > 0 else LOWER]
    return int(node)


@lean_jit
def _rank(node: int) -> np.uint64:
    """Return its place in a treap: the higher is above. As good as random."""
    rank: np.uint64 = mixed_one(np.uint64(node))
    return rank


@lean_jit
def insert_node(tree: TreeArrays, parent: int, num_tokens: int, block: int) -> int:
    """Store `block`, whose tokens are the key, behind `parent`, which has no such child. Expected O(log children)."""
    nodes, links = tree.nodes, tree.links
    tree.num_free[0] -= 1
    new = tree.free[tree.num_free[0]]
    nodes["parent"][new], nodes["block"][new], nodes["num_tokens"][new] = parent, block, num_tokens
    nodes["first_child"][new] = nodes["last_child"][new] = nodes["next"][new] = links[new, TOP] = NO_NODE
    nodes["num_free_children"][new] = 0
    for i in range(num_tokens):
        tree.tokens[new, i] = tree.key[i]
    last = nodes["last_child"][parent]
    nodes["previous"][new] = last
    if last == NO_NODE:
        nodes["first_child"][parent] = new
    else:
        nodes["next"][last] = new
    nodes["last_child"][parent] = new
    above, side = parent, TOP
    node, rank = links[parent, TOP], _rank(new)
    while node != NO_NODE and _rank(node) > rank:
        order = _compare(tree, num_tokens, node)[1]
        above, side = node, HIGHER if order > 0 else LOWER
        node = links[above, side]
    links[above, side] = new
    low, low_side, high, high_side = new, LOWER, new, HIGHER
    while node != NO_NODE:  # what is below there goes to both sides of it
        order = _compare(tree, num_tokens, node)[1]
        if order > 0:
            links[low, low_side] = node
            low, low_side = node, HIGHER
            node = links[node, HIGHER]
        else:
            links[high, high_side] = node
            high, high_side = node, LOWER
            node = links[node, LOWER]
    links[low, low_side] = links[high, high_side] = NO_NODE
    return int(new)


@lean_jit
def _take_from_treap(tree: TreeArrays, parent: int, gone: int) -> None:
    links, num_tokens = tree.links, tree.nodes["num_tokens"][gone]
    for i in range(num_tokens):
        tree.key[i] = tree.tokens[gone, i]
    above, side = parent, TOP
    node = links[parent, TOP]
    while node != gone:
        order = _compare(tree, num_tokens, node)[1]
        above, side = node, HIGHER if order > 0 else LOWER
        node = links[above, side]
    low, high = links[gone, LOWER], links[gone, HIGHER]
    while min(low, high) > NO_NODE:
        if _rank(low) > _rank(high):
            links[above, side] = low
            above, side = low, HIGHER
            low = links[low, HIGHER]
        else:
            links[above, side] = high
            above, side = high, LOWER
            high = links[high, LOWER]
    links[above, side] = high if low == NO_NODE else low


@lean_jit
def write_below(tree: TreeArrays, node: int) -> int:
    """Write `node` and all below into tree.below, parents first, siblings by age; return how many they are."""
    tree.below[0] = node
    number = 1
    i = 0
    while i < number:
        child = tree.nodes["first_child"][tree.below[i]]
        while child != NO_NODE:
            tree.below[number] = child
            number += 1
            child = tree.nodes["next"][child]
        i += 1
    return number


@lean_jit
def remove_node(tree: TreeArrays, node: int, num_below: int) -> None:
    """Take out `node`, and all below, which `write_below` has found. O(nodes below), expected O(log siblings)."""
    nodes = tree.nodes
    parent, before, behind = nodes["parent"][node], nodes["previous"][node], nodes["next"][node]
    _take_from_treap(tree, parent, node)
    if before == NO_NODE:
        nodes["first_child"][parent] = behind
    else:
        nodes["next"][before] = behind
    if behind == NO_NODE:
        nodes["last_child"][parent] = before
    else:
        nodes["previous"][behind] = before
    for i in range(num_below):
        gone = tree.below[i]
        nodes["parent"][gone] = NO_NODE
        nodes["stamp"][gone] += 1
        tree.free[tree.num_free[0]] = gone
        tree.num_free[0] += 1


@lean_jit
def match_prefix(tree: TreeArrays, root: int, source: Any, num_tokens: int) -> tuple[int, int, int]:
    """Find the longest stored prefix of the first `num_tokens` tokens of `source`, below `root`.

    Returns:
        (its full blocks, whose nodes are in tree.path; the node that begins with what follows them, NO_NODE if there is none;
        with how many tokens it does). Expected O(tokens hit + hits * log children).
    """
    node, size = root, tree.key.size
    if root == NO_NODE:
        return 0, NO_NODE, 0
    for i in range(-(-num_tokens // size)):
        length = min(num_tokens - i * size, size)
        write_tokens(source, i * size, i * size + length, tree.key)
        child, shared = nearest_child(tree, node, length)
        if shared < size:
            return i, child, shared
        tree.path[i] = child
        node = child
    return num_tokens // size, NO_NODE, 0
