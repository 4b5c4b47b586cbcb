"""SGLang's prefix cache: a tree whose nodes are runs of tokens with the slots that hold their K and V.

Both of its trees are here; what differs between them is a `TreeRules`. Source: behaviour of SGLang 0.5.23.
"""

import heapq
from collections.abc import Hashable
from itertools import count

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings
from pagedkv.radix_node import Insertion, PrefixMatch, TreeNode, checked_slots, edge_key
from pagedkv.radix_rules import Clock, TreeRules, UnifiedRules
from pagedkv.slot_allocator import Integers, int32_array


class RadixTree:
    """Sequences by their tokens, shared as far as they agree, and evicted by whole leaves.

    The tree owns the slots of its nodes from `insert` until `evict` returns them; it never gives the same prefix two slots: the
    first writer wins. Keys count in whole blocks (SGLang says pages); what lies beyond is ignored. Namespaces (extra_key) share
    nothing. A locked node and all above it stay. Walks are O(tokens compared + nodes met); `evict` is O(leaves + nodes freed *
    log leaves). Time is a counter that the tree reads through `clock`.

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
        clock: Clock | None = None,
    ) -> None:
        """Make an empty tree; by default the server's (`rules`), with a counter of its own for a clock.

        Raises:
            ConfigError: If block_size is less than 1 or `eviction` is no name of `EVICTION_POLICIES`.
        """
        if block_size < 1:
            raise ConfigError(f"a radix tree with blocks of {block_size} tokens: needs 1 or more")
        self.block_size = block_size
        self.root = TreeNode(tokens=np.empty(0, np.int32), slots=np.empty(0, np.int32), namespace=None, parent=None, depth=0)
        self.evictable_size = 0
        """Tokens in nodes that nobody locks."""
        self.protected_size = 0
        """Tokens in locked nodes."""
        self._rules = rules or UnifiedRules()
        self._eviction_key = EVICTION_POLICIES.load(eviction)
        self._settings = eviction_settings or EvictionSettings()
        self._clock = clock or count(1).__next__
        self._inflation = 0.0  # the highest rank ever evicted: what is used from now on ranks above it, for policies that ask
        self._candidates: dict[TreeNode, None] = {}  # an ordered set of the unlocked nodes without children

    @property
    def total_size(self) -> int:
        """Tokens in the tree."""
        return self.evictable_size + self.protected_size

    def match_prefix(self, tokens: Integers, *, extra_key: Hashable = None) -> PrefixMatch:
        """Return the longest stored prefix of `tokens`. If it ends inside a node, the node is split there.

        Raises:
            ConfigError: If `tokens` are no token ids.
        """
        path, matched = self._walk(self._whole_blocks(tokens), extra_key)
        if not path:
            return PrefixMatch(np.empty(0, np.int32), self.root)
        self._rules.met_by_match(path, self._clock)
        self._end_at(path, matched)
        self._rules.matched(path, self._clock)
        for node in path:
            node.inflation = self._inflation
        return PrefixMatch(np.concatenate([node.slots for node in path]), path[-1])

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
        key = self._whole_blocks(tokens)
        path, matched = self._walk(key, extra_key)
        own = checked_slots(slots, key.size, held, path, self.block_size)
        self._rules.met_by_insert(path, self._clock)
        self._end_at(path, matched)
        spans = self._rules.duplicate_spans(held, [node.depth for node in path])
        for node in path:
            node.priority = max(node.priority, priority)
        if matched < key.size:
            parent = path[-1] if path else self.root
            path.append(parent.add_child(key[matched:], own[matched:], extra_key, self.block_size))
            path[-1].priority = priority
            path[-1].last_access = path[-1].created = self._clock()
            self.evictable_size += path[-1].num_tokens
            self._note_candidate(path[-1])
            self._note_candidate(parent)
        for node in path:
            node.inflation = self._inflation
            node.hit_count += node.depth > hits_beyond
            node.deepest = max(node.deepest, key.size)
        return Insertion(matched, path[-1] if path else self.root, [own[start:end] for start, end in spans])

    def checkpoint(self, node: TreeNode, num_prompt_tokens: int) -> TreeNode:
        """Keep the prompt of a finished request apart from its output, so that eviction can drop the one without the other.

        If the prompt's last whole block ends inside `node`, where the request's insertion ended, the node is split there and the
        prompt's part ranks one priority higher. Returns the part, or `node` if there was nothing to split.

        Raises:
            ConfigError: If `node` is no longer in the tree, or not a leaf.
        """
        path = self._path_to(node)
        end = num_prompt_tokens // self.block_size * self.block_size
        if node.children:
            raise ConfigError(
                f"a checkpoint at {num_prompt_tokens} tokens needs a leaf: {len(node.children)} nodes follow this one"
            )
        if not path or not node.depth - node.num_tokens < end < node.depth:
            return node
        self._end_at(path, end)
        path[-1].priority += 1
        return path[-1]

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Pin `node` and all above it. The root needs no lock. O(nodes above).

        Raises:
            ConfigError: If `node` is no longer in the tree.
        """
        for above in self._path_to(node):
            if above.lock_ref == 0:
                self.evictable_size -= above.num_tokens
                self.protected_size += above.num_tokens
            above.lock_ref += 1
            self._note_candidate(above)

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one `inc_lock_ref` of the same node.

        Raises:
            ConfigError: If `node` is not in the tree, or it or one above has no lock left; nothing has changed then.
        """
        path = self._path_to(node)
        if any(above.lock_ref == 0 for above in path):
            raise ConfigError(f"the prefix of {node.depth} tokens is unlocked more often than it was locked")
        for above in path:
            above.lock_ref -= 1
            if above.lock_ref == 0:
                self.evictable_size += above.num_tokens
                self.protected_size -= above.num_tokens
            self._note_candidate(above)

    def evict(self, num_tokens: int) -> list[Int32Array]:
        """Remove whole leaves, the lowest rank first, until `num_tokens` are freed or all that is left is locked.

        Returns the slots of each: the caller's now, to be given back with `SlotAllocator.free_segment` in this order.
        """
        tie = count()  # two nodes of one rank: the earlier candidate first
        heap = [(self._eviction_key(node, self._settings), next(tie), node) for node in self._candidates]
        heapq.heapify(heap)
        freed: list[Int32Array] = []
        while num_tokens > 0 and heap:
            rank, _, node = heapq.heappop(heap)
            self._inflation = max(self._inflation, rank[0])
            parent = node.detach(self.block_size)
            freed.append(node.slots)
            num_tokens -= node.num_tokens
            self.evictable_size -= node.num_tokens
            del self._candidates[node]
            self._note_candidate(parent)
            if parent in self._candidates:
                heapq.heappush(heap, (self._eviction_key(parent, self._settings), next(tie), parent))
        return freed

    def check_integrity(self) -> None:
        """Raise IntegrityError unless nodes, sizes and candidates fit together and no slot is there twice. O(tokens)."""
        nodes = list(self.root.below())
        for node in nodes:
            node.check_integrity(self.block_size)
        if np.unique(slots := np.concatenate([self.root.slots, *(node.slots for node in nodes)])).size != slots.size:
            raise IntegrityError(f"a slot is in the tree twice: {nodes}")
        sizes = [sum(node.num_tokens for node in nodes if (node.lock_ref > 0) == locked) for locked in (False, True)]
        if sizes != [self.evictable_size, self.protected_size]:
            raise IntegrityError(f"sizes {self.evictable_size} evictable, {self.protected_size} protected are wrong: {nodes}")
        if {node for node in nodes if not node.children and not node.lock_ref} != self._candidates.keys():
            raise IntegrityError(f"candidates for eviction {list(self._candidates)} are not the unlocked leaves of {nodes}")

    def _whole_blocks(self, tokens: Integers) -> Int32Array:
        array = int32_array(tokens, what="tokens")
        return array[: array.size // self.block_size * self.block_size]

    def _walk(self, key: Int32Array, extra_key: Hashable) -> tuple[list[TreeNode], int]:
        """Return the nodes that agree with `key` in a block or more, and how many tokens agree in all. Changes nothing."""
        path, node, matched = list[TreeNode](), self.root, 0
        while matched == node.depth and matched < key.size:
            rest = key[matched:]
            child = node.children.get(edge_key(extra_key, rest, self.block_size))
            if child is None:
                break
            path.append(child)
            matched += child.num_shared(rest, self.block_size)
            node = child
        return path, matched

    def _end_at(self, path: list[TreeNode], end: int) -> None:
        """Make the last node of `path` one that ends after `end` tokens, by splitting it if need be."""
        if path and path[-1].depth > end:
            lower = path[-1]
            path[-1] = lower.split(end - lower.depth + lower.num_tokens, self.block_size)
            self._rules.was_split(path[-1], lower, self._clock)

    def _path_to(self, node: TreeNode) -> list[TreeNode]:
        """Return the nodes from below the root down to `node`."""
        top, *path = node.path()
        if top is not self.root:
            raise ConfigError(f"the prefix of {node.depth} tokens is not in this tree (any more): only a locked one stays")
        return path

    def _note_candidate(self, node: TreeNode) -> None:
        if node is self.root or node.children or node.lock_ref:
            self._candidates.pop(node, None)
        else:
            self._candidates[node] = None
