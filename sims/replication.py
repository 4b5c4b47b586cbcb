"""How many replicas of a deployment there are, how a router spreads requests over them, and when they die: resolved settings."""

from dataclasses import dataclass

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.faults import Fault, parse_faults
from pagedkv.sims.routing import DEFAULT_ROUTING, ROUTING

MOST_REPLICAS = 1000
"""More is a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replication:
    """What stands behind the router."""

    num_replicas: int
    routing: str
    """Name of the policy."""
    faults: tuple[Fault, ...]
    """By time."""

    @property
    def is_fleet(self) -> bool:
        """Whether there is more to it than one engine that lives as long as the run."""
        return self.num_replicas > 1 or bool(self.faults)


def replication(serving: ServingConfig, *, end_s: float | None) -> Replication:
    """Return what `serving` asks for in a run that ends at `end_s`; None: with its last request.

    Raises:
        ConfigError: For what cannot be, with what can.
    """
    if not 1 <= serving.replicas <= MOST_REPLICAS:
        raise ConfigError(f"--replicas is {serving.replicas}: needs 1 to {MOST_REPLICAS:,}")
    if serving.routing is not None:
        if serving.routing not in ROUTING.names():
            raise unknown_name("routing", serving.routing, ROUTING.names())
        if serving.replicas == 1:
            raise ConfigError(f"--routing {serving.routing} goes with --replicas 2 or more: one replica leaves no choice")
    return Replication(
        num_replicas=serving.replicas,
        routing=serving.routing or DEFAULT_ROUTING,
        faults=parse_faults(serving.fault, num_replicas=serving.replicas, end_s=end_s),
    )
