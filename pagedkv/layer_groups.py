"""How the layers of a hybrid model share one pool: groups of equally many layers, whose blocks all have the same bytes.

A block of the pool is a page: memory for `layers_per_group` layers. It serves whichever group takes it, since the pages of all
groups are alike. What that costs: layers that only fill a group up, and pages larger than what a layer stores in them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pagedkv.errors import ConfigError
from pagedkv.group_rules import GroupRule
from pagedkv.kv_spec import KVCacheSpec, LayerGroup, LayerKind

_FEW_MORE_LAYERS = 1.5
"""If the most frequent kind has fewer than this many times the layers of the rarest, each kind is one group, filled up to the
largest. Source: vLLM, kv_cache_utils.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers with one block table. The bytes are those of one page."""

    kind: LayerKind
    """What they keep: see `GroupRule`."""
    window: int | None
    """Tokens of a window or chunk; None for other kinds."""
    num_layers: int
    """Layers, those that only fill the group up not included."""
    block_size: int
    """Tokens per page; for `state`, from one state kept for reuse to the next."""
    used_bytes: int
    """Bytes that hold keys, values or states when the page is full."""
    padding_layer_bytes: int
    """Bytes for layers that only fill the group up."""
    inflation_bytes: int
    """Bytes that its layers cannot use, because other layers need larger pages."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, the same for all groups of a plan."""
        return self.used_bytes + self.padding_layer_bytes + self.inflation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroupPlan:
    """The groups of a model."""

    groups: tuple[CacheGroup, ...]
    """Every group: layers of one kind in as many groups as it takes."""
    layers_per_group: int
    """Layers that a page has room for."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one block of the pool."""
        return self.groups[0].page_bytes

    @property
    def block_size(self) -> int:
        """Tokens per page of the group with the most."""
        return max(group.block_size for group in self.groups)

    @property
    def padding_layer_bytes(self) -> int:
        """Bytes lost to layers that fill groups up, in one page of each group."""
        return sum(group.padding_layer_bytes for group in self.groups)

    @property
    def inflation_bytes(self) -> int:
        """Bytes lost to the larger pages of other layers, in one page of each group."""
        return sum(group.inflation_bytes for group in self.groups)

    @property
    def wasted_share(self) -> float:
        """Share of the bytes lost to both, in one page of each group."""
        return (self.padding_layer_bytes + self.inflation_bytes) / (len(self.groups) * self.page_bytes)

    def rules(self, *, max_model_len: int, enable_caching: bool) -> tuple[GroupRule, ...]:
        """Return what each group keeps: of states the last block boundary's with caching (vLLM's "align"), else one per request."""
        sizes = [max_model_len if g.kind == "state" and not enable_caching else g.block_size for g in self.groups]
        return tuple(GroupRule(kind=g.kind, block_size=size, window=g.window) for g, size in zip(self.groups, sizes, strict=True))


class _Cache(NamedTuple):
    """What some layers cache alike."""

    kind: LayerKind
    window: int | None
    token_bytes: float
    """Bytes of a token in one layer; 0 for `state`."""
    state_bytes: int
    """Bytes of a state in one layer; 0 for other kinds."""

    def page_bytes(self, block_size: int) -> int:
        """Bytes of a block of one layer."""
        return self.state_bytes or math.ceil(self.token_bytes * block_size)


def plan_layer_groups(layers: Sequence[LayerGroup], *, block_size: int, kv_cache_dtype: str = "auto") -> LayerGroupPlan:
    """Divide the caches of a model, or of one rank of it, into groups with pages of one size, as vLLM does.

    * Layers that read another layer's cache have none of their own, and so no page.
    * If all keep the same (all tokens, MLA's included, or one window), they are one group; a page is the sum of theirs.
    * State layers need a page that holds a state: the block of attention layers becomes as many times longer as it takes, and the
      page of the state is filled up to it.
    * A kind with a smaller page takes longer blocks if its page divides the largest one; else it leaves the rest of a page unused.
    * Each kind is split into groups of as many layers as the rarest kind has, the last ones filled up; but into one group each,
      filled up to the largest, if the most frequent has less than 1.5 times as many.

    Models whose attention layers differ much in bytes per token and have states as well (DeepSeek-V4) fit these rules badly, as
    `wasted_share` tells; vLLM groups that family in a way of its own.

    Example:
        >>> attention = LayerGroup(kind="full", num_layers=12, num_kv_heads=2, key_dim=256, value_dim=256)
        >>> plan = plan_layer_groups([attention, LayerGroup(kind="state", num_layers=36, state_bytes=1_097_728)], block_size=16)
        >>> [(group.kind, group.num_layers, group.block_size) for group in plan.groups]
        [('full', 12, 544), ('state', 12, 544), ('state', 12, 544), ('state', 12, 544)]

    Args:
        layers: What the layers cache. A group of attention layers with `state_bytes` has both caches.
        block_size: Tokens per block, where nothing asks for longer ones.
        kv_cache_dtype: A name or two of `KV_CACHE_DTYPES`.

    Raises:
        ConfigError: If there is no layer, or no such element type.
    """
    caches = _caches(layers, kv_cache_dtype)
    unit = math.lcm(block_size, *(group.compression for group in layers))
    if not caches or block_size < 1:
        raise ConfigError(f"{len(caches)} kinds of caches, block size {block_size}: needs 1 or more of both")
    if len({(cache.kind, cache.window) for cache in caches}) == 1:
        used = sum(num_layers * cache.page_bytes(unit) for cache, num_layers in caches.items())
        first, num_layers = next(iter(caches)), sum(caches.values())
        return LayerGroupPlan(groups=(_group(first, num_layers, unit, used, 0, 0),), layers_per_group=num_layers)

    state_bytes = max(cache.state_bytes for cache in caches)
    block = unit * max(1, math.ceil(state_bytes / (unit * max(cache.token_bytes for cache in caches))))
    page = max(cache.page_bytes(block) for cache in caches)
    rarest, most = min(caches.values()), max(caches.values())
    width = most if most < rarest * _FEW_MORE_LAYERS else rarest
    groups = []
    for cache, num_layers in caches.items():
        own = cache.page_bytes(block)
        times = page // own if cache.kind != "state" and page % own == 0 else 1
        num_groups = -(-num_layers // width)
        for i in range(num_groups):
            members = len(range(i, num_layers, num_groups))
            padding, inflation = (width - members) * page, members * (page - own * times)
            groups.append(_group(cache, members, block * times, members * own * times, padding, inflation))
    return LayerGroupPlan(groups=tuple(groups), layers_per_group=width)


def groups_differ(layers: Sequence[LayerGroup]) -> bool:
    """Return whether a model has layers that need not keep all tokens, by rules that `plan_layer_groups` knows.

    Not DeepSeek-V4's, whose compressed layers vLLM groups in a way of its own.
    """
    return any(group.kind in ("sliding_window", "chunked", "state") or group.state_bytes for group in layers) and all(
        group.compression == 1 for group in layers
    )


def _group(cache: _Cache, num_layers: int, block_size: int, used: int, padding: int, inflation: int) -> CacheGroup:
    return CacheGroup(
        kind=cache.kind,
        window=cache.window,
        num_layers=num_layers,
        block_size=block_size,
        used_bytes=used,
        padding_layer_bytes=padding,
        inflation_bytes=inflation,
    )


def _caches(layers: Sequence[LayerGroup], kv_cache_dtype: str) -> dict[_Cache, int]:
    """Return the layers by cache: all caches of one kind and size together, those that grow with the tokens first."""
    caches: dict[_Cache, int] = {}
    token_bytes = KVCacheSpec(groups=tuple(layers), dtype_name=kv_cache_dtype).group_bytes_per_token
    for group, size in zip(layers, token_bytes, strict=True):
        if group.kind != "state":
            kind: LayerKind = "full" if group.kind == "mla" else group.kind
            cache = _Cache(kind, group.window, size / group.num_layers, 0)
            caches[cache] = caches.get(cache, 0) + group.num_layers
    for group in layers:
        if group.state_bytes:
            state = _Cache("state", None, 0.0, group.state_bytes)
            caches[state] = caches.get(state, 0) + group.num_layers
    return caches
