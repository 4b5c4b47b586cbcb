"""What SGLang's radix tree does, compiled: lookups, insertions, locks. `tokens` are always whole blocks, int32."""

from pagedkv.arrays import Int32Array
from pagedkv.jit import lean_jit
from pagedkv.radix_arrays import EVICTABLE, INFLATION, NO_NODE, PROTECTED, ROOT, RadixArrays, RadixRules, tick
from pagedkv.radix_eviction import note
from pagedkv.radix_links import add_child, cut, find_child, same_block
from pagedkv.radix_rules import matched, met_by_insert, met_by_match, was_split


@lean_jit
def walk(tree: RadixArrays, rules: RadixRules, tokens: Int32Array, num_tokens: int, namespace: int) -> tuple[int, int]:
    """Write the nodes that agree with `tokens` in a block or more into tree.path; return how many, and how many tokens agree.

    Changes nothing.
    """
    nodes, size = tree.nodes, rules.block_size
    node = num_path = num_shared = 0
    while num_shared == nodes["depth"][node] and num_shared < num_tokens:
        node = find_child(tree, size, node, namespace, tokens, num_shared)
        if node == NO_NODE:
            break
        tree.path[num_path] = node
        num_path += 1
        block, end = nodes["first_block"][node], min(nodes["depth"][node], num_tokens)
        num_shared += size
        while num_shared < end:
            block = tree.next_block[block]
            if not same_block(tree, block, tokens, num_shared, size):
                break
            num_shared += size
    return num_path, num_shared


@lean_jit
def end_at(tree: RadixArrays, rules: RadixRules, num_path: int, end: int) -> None:
    """Make the last node of tree.path one that ends after `end` tokens, by splitting it if need be."""
    if num_path == 0:
        return
    lower = tree.path[num_path - 1]
    beyond = tree.nodes["depth"][lower] - end
    if beyond > 0:
        upper = cut(tree, rules.block_size, lower, tree.nodes["num_tokens"][lower] - beyond)
        tree.path[num_path - 1] = upper
        was_split(rules.stamps, tree, upper, lower)
        note(tree, rules, lower)


@lean_jit
def match_prefix(tree: RadixArrays, rules: RadixRules, tokens: Int32Array, num_tokens: int, namespace: int) -> int:
    """Return where the longest stored prefix ends. If that is inside a node, the node is split there. It is a use of it.

    O(tokens compared + nodes met).
    """
    num_path, num_shared = walk(tree, rules, tokens, num_tokens, namespace)
    if num_path == 0:
        return ROOT
    met_by_match(rules.stamps, tree, num_path)
    end_at(tree, rules, num_path, num_shared)
    matched(rules.stamps, tree, num_path)
    for i in range(num_path):
        tree.nodes["inflation"][tree.path[i]] = tree.times[INFLATION]
    last = tree.path[num_path - 1]
    note(tree, rules, last)
    return int(last)


@lean_jit
def insert(
    tree: RadixArrays,
    rules: RadixRules,
    tokens: Int32Array,
    num_tokens: int,
    namespace: int,
    blocks: Int32Array,
    hits_beyond: int,
    priority: int,
) -> tuple[int, int, int]:
    """Store `tokens` in `blocks`, as far as they are not stored yet: see `RadixTree.insert`.

    Returns:
        (nodes at the beginning of tree.path that were present, how many tokens these are, where all of them end).
    """
    nodes = tree.nodes
    num_present, num_shared = walk(tree, rules, tokens, num_tokens, namespace)
    met_by_insert(rules.stamps, tree, num_present)
    end_at(tree, rules, num_present, num_shared)
    last, num_path = ROOT, num_present
    if num_present > 0:
        last = tree.path[num_present - 1]
    for i in range(num_present):
        nodes["priority"][tree.path[i]] = max(nodes["priority"][tree.path[i]], priority)
    if num_shared < num_tokens:
        parent, last = last, add_child(tree, rules.block_size, last, namespace, tokens, blocks, num_shared, num_tokens)
        tree.path[num_path] = last
        num_path += 1
        nodes["priority"][last] = priority
        nodes["last_access"][last] = nodes["created"][last] = tick(tree)
        tree.sizes[EVICTABLE] += nodes["num_tokens"][last]
        note(tree, rules, parent)
    for i in range(num_path):
        node = tree.path[i]
        nodes["inflation"][node] = tree.times[INFLATION]
        nodes["hit_count"][node] += nodes["depth"][node] > hits_beyond
        nodes["deepest"][node] = max(nodes["deepest"][node], num_tokens)
    note(tree, rules, last)
    return num_present, num_shared, int(last)


@lean_jit
def piece_end(tree: RadixArrays, rules: RadixRules, num_present: int, start: int) -> int:
    """Return where the piece ends that an insertion gives back from `start` on, of what tree.path[:num_present] has already."""
    i = num_present - 1
    if rules.stamps.node_by_node:
        i = 0
        while tree.nodes["depth"][tree.path[i]] <= start:
            i += 1
    return int(tree.nodes["depth"][tree.path[i]])


@lean_jit
def lock_path(tree: RadixArrays, rules: RadixRules, node: int) -> None:
    """Pin `node` and all above it. O(nodes above)."""
    nodes = tree.nodes
    while node != ROOT:
        if nodes["lock_ref"][node] == 0:
            tree.sizes[EVICTABLE] -= nodes["num_tokens"][node]
            tree.sizes[PROTECTED] += nodes["num_tokens"][node]
        nodes["lock_ref"][node] += 1
        note(tree, rules, node)
        node = nodes["parent"][node]


@lean_jit
def unlock_path(tree: RadixArrays, rules: RadixRules, node: int) -> None:
    """Undo one `lock_path` of the same node."""
    nodes = tree.nodes
    while node != ROOT:
        nodes["lock_ref"][node] -= 1
        if nodes["lock_ref"][node] == 0:
            tree.sizes[EVICTABLE] += nodes["num_tokens"][node]
            tree.sizes[PROTECTED] -= nodes["num_tokens"][node]
            note(tree, rules, node)
        node = nodes["parent"][node]


@lean_jit
def copy_blocks(tree: RadixArrays, rules: RadixRules, node: int, blocks: Int32Array) -> None:
    """Write the blocks of all tokens from the root to the end of `node` into `blocks`."""
    nodes, size = tree.nodes, rules.block_size
    while node != ROOT:
        begin = (nodes["depth"][node] - nodes["num_tokens"][node]) // size
        block = nodes["first_block"][node]
        for i in range(nodes["num_tokens"][node] // size):
            blocks[begin + i] = block
            if i + 1 < nodes["num_tokens"][node] // size:
                block = tree.next_block[block]
        node = nodes["parent"][node]
