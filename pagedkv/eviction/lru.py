"""Least recently used first."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("lru")
def lru(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by last use."""
    return (node.last_access,)
