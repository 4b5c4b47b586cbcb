"""Least frequently used first; among equals, the least recently used."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("lfu")
def lfu(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by number of uses, then last use."""
    return (node.hit_count, node.last_access)
