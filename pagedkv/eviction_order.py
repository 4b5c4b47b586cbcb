"""Which cached blocks of a pool go first, by a policy of `pagedkv.eviction`."""

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import NO_BLOCKS, Float64Array, Int32Array, Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings, PlainCandidate
from pagedkv.free_queue import NULL_BLOCK

_MIN_HEAP = 64
"""Heap entries that are not worth looking through for stale ones."""

Blocks: TypeAlias = Sequence[int] | Int32Array
_Entry: TypeAlias = tuple[tuple[float, ...], int, int, int]
"""Key, tie (the earlier candidate first), block, and the block's generation: another one by now, and the entry is stale."""


class BlockRecords(NamedTuple):
    """What is known of each block. Times are readings of the order's counter. See `EvictionCandidate`."""

    created: Int64Array
    """When it got its key, from 1; 0: it carries none, and the rest is stale."""
    last_access: Int64Array
    hit_count: Int64Array
    priority: Int64Array
    depth: Int64Array
    deepest: Int64Array
    inflation: Float64Array
    expires: Float64Array
    """When its priority stops to count."""
    rank: Float64Array
    """First number of its latest key."""
    parent: Int64Array
    """The block before it in the sequence that stored it, NULL_BLOCK if it is the first."""
    parent_created: Int64Array
    """That block's `created`: another one by now, and the parent is gone."""
    free_children: Int64Array
    """Blocks with this parent that nobody holds."""
    free: npt.NDArray[np.bool_]
    """It carries a key and nobody holds it."""
    generation: Int64Array
    """Grows whenever it stops to be a candidate."""


class EvictionOrder:
    """Ranks the blocks that carry a key and that nobody holds.

    As in a tree, only ends can go: a block with a free continuation is no candidate, for without it the continuation would lie
    there and never be found. Of the candidates the one with the lowest key of the policy goes first, then the earliest candidate;
    its going may make its parent a candidate. Under lru that is the order of vLLM's free queue.

    Time is a counter that each call of `stored`, `used` and `released` advances. State is arrays by block and a heap of
    candidates; entries of blocks that are candidates no more stay until they come up or outnumber the others.

    Example:
        >>> order = EvictionOrder(num_blocks=9, block_size=16, eviction="lfu")
        >>> order.stored([1, 2, 3], 0)
        >>> order.stored([4], 0)
        >>> order.used([1, 2])
        >>> order.released([1, 2, 3, 4])
        >>> order.victims(3).tolist()
        [3, 4, 2]
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, eviction: str = "lru", settings: EvictionSettings | None = None
    ) -> None:
        """Make the order of a pool of `num_blocks` blocks of `block_size` tokens, none of which carries a key.

        Raises:
            ConfigError: If `eviction` is no name of `EVICTION_POLICIES`.
        """
        self._key_of = EVICTION_POLICIES.load(eviction)
        self._settings = settings or EvictionSettings()
        self._block_size = block_size
        types = {"inflation": np.float64, "expires": np.float64, "rank": np.float64, "free": np.bool_}
        self.records = BlockRecords(*(np.zeros(num_blocks, types.get(name, np.int64)) for name in BlockRecords._fields))
        self._now = 0
        self._inflation = 0.0
        self._tie = count()
        self._heap: list[_Entry] = []
        self._worth_compacting = _MIN_HEAP
        self._expiring: list[tuple[float, int, int]] = []
        """A heap of when which candidate, in which generation, gets another rank."""
        self._view = PlainCandidate(num_tokens=block_size)
        """Through this a policy sees a block; one for all, filled anew each time."""

    def stored(self, blocks: Blocks, first_depth_tokens: int, priority: int = 0, *, before: Blocks = NO_BLOCKS) -> None:
        """Hear that `blocks`, held and consecutive in a sequence, carry a key now. O(len(blocks) + len(before)).

        Args:
            blocks: The blocks.
            first_depth_tokens: Tokens that stand before the first of them.
            priority: Of the request.
            before: The blocks of the sequence that stand before them: they learn how deep it goes. Without them, the first of
                `blocks` counts as the beginning of a sequence.

        Raises:
            ConfigError: If one carries a key already; nothing has changed then.
        """
        new, earlier = np.asarray(blocks, np.int32), np.asarray(before, np.int32)
        records = self.records
        if records.created[new].any():
            raise ConfigError(f"blocks {new.tolist()} carry a key, some of them already: tell of their removal first")
        self._now += 1
        records.parent[new[1:]] = new[:-1]
        records.parent[new[:1]] = earlier[-1] if earlier.size else NULL_BLOCK
        records.created[new] = records.last_access[new] = self._now
        records.parent_created[new] = records.created[records.parent[new]]
        records.hit_count[new], records.priority[new], records.inflation[new] = 1, priority, self._inflation
        records.rank[new] = records.free_children[new] = 0
        records.depth[new] = first_depth_tokens + self._block_size * np.arange(1, new.size + 1)
        records.deepest[new] = depth = first_depth_tokens + self._block_size * new.size
        earlier = self._with_key(earlier)
        records.deepest[earlier] = np.maximum(records.deepest[earlier], depth)

    def used(self, blocks: Blocks, priority: int = 0) -> None:
        """Hear that a request of this priority hit `blocks`: they are held now. O(len(blocks)).

        This and the calls below ignore blocks that carry no key.
        """
        hits = self._with_key(blocks)
        self._touch(hits)
        self._hold(hits[self.records.free[hits]])
        self.records.hit_count[hits] += 1
        self.records.priority[hits] = np.maximum(self.records.priority[hits], priority)

    def released(self, blocks: Blocks) -> None:
        """Hear that nobody holds `blocks` any more. O(len(blocks) + candidates among them * log candidates)."""
        records, released = self.records, self._with_key(blocks)
        released = released[~records.free[released]]
        self._touch(released)
        records.expires[released] = self._now + self._settings.priority_lifetime
        records.free[released] = True
        parents = self._parents(released)
        np.add.at(records.free_children, parents, 1)
        records.generation[parents] += 1
        for block in released[records.free_children[released] == 0].tolist():
            self._push(block)

    def removed(self, blocks: Blocks) -> None:
        """Hear that `blocks` were evicted: they carry no key any more. O(len(blocks) + new candidates * log candidates)."""
        records, gone = self.records, self._with_key(blocks)
        evicted = gone[records.free[gone]]
        self._inflation = max(self._inflation, records.rank[evicted].max(initial=0.0))
        self._hold(evicted)
        records.created[gone] = 0

    def victims(self, num_blocks: int) -> Int32Array:
        """Return the `num_blocks` blocks that go first, in order; fewer if no more are free. Changes nothing.

        O(num_blocks * log candidates), and as much again for each stale entry on the way, once.
        """
        self._expire()
        records, chosen, taken = self.records, list[int](), list[_Entry]()
        exposed: list[_Entry] = []  # a heap of those that become candidates as others are chosen
        num_chosen_children = Counter[int]()
        while len(chosen) < num_blocks:
            self._drop_stale()
            if self._heap and not (exposed and exposed[0] < self._heap[0]):
                taken.append(heapq.heappop(self._heap))
                block = taken[-1][2]
            elif exposed:
                block = heapq.heappop(exposed)[2]
            else:
                break
            chosen.append(block)
            parent = records.parent[block].item()
            if records.free[parent] and records.created[parent] == records.parent_created[block]:
                num_chosen_children[parent] += 1
                if num_chosen_children[parent] == records.free_children[parent]:
                    heapq.heappush(exposed, (self._key(parent), next(self._tie), parent, 0))
        for entry in taken:
            heapq.heappush(self._heap, entry)
        return np.array(chosen, np.int32)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless exactly the free blocks without a free continuation are candidates. O(num_blocks)."""
        records = self.records
        children = np.bincount(self._parents(np.flatnonzero(records.free)), minlength=records.free.size)
        keyed = records.created > 0
        candidates = np.flatnonzero(records.free & (children == 0)).tolist()
        valid = sorted(block for _, _, block, generation in self._heap if records.generation[block] == generation)
        fits = np.array_equal(records.free_children[keyed], children[keyed]) and keyed[records.free].all()
        if not fits or valid != candidates or keyed[NULL_BLOCK]:
            state = {name: column.tolist() for name, column in records._asdict().items()}
            raise IntegrityError(f"candidates are {valid}, but should be {candidates}: {state}, heap {self._heap}")

    def _with_key(self, blocks: Blocks) -> Int32Array:
        ids = np.asarray(blocks, np.int32)
        return ids[self.records.created[ids] > 0]

    def _parents(self, blocks: npt.NDArray[np.integer]) -> Int64Array:
        """Return the parents of `blocks`, as far as they are there."""
        parents = self.records.parent[blocks]
        there: Int64Array = parents[
            (parents != NULL_BLOCK) & (self.records.created[parents] == self.records.parent_created[blocks])
        ]
        return there

    def _touch(self, blocks: Int32Array) -> None:
        self._now += 1
        self.records.last_access[blocks], self.records.inflation[blocks] = self._now, self._inflation

    def _hold(self, blocks: Int32Array) -> None:
        """Make `blocks` free no more; a parent that has no other free continuation becomes a candidate."""
        records = self.records
        records.free[blocks] = False
        records.generation[blocks] += 1
        parents = self._parents(blocks)
        np.subtract.at(records.free_children, parents, 1)
        for parent in np.unique(parents[records.free[parents] & (records.free_children[parents] == 0)]).tolist():
            self._push(parent)

    def _key(self, block: int) -> tuple[float, ...]:
        records, view = self.records, self._view
        view.last_access, view.created = records.last_access[block].item(), records.created[block].item()
        view.hit_count, view.priority = records.hit_count[block].item(), records.priority[block].item()
        view.depth, view.deepest = records.depth[block].item(), records.deepest[block].item()
        view.expired = bool(records.expires[block] <= self._now)
        view.inflation = records.inflation[block].item()
        key = self._key_of(view, self._settings)
        records.rank[block] = key[0]
        return key

    def _push(self, block: int) -> None:
        """Make `block` a candidate, or rank it anew. O(log candidates), amortised over the stale entries dropped."""
        records = self.records
        records.generation[block] += 1
        generation = records.generation[block].item()
        heapq.heappush(self._heap, (self._key(block), next(self._tie), block, generation))
        if self._now < records.expires[block] < np.inf:
            heapq.heappush(self._expiring, (records.expires[block].item(), block, generation))
        if len(self._heap) > self._worth_compacting:
            self._heap = [entry for entry in self._heap if records.generation[entry[2]] == entry[3]]
            heapq.heapify(self._heap)
            self._worth_compacting = max(2 * len(self._heap), _MIN_HEAP)

    def _drop_stale(self) -> None:
        while self._heap and self.records.generation[self._heap[0][2]] != self._heap[0][3]:
            heapq.heappop(self._heap)

    def _expire(self) -> None:
        """Rank anew those candidates whose priority counts no more."""
        while self._expiring and self._expiring[0][0] <= self._now:
            _, block, generation = heapq.heappop(self._expiring)
            if self.records.generation[block] == generation:
                self._push(block)
