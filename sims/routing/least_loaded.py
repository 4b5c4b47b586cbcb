"""The replica with the fewest requests, running and waiting, as routers count those in flight."""

from collections.abc import Sequence

from pagedkv.scheduling.content import Segments
from pagedkv.sims.routing import ROUTING, ReplicaState, up_from


@ROUTING.register("least-loaded")
class LeastLoaded:
    """Takes the replica with the fewest requests; among equals, the next in turn, so that idle ones share the work."""

    def __init__(self, num_replicas: int) -> None:
        del num_replicas
        self._next = 0

    def choose(self, replicas: Sequence[ReplicaState], content: Segments) -> int:
        """Return the replica with the fewest requests. O(replicas)."""
        del content
        chosen = min(up_from(replicas, self._next), key=lambda i: replicas[i].num_requests)
        self._next = chosen + 1
        return chosen
