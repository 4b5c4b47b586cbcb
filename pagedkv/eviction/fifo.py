"""First in, first out."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("fifo")
def fifo(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by creation."""
    return (node.created,)
