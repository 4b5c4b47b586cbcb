"""Which cached prefix goes first: one key function per policy, one file each. The candidate with the lowest key is evicted.

Source: SGLang 0.5.23 offers lru, lfu, slru, priority and tlru on its command line, and fifo, filo and mru in its classes.
TensorRT-LLM's is retention. Cost-aware is GreedyDual-Size.
"""

import math
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
    expired: bool
    """Whether the time for which its priority was given is over."""
    inflation: float
    """The highest rank evicted so far (first number of its key), as it was when this run was last used."""

    @property
    def num_tokens(self) -> int:
        """Tokens in this run."""


@dataclass(slots=True, kw_only=True)
class PlainCandidate:
    """An `EvictionCandidate` of fields alone, for who keeps no tree; what he does not know is 0."""

    num_tokens: int = 0
    last_access: float = 0
    created: float = 0
    hit_count: int = 0
    priority: int = 0
    depth: int = 0
    deepest: int = 0
    expired: bool = False
    inflation: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionSettings:
    """What policies need to be told.

    Raises:
        ConfigError: If a number is negative, or not finite where it must be.
    """

    threshold: int = 0
    """For tlru: tokens that the next turn of a conversation may recompute and still be in time. With both zero, tlru is lru."""
    next_prompt_estimate: int = 0
    """For tlru: tokens that the next turn is expected to add."""
    linear_cost: float = 1.0
    """For cost-aware: what computing a token costs wherever it stands (about 2 FLOPs per active parameter), in any unit."""
    attention_cost_per_token: float = 3.3e-5
    """For cost-aware: what each token before it adds, in the same unit (4 FLOPs per layer, head and head dimension). The default
    is Llama-3.1-8B's: 4 * 32 * 4096 / (2 * 8.03e9), so that attention costs as much as all else at 30,000 tokens."""
    priority_lifetime: float = math.inf
    """For retention: how long a priority counts once nobody holds the run, in readings of the cache's counter."""

    def __post_init__(self) -> None:
        for name in ("threshold", "next_prompt_estimate"):
            if (tokens := getattr(self, name)) < 0:
                raise ConfigError(f"eviction {name} is {tokens} tokens: it must be 0 or more")
        for name in ("linear_cost", "attention_cost_per_token"):
            if not 0 <= (cost := getattr(self, name)) < math.inf:
                raise ConfigError(f"eviction {name} is {cost}: it must be 0 or more, and finite")
        if not self.priority_lifetime >= 0:
            raise ConfigError(f"eviction priority_lifetime is {self.priority_lifetime}: it must be 0 or more; inf is for ever")


EvictionKey: TypeAlias = Callable[[EvictionCandidate, EvictionSettings], tuple[float, ...]]
"""Return the rank of a candidate; the lowest is evicted first."""

EVICTION_POLICIES: Registry[EvictionKey] = Registry(__name__, kind="eviction policy")
