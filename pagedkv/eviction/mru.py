"""Most recently used first."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("mru")
def mru(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by last use, newest first."""
    return (-node.last_access,)
