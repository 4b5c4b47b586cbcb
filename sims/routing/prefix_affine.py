"""Requests that begin alike go to one replica, whose prefix cache then holds their beginning once, unless it is far busier.

Source: the policy `cache_aware`, the default of the vLLM router 0.1.15 and of the SGLang gateway 0.3.1, whose fork that is
(blog.vllm.ai/2025/12/13/vllm-router-release.html; with its defaults in GPUStack's "Model Deployment Routing", docs.gpustack.ai):
the longest common prefix decides, unless the busiest replica has over 64 requests more than the idlest and over 1.5 times as many;
then the least loaded one is taken. Here the home of a prefix is compared with the idlest, so that the others keep their homes.
"""

from collections.abc import Sequence

from pagedkv.scheduling.content import Segments
from pagedkv.sims.routing import ROUTING, ReplicaState
from pagedkv.sims.routing.least_loaded import LeastLoaded

BALANCE_ABS_THRESHOLD = 64
"""Requests more than the least loaded replica has that are put up with. Source: their --balance-abs-threshold."""
BALANCE_REL_THRESHOLD = 1.5
"""Times as many that are put up with. Source: their --balance-rel-threshold; both must be exceeded."""


@ROUTING.register("prefix-affine")
class PrefixAffine:
    """Gives every first segment a home: the replica that was least loaded when it first came.

    A request goes to the home of its first segment. If that is down, another becomes the home for good: the old one comes back
    with nothing in its cache. If it has over 64 requests more than the least loaded replica, and over 1.5 times as many, the
    request goes to that one, and the home stays. Requests that share nothing go to the least loaded replica.
    """

    def __init__(self, num_replicas: int) -> None:
        self._least_loaded = LeastLoaded(num_replicas)
        self._homes: dict[tuple[int, int], int] = {}

    def choose(self, replicas: Sequence[ReplicaState], content: Segments) -> int:
        """Return the home of the request's first segment, or the least loaded replica. O(replicas); remembers every segment."""
        if not content.size:
            return self._least_loaded.choose(replicas, content)
        key = int(content["word_a"][0]), int(content["word_b"][0])
        home = self._homes.get(key)
        if home is None or not replicas[home].up:
            home = self._homes[key] = self._least_loaded.choose(replicas, content)
            return home
        fewest = min(state.num_requests for state in replicas if state.up)
        load = replicas[home].num_requests
        if load - fewest > BALANCE_ABS_THRESHOLD and load > BALANCE_REL_THRESHOLD * fewest:
            return self._least_loaded.choose(replicas, content)
        return home
