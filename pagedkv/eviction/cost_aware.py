"""Cheapest to lose first: what it costs to compute a run again, per byte, times how often it was used.

GreedyDual-Size with frequency: key = L + uses * cost / size, where L is the highest key evicted when the run was last used. So what
is not used any more is overtaken in the end, however dear it is. All tokens have keys and values of one size, so a cost per token
ranks as a cost per byte does. A cache that leaves `inflation` at 0 does not age what it keeps.

Source: P. Cao and S. Irani, Cost-Aware WWW Proxy Caching Algorithms, USITS 1997; uses as a factor: L. Cherkasova, Improving WWW
Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HP Laboratories 1998.
"""

from pagedkv.eviction import EVICTION_POLICIES, EvictionCandidate, EvictionSettings


@EVICTION_POLICIES.register("cost-aware")
def cost_aware(node: EvictionCandidate, settings: EvictionSettings) -> tuple[float, ...]:
    """Rank by the cost that keeping a token of the run saves, then last use.

    A token attends to all before it, so its cost grows with its depth; that of a run's middle is the mean.
    """
    middle = node.depth - node.num_tokens / 2
    cost_per_token = settings.linear_cost + settings.attention_cost_per_token * middle
    return (node.inflation + node.hit_count * cost_per_token, node.last_access)
