"""Which cached prefix goes first: one key function per policy, one file each. The candidate with the lowest key is evicted.

Source: SGLang 0.5.23, which offers lru, lfu, slru, priority and tlru on its command line and the others in its classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pagedkv.errors import ConfigError
from pagedkv.registry import Registry


class EvictionCandidate(Protocol):
    """What a policy may know of a run of cached tokens. Times are readings of the cache's counter: only their order counts."""

    last_access: float
    """When it was last used."""
    created: float
    """When it came into being."""
    hit_count: int
    """How many insertions went through it."""
    priority: int
    """The highest priority among the requests that stored it."""
    depth: int
    """Tokens from the beginning of the sequence to the end of this run."""
    deepest: int
    """The largest depth ever stored at or below this run: the length of the longest known continuation."""

    @property
    def num_tokens(self) -> int:
        """Tokens in this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionSettings:
    """What a policy needs to be told. Only `tlru` needs anything; with zeros it is lru.

    Raises:
        ConfigError: If a number is negative.
    """

    threshold: int = 0
    """Tokens that the next turn of a conversation may recompute and still be in time."""
    next_prompt_estimate: int = 0
    """Tokens that the next turn is expected to add."""

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), ("next_prompt_estimate", self.next_prompt_estimate)):
            if value < 0:
                raise ConfigError(f"eviction {name} is {value} tokens: it must be 0 or more")


EvictionKey: TypeAlias = Callable[[EvictionCandidate, EvictionSettings], tuple[float, ...]]
"""Return the rank of a candidate; the lowest is evicted first."""

EVICTION_POLICIES: Registry[EvictionKey] = Registry(__name__, kind="eviction policy")
