"""Segmented: what was stored only once goes before what was stored twice or more; lru within each segment."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("slru")
def slru(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by whether it was used again, then last use."""
    return (node.hit_count >= 2, node.last_access)
