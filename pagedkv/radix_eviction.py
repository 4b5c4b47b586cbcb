"""Which leaf of a radix tree goes first: the unlocked ones in a heap, by the rank that a policy of `pagedkv.eviction` gives."""

from typing import Any, NamedTuple

from pagedkv.eviction import EvictionSettings
from pagedkv.eviction.cost_aware import cost_aware
from pagedkv.eviction.fifo import fifo
from pagedkv.eviction.filo import filo
from pagedkv.eviction.lfu import lfu
from pagedkv.eviction.lru import lru
from pagedkv.eviction.mru import mru
from pagedkv.eviction.priority import priority
from pagedkv.eviction.retention import retention
from pagedkv.eviction.slru import slru
from pagedkv.eviction.tlru import tlru
from pagedkv.jit import lean_jit
from pagedkv.radix_arrays import EVICTABLE, INFLATION, LAST_CANDIDATE, NO_NODE, NUM_CANDIDATES, ROOT, RadixArrays, RadixRules
from pagedkv.radix_links import detach

POLICIES = ("lru", "lfu", "slru", "tlru", "priority", "retention", "fifo", "filo", "mru", "cost-aware")
"""By the number that compiled code uses."""

_lru, _lfu, _slru, _tlru, _priority = (lean_jit(key) for key in (lru, lfu, slru, tlru, priority))
_retention, _fifo, _filo, _mru, _cost_aware = (lean_jit(key) for key in (retention, fifo, filo, mru, cost_aware))


class EvictionNumbers(NamedTuple):
    """`EvictionSettings` for compiled code."""

    threshold: int
    next_prompt_estimate: int
    linear_cost: float
    attention_cost_per_token: float
    priority_lifetime: float

    @classmethod
    def of(cls, settings: EvictionSettings) -> "EvictionNumbers":
        """Return those of `settings`."""
        return cls(
            int(settings.threshold),
            int(settings.next_prompt_estimate),
            float(settings.linear_cost),
            float(settings.attention_cost_per_token),
            float(settings.priority_lifetime),
        )


class _Candidate(NamedTuple):
    """A leaf as policies see it: an `EvictionCandidate`."""

    num_tokens: int
    last_access: float
    created: float
    hit_count: int
    priority: int
    depth: int
    deepest: int
    expired: bool
    inflation: float


@lean_jit
def _set_rank(tree: RadixArrays, rules: RadixRules, leaf: int) -> None:
    """Let the policy rank `leaf`, by one number or two."""
    nodes, settings, policy = tree.nodes, rules.eviction, rules.policy
    node: Any = _Candidate(  # its fields are not to be set, which policies do not do
        nodes["num_tokens"][leaf],
        nodes["last_access"][leaf],
        nodes["created"][leaf],
        nodes["hit_count"][leaf],
        nodes["priority"][leaf],
        nodes["depth"][leaf],
        nodes["deepest"][leaf],
        nodes["expired"][leaf] != 0,
        nodes["inflation"][leaf],
    )
    first, second = 0.0, 0.0
    if policy == 0:
        first = float(_lru(node, settings)[0])
    elif policy == 1:
        uses, used = _lfu(node, settings)
        first, second = float(uses), float(used)
    elif policy == 2:
        again, used = _slru(node, settings)
        first, second = 1.0 * again, float(used)
    elif policy == 3:
        needed, used = _tlru(node, settings)
        first, second = 1.0 * needed, float(used)
    elif policy == 4:
        kept, used = _priority(node, settings)
        first, second = float(kept), float(used)
    elif policy == 5:
        kept, used = _retention(node, settings)
        first, second = float(kept), float(used)
    elif policy == 6:
        first = float(_fifo(node, settings)[0])
    elif policy == 7:
        first = float(_filo(node, settings)[0])
    elif policy == 8:
        first = float(_mru(node, settings)[0])
    else:
        first, second = _cost_aware(node, settings)
    nodes["rank"][leaf], nodes["second_rank"][leaf] = first, second


@lean_jit
def _goes_before(tree: RadixArrays, a: int, b: int) -> bool:
    """Return whether leaf `a` is evicted before `b`: by rank, and of equals the earlier candidate."""
    nodes = tree.nodes
    if nodes["rank"][a] != nodes["rank"][b]:
        return bool(nodes["rank"][a] < nodes["rank"][b])
    if nodes["second_rank"][a] != nodes["second_rank"][b]:
        return bool(nodes["second_rank"][a] < nodes["second_rank"][b])
    return bool(nodes["candidate_since"][a] < nodes["candidate_since"][b])


@lean_jit
def _settle(tree: RadixArrays, place: int, leaf: int) -> None:
    """Put `leaf` into the heap at `place`, which is empty, or where it belongs above or below."""
    heap, nodes, size = tree.candidates, tree.nodes, tree.sizes[NUM_CANDIDATES]
    while place > 0 and _goes_before(tree, leaf, heap[(place - 1) // 2]):
        heap[place] = heap[(place - 1) // 2]
        nodes["heap_place"][heap[place]] = place + 1
        place = (place - 1) // 2
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _goes_before(tree, heap[child + 1], heap[child]):
            child += 1
        if not _goes_before(tree, heap[child], leaf):
            break
        heap[place] = heap[child]
        nodes["heap_place"][heap[place]] = place + 1
        place = child
    heap[place] = leaf
    nodes["heap_place"][leaf] = place + 1


@lean_jit
def _leave_heap(tree: RadixArrays, leaf: int) -> None:
    place = tree.nodes["heap_place"][leaf] - 1
    tree.nodes["heap_place"][leaf] = 0
    tree.sizes[NUM_CANDIDATES] -= 1
    last = tree.candidates[tree.sizes[NUM_CANDIDATES]]
    if last != leaf:
        _settle(tree, place, last)


@lean_jit
def note(tree: RadixArrays, rules: RadixRules, node: int) -> None:
    """Let eviction know of `node`, whose rank, locks or children may have changed. O(log leaves)."""
    nodes, sizes = tree.nodes, tree.sizes
    place = nodes["heap_place"][node] - 1
    if node == ROOT or nodes["first_child"][node] != NO_NODE or nodes["lock_ref"][node] > 0:
        if place >= 0:
            _leave_heap(tree, node)
        return
    if place < 0:
        place = sizes[NUM_CANDIDATES]
        sizes[NUM_CANDIDATES] += 1
        sizes[LAST_CANDIDATE] += 1
        nodes["candidate_since"][node] = sizes[LAST_CANDIDATE]
    _set_rank(tree, rules, node)
    _settle(tree, place, node)


@lean_jit
def evict_leaf(tree: RadixArrays, rules: RadixRules) -> int:
    """Take the leaf of lowest rank out and return it, or NO_NODE; its record says which blocks it had. O(log leaves)."""
    if tree.sizes[NUM_CANDIDATES] == 0:
        return NO_NODE
    leaf = tree.candidates[0]
    tree.times[INFLATION] = max(tree.times[INFLATION], tree.nodes["rank"][leaf])
    _leave_heap(tree, leaf)
    tree.sizes[EVICTABLE] -= tree.nodes["num_tokens"][leaf]
    note(tree, rules, detach(tree, rules.block_size, leaf))
    return int(leaf)
