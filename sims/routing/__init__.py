"""How a router spreads requests over replicas of one deployment: one file per policy, chosen with `--routing`."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from pagedkv.registry import Registry
from pagedkv.scheduling.content import Segments


class ReplicaState(NamedTuple):
    """What a router sees of a replica at the moment at which a request arrives."""

    up: bool
    """Whether its process runs."""
    num_requests: int
    """Running and waiting ones; 0 if it is down."""


class RoutingPolicy(Protocol):
    """Chooses a replica for each request, in order of arrival. It may remember what it chose; it has no clock and no dice."""

    def choose(self, replicas: Sequence[ReplicaState], content: Segments) -> int:
        """Return the index of a replica that is up; one at least is.

        Args:
            replicas: All of them, in the same order every time.
            content: What the request shares with others, empty if nothing.
        """


RoutingFactory: TypeAlias = Callable[[int], RoutingPolicy]
"""Makes a policy for so many replicas."""

ROUTING: Registry[RoutingFactory] = Registry(__name__, kind="routing")
DEFAULT_ROUTING = "round-robin"


def up_from(replicas: Sequence[ReplicaState], first: int) -> Iterator[int]:
    """Yield the indices of the replicas that are up, in turn, beginning at `first` (modulo their number)."""
    for i in range(first, first + len(replicas)):
        if replicas[i % len(replicas)].up:
            yield i % len(replicas)
