"""First in, last out: the newest goes first."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("filo")
def filo(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by creation, newest first."""
    return (-node.created,)
