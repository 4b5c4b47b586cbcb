"""One replica after the other, whatever they hold: no state of theirs is needed."""

from collections.abc import Sequence

from pagedkv.scheduling.content import Segments
from pagedkv.sims.routing import ROUTING, ReplicaState, up_from


@ROUTING.register("round-robin")
class RoundRobin:
    """Takes turns; whoever is down is passed over."""

    def __init__(self, num_replicas: int) -> None:
        del num_replicas
        self._next = 0

    def choose(self, replicas: Sequence[ReplicaState], content: Segments) -> int:
        """Return the next replica that is up. O(replicas)."""
        del content
        chosen = next(up_from(replicas, self._next))
        self._next = chosen + 1
        return chosen
