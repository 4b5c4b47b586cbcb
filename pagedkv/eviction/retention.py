"""TensorRT-LLM's: lowest priority first, but a priority counts only for a time; among equals, the least recently used."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings

DEFAULT_PRIORITY = 35
"""What a priority, 0 (goes first) to 100, becomes when its time is over. TensorRT-LLM also gives it to requests that name none.

Source: TensorRT-LLM's KvCacheRetentionConfig.
"""


@EVICTION_POLICIES.register("retention")
def retention(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by the priority that counts now, then last use."""
    return (DEFAULT_PRIORITY if node.expired else node.priority, node.last_access)
