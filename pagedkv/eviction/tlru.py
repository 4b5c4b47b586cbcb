"""Tail-optimised lru: first what a conversation's next turn could lose and still be in time, then by last use."""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("tlru")
def tlru(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by whether the next turn needs the run, then by last use.

    The next turn has about deepest + next_prompt_estimate tokens, of which all but `threshold` must come from the cache.
    """
    needed = max(node.deepest + settings.next_prompt_estimate - settings.threshold, 0)
    return (node.depth - node.num_tokens < needed, node.last_access)
