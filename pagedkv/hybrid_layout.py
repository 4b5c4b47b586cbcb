"""How a pool is divided among groups of layers: what each keeps in it, and how long its blocks are."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.group_rules import GroupRule
from pagedkv.layer_groups import plan_layer_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridLayout:
    """Groups whose blocks are all of one pool. Those with slots for tokens come first."""

    rules: tuple[GroupRule, ...]
    """What each group keeps; the last `num_state_blocks` of them a state per request, in one block."""
    num_state_blocks: int
    """Blocks that each request takes for state of fixed size."""
    unit_slots: int
    """Slots in a block: tokens of the group with the longest blocks. Blocks of other groups leave some unused."""

    @property
    def token_rules(self) -> tuple[GroupRule, ...]:
        """Rules of the groups with slots of their own."""
        return self.rules[: len(self.rules) - self.num_state_blocks]

    @property
    def alignment(self) -> int:
        """Tokens of which every hit is a multiple: all groups have a block that ends there."""
        return math.lcm(*(rule.block_size for rule in self.rules))

    def peak_blocks(self, num_tokens: int, max_new_tokens: int) -> int:
        """Return the most blocks that a request of up to `num_tokens` holds at once, in all groups: `GroupRule.peak_blocks`."""
        return sum(rule.peak_blocks(num_tokens, max_new_tokens) for rule in self.rules)

    def most_tokens(self, num_blocks: int, max_new_tokens: int, max_model_len: int) -> int:
        """Return the longest request, up to `max_model_len` tokens, that `num_blocks` blocks hold: by bisection."""
        lengths = range(1, max_model_len + 1)
        return bisect_right(lengths, num_blocks, key=lambda length: self.peak_blocks(length, max_new_tokens))


def hybrid_layout(settings: KVPoolSettings) -> HybridLayout:
    """Return how the pool of `settings` is divided among its layer groups.

    Raises:
        ConfigError: If there are no layer groups, or both they and `state_slots` tell of state.
    """
    if not settings.layer_groups:
        raise ConfigError(
            "hybrid has no layer-groups to give blocks to: needs those of the model, ModelSpec.layer_groups; for a model of which "
            "nothing but its tokens is known, use paged"
        )
    plan = plan_layer_groups(settings.layer_groups, block_size=settings.block_size, kv_cache_dtype=settings.kv_cache_dtype)
    if settings.state_slots and any(group.kind == "state" for group in plan.groups):
        raise ConfigError(f"state_slots is {settings.state_slots}, but layer_groups have the state layers already: needs 0")
    longest = settings.max_model_len
    rules = plan.rules(max_model_len=longest, enable_caching=settings.enable_prefix_caching)
    sizes = [rule.block_size for rule in rules if rule.kind != "state" or rule.block_size < longest]
    unit_slots = max(sizes, default=settings.block_size)
    rules += (GroupRule(kind="state", block_size=longest),) * -(-settings.state_slots // unit_slots)
    return HybridLayout(rules=rules, num_state_blocks=len(rules) - len(sizes), unit_slots=unit_slots)
