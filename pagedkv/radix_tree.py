"""SGLang's prefix cache: a tree whose nodes are runs of tokens with the slots that hold their K and V.

Both of its trees are here; what differs between them is a `TreeRules`. Source: behaviour of SGLang 0.5.23.
"""

from collections.abc import Hashable

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.radix_arrays import EVICTABLE, NO_NODE, NUM_CANDIDATES, PROTECTED, ROOT, RadixArrays, RadixRules
from pagedkv.radix_eviction import POLICIES, EvictionNumbers, evict_leaf
from pagedkv.radix_links import find_child
from pagedkv.radix_node import Insertion, PrefixMatch, TreeNode, are_whole_blocks, slots_of_blocks
from pagedkv.radix_rules import TreeRules, UnifiedRules
from pagedkv.radix_walks import copy_blocks, end_at, insert, lock_path, match_prefix, piece_end, unlock_path, walk
from pagedkv.slot_allocator import Integers, int32_array

FIRST_ROOM = 1024
"""Blocks that a tree has room for until it meets a larger one."""


@lean_jit
def _split_at(tree: RadixArrays, rules: RadixRules, node: int, end: int) -> int:
    """Split `node` behind `end` tokens of its sequence, one priority higher in front; return that part."""
    tree.path[0] = node
    end_at(tree, rules, 1, end)
    tree.nodes["priority"][tree.path[0]] += 1
    return int(tree.path[0])


class RadixTree:
    """Sequences by their tokens, shared as far as they agree, and evicted by whole leaves.

    The tree owns the slots of its nodes from `insert` until `evict` returns them; it never gives the same prefix two slots: the
    first writer wins. Keys count in whole blocks (SGLang says pages); what lies beyond is ignored. Namespaces (extra_key) share
    nothing. A locked node and all above it stay. Walks are O(tokens compared + nodes met); `evict` is O(nodes freed * log leaves).
    Time is a counter: each reading is one more. What is done with `arrays` is compiled: `pagedkv.radix_walks`.

    Example:
        >>> tree = RadixTree(block_size=2)
        >>> tree.insert([7, 7, 8, 8], [2, 3, 4, 5]).num_present
        0
        >>> hit = tree.match_prefix([7, 7, 9, 9])
        >>> hit.slots.tolist()
        [2, 3]
        >>> tree.inc_lock_ref(hit.node)
        >>> [slots.tolist() for slots in tree.evict(4)], tree.evictable_size, tree.protected_size
        ([[4, 5]], 0, 2)
    """

    def __init__(
        self,
        *,
        block_size: int = 1,
        rules: TreeRules | None = None,
        eviction: str = "lru",
        eviction_settings: EvictionSettings | None = None,
        num_blocks: int | None = None,
    ) -> None:
        """Make an empty tree; by default the server's (`rules`). `num_blocks`, if known, is the last block that it will get.

        Raises:
            ConfigError: If block_size is less than 1 or `eviction` is no name of `EVICTION_POLICIES`.
        """
        if block_size < 1:
            raise ConfigError(f"a radix tree with blocks of {block_size} tokens: needs 1 or more")
        EVICTION_POLICIES.load(eviction)
        self.block_size = block_size
        self._is_fixed = num_blocks is not None
        self.arrays = RadixArrays.empty(FIRST_ROOM if num_blocks is None else num_blocks, block_size)
        """The tree itself, for compiled code. Replaced by larger ones when a block comes that they have no room for."""
        numbers = EvictionNumbers.of(eviction_settings or EvictionSettings())
        self.rules = RadixRules(int(block_size), POLICIES.index(eviction), numbers, rules or UnifiedRules())
        self.namespaces: list[Hashable] = [None]
        """By the number that nodes have."""
        self._numbers: dict[Hashable, int] = {None: 0}
        self.root = TreeNode(self, ROOT)
        # Their arguments have the same types in one tree.
        self._match, self._insert, self._walk = fixed_types(match_prefix), fixed_types(insert), fixed_types(walk)
        self._lock, self._unlock = fixed_types(lock_path), fixed_types(unlock_path)
        self._evict_leaf, self._copy_blocks = fixed_types(evict_leaf), fixed_types(copy_blocks)

    @property
    def evictable_size(self) -> int:
        """Tokens in nodes that nobody locks."""
        return int(self.arrays.sizes[EVICTABLE])

    @property
    def protected_size(self) -> int:
        """Tokens in locked nodes."""
        return int(self.arrays.sizes[PROTECTED])

    @property
    def total_size(self) -> int:
        """Tokens in the tree."""
        return self.evictable_size + self.protected_size

    def namespace_number(self, namespace: Hashable) -> int:
        """Return the number by which compiled code knows `namespace`."""
        if (number := self._numbers.get(namespace)) is None:
            number = self._numbers[namespace] = len(self.namespaces)
            self.namespaces.append(namespace)
        return number

    def match_prefix(self, tokens: Integers, *, extra_key: Hashable = None) -> PrefixMatch:
        """Return the longest stored prefix of `tokens`. If it ends inside a node, the node is split there.

        Raises:
            ConfigError: If `tokens` are no token ids.
        """
        key = self._whole_blocks(tokens)
        node = TreeNode(self, self._match(self.arrays, self.rules, key, key.size, self.namespace_number(extra_key)))
        return PrefixMatch(self._slots_to(node.index), node)

    def peek(self, tokens: Integers, *, extra_key: Hashable = None) -> list[tuple[TreeNode, int]]:
        """Return the nodes that `tokens` begin with, each with how many of its tokens that are. Unlike a lookup it is no use."""
        key = self._whole_blocks(tokens)
        number, shared = self._walk(self.arrays, self.rules, key, key.size, self.namespace_number(extra_key))
        path = [TreeNode(self, node) for node in self.arrays.path[:number].tolist()]
        return [(node, min(node.depth, shared) - node.depth + node.num_tokens) for node in path]

    def insert(
        self,
        tokens: Integers,
        slots: Integers,
        *,
        extra_key: Hashable = None,
        held: int = 0,
        hits_beyond: int = 0,
        priority: int = 0,
    ) -> Insertion:
        """Store `tokens` with one slot each, as far as they are not stored yet.

        Args:
            tokens: The sequence, from its beginning.
            slots: Their slots; those of a block are neighbours.
            extra_key: The namespace.
            held: Leading tokens whose slots are the tree's own, from a match: not reported as duplicates.
            hits_beyond: Nodes that end behind this many tokens count a hit.
            priority: Of the request; a node keeps the highest.

        Raises:
            ConfigError: If the slots do not fit the tokens, or one beyond `held` is the tree's own; nothing has changed then.
        """
        key, namespace = self._whole_blocks(tokens), self.namespace_number(extra_key)
        own = self._checked_slots(slots, key, held, namespace)
        blocks = np.ascontiguousarray(own[:: self.block_size] // self.block_size)
        num_present, present, node = self._insert(
            self.arrays, self.rules, key, key.size, namespace, blocks, hits_beyond, int(priority)
        )
        pieces, start = list[Int32Array](), held
        while start < present:
            end = piece_end(self.arrays, self.rules, num_present, start)
            pieces.append(own[start:end])
            start = end
        return Insertion(int(present), TreeNode(self, node), pieces)

    def checkpoint(self, node: TreeNode, num_prompt_tokens: int) -> TreeNode:
        """Keep the prompt of a finished request apart from its output, so that eviction can drop the one without the other.

        If the prompt's last whole block ends inside `node`, where the request's insertion ended, the node is split there and the
        prompt's part ranks one priority higher. Returns the part, or `node` if there was nothing to split.

        Raises:
            ConfigError: If `node` is no longer in the tree, or not a leaf.
        """
        self._check_stored(node)
        end = num_prompt_tokens // self.block_size * self.block_size
        if node.children:
            raise ConfigError(
                f"a checkpoint at {num_prompt_tokens} tokens needs a leaf: {len(node.children)} nodes follow this one"
            )
        if node == self.root or not node.depth - node.num_tokens < end < node.depth:
            return node
        return TreeNode(self, int(_split_at(self.arrays, self.rules, node.index, end)))

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Pin `node` and all above it. The root needs no lock. O(nodes above).

        Raises:
            ConfigError: If `node` is no longer in the tree.
        """
        self._check_stored(node)
        self._lock(self.arrays, self.rules, node.index)

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one `inc_lock_ref` of the same node.

        Raises:
            ConfigError: If `node` is not in the tree, or it or one above has no lock left; nothing has changed then.
        """
        self._check_stored(node)
        if node != self.root and node.lock_ref == 0:  # above it there are as many
            raise ConfigError(f"the prefix of {node.depth} tokens is unlocked more often than it was locked")
        self._unlock(self.arrays, self.rules, node.index)

    def evict(self, num_tokens: int) -> list[Int32Array]:
        """Remove whole leaves, the lowest rank first, until `num_tokens` are freed or all that is left is locked.

        Returns the slots of each: the caller's now, to be given back with `SlotAllocator.free_segment` in this order.
        """
        freed = list[Int32Array]()
        while num_tokens > 0 and (leaf := self._evict_leaf(self.arrays, self.rules)) != NO_NODE:
            freed.append(TreeNode(self, leaf).slots)
            num_tokens -= freed[-1].size
        return freed

    def check_integrity(self) -> None:
        """Raise IntegrityError unless nodes, sizes and candidates fit together and no slot is there twice. O(tokens)."""
        nodes = list(self.root.below())
        for node in nodes:
            node.check_integrity()
        if np.unique(slots := np.concatenate([self.root.slots, *(node.slots for node in nodes)])).size != slots.size:
            raise IntegrityError(f"a slot is in the tree twice: {nodes}")
        sizes = [sum(node.num_tokens for node in nodes if (node.lock_ref > 0) == locked) for locked in (False, True)]
        if sizes != [self.evictable_size, self.protected_size]:
            raise IntegrityError(f"sizes {self.evictable_size} evictable, {self.protected_size} protected are wrong: {nodes}")
        candidates = self.arrays.candidates[: self.arrays.sizes[NUM_CANDIDATES]].tolist()
        if sorted(node.index for node in nodes if not node.children and not node.lock_ref) != sorted(candidates):
            raise IntegrityError(f"candidates for eviction {candidates} are not the unlocked leaves of {nodes}")
        records = self.arrays.nodes
        ranks = [tuple(records[name][node] for name in ("rank", "second_rank", "candidate_since")) for node in candidates]
        if any(records["heap_place"][node] != i + 1 or ranks[i] < ranks[(i - 1) // 2] for i, node in enumerate(candidates) if i):
            raise IntegrityError(f"candidates for eviction {candidates} with ranks {ranks} are no heap: {nodes}")

    def finds(self, node: TreeNode) -> bool:
        """Return whether a walk that has come to the parent of `node` finds it."""
        record, tokens = self.arrays.nodes[node.index], node.tokens
        if tokens.size < self.block_size:
            return False
        return node.index == find_child(self.arrays, self.block_size, int(record["parent"]), int(record["namespace"]), tokens, 0)

    def _whole_blocks(self, tokens: Integers) -> Int32Array:
        array = int32_array(tokens, what="tokens")
        return np.ascontiguousarray(array[: array.size // self.block_size * self.block_size])

    def _slots_to(self, node: int) -> Int32Array:
        """Return the slots of all tokens from the root to the end of `node`."""
        blocks = np.zeros(int(self.arrays.nodes["depth"][node]) // self.block_size, np.int32)
        self._copy_blocks(self.arrays, self.rules, node, blocks)
        return slots_of_blocks(blocks, self.block_size)

    def _checked_slots(self, slots: Integers, key: Int32Array, held: int, namespace: int) -> Int32Array:
        """Return the slots that an insertion brings for `key`, and have room for them.

        Raises:
            ConfigError: If they are not one per token in whole blocks, or one that is not `held` is the tree's already.
        """
        array, num_tokens = int32_array(slots, what="slots"), key.size
        if array.size < num_tokens or not 0 <= held <= num_tokens or held % self.block_size:
            raise ConfigError(f"{array.size} slots for {num_tokens} tokens, {held} held: needs one each, and whole blocks held")
        array = array[:num_tokens]
        if not are_whole_blocks(array, self.block_size):
            raise ConfigError(f"slots {array.tolist()} are no whole blocks of {self.block_size}")
        number, present = self._walk(self.arrays, self.rules, key, num_tokens, namespace)
        if number:
            stored = self._slots_to(int(self.arrays.path[number - 1]))[:num_tokens]
            own = array[held : stored.size] == stored[held:]
            if own.any():
                raise ConfigError(f"slot {array[held + own.argmax()]} is the tree's own: held must count it, not be {held}")
        room = self.arrays.next_block.size
        if num_tokens > present and (last := int(array[present:].max()) // self.block_size) >= room:
            if self._is_fixed:
                raise ConfigError(f"block {last} is not of this pool, whose last one is {room - 1}")
            self.arrays = self.arrays.larger(max(last, 2 * room), self.block_size)
        return array

    def _check_stored(self, node: TreeNode) -> None:
        if not node.is_stored_in(self):
            raise ConfigError("this node is not in this tree (any more): only a locked one stays")
