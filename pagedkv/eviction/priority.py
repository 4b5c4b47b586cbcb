"""Lowest priority first; among equals, the least recently used."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("priority")
def priority(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by priority, then last use."""
    return (node.priority, node.last_access)
