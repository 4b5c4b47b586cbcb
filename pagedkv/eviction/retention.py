"""TensorRT-LLM's: lowest priority first, but a priority counts only for a time; among equals, the least recently used."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings
from pagedkv.retention import DEFAULT_PRIORITY


@EVICTION_POLICIES.register("retention")
def retention(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by the priority that counts now, then last use."""
    return (DEFAULT_PRIORITY if node.expired else node.priority, node.last_access)
