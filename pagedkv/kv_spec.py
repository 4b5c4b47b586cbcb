"""What one token costs in the KV cache, layer group by layer group."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pagedkv.errors import ConfigError, unknown_name

LayerKind = Literal["full", "sliding_window"]

KV_CACHE_DTYPES: Mapping[str, float] = MappingProxyType(
    {
        "auto": 2.0,
        "bfloat16": 2.0,
        "bf16": 2.0,
        "float16": 2.0,
        "fp16": 2.0,
        "fp8": 1.0,
        "fp8_e4m3": 1.0,
        "fp8_e5m2": 1.0,
    }
)
"""Bytes per cached element under vLLM's names for `--kv-cache-dtype`; `auto` is the model's own 16 bits."""


def kv_element_bytes(dtype_name: str) -> float:
    """Return the bytes of one cached element.

    Raises:
        ConfigError: If `dtype_name` is none of `KV_CACHE_DTYPES`.
    """
    try:
        return KV_CACHE_DTYPES[dtype_name.lower()]
    except KeyError:
        raise unknown_name("--kv-cache-dtype", dtype_name, KV_CACHE_DTYPES) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Attention layers that cache alike."""

    kind: LayerKind
    """`full` reads every token of the context, `sliding_window` only the last `window`."""
    num_layers: int
    """Layers in the group."""
    num_kv_heads: int
    """Key and value heads per layer."""
    key_dim: int
    """Elements of one key of one head."""
    value_dim: int
    """Elements of one value of one head."""
    window: int | None = None
    """Tokens that a sliding-window layer attends to, itself included; None for full attention."""

    def __post_init__(self) -> None:
        if self.kind not in ("full", "sliding_window"):
            raise unknown_name("layer kind", self.kind, ("full", "sliding_window"))
        if (self.window is None) == (self.kind == "sliding_window"):
            raise ConfigError(f"window {self.window} does not go with kind {self.kind!r}: sliding_window alone has one")
        for name in ("num_layers", "num_kv_heads", "key_dim", "value_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value} of a layer group must be positive")

    @property
    def elements_per_token(self) -> int:
        """Keys and values of one token in all layers of the group."""
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim)

    def tokens_read(self, context: int) -> int:
        """Return how many cached tokens one query attends to when `context` tokens precede and include it."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The KV cache of a model in one element type."""

    groups: tuple[LayerGroup, ...]
    """All attention layers of the model."""
    dtype_name: str
    """vLLM's name of the element type, a key of `KV_CACHE_DTYPES`."""
    bytes_per_element: float
    """Bytes of one element, scales included."""

    @property
    def group_bytes_per_token(self) -> tuple[float, ...]:
        """Bytes of one token in each group, in the order of `groups`."""
        return tuple(group.elements_per_token * self.bytes_per_element for group in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token when every layer keeps every token."""
        return math.ceil(sum(self.group_bytes_per_token))

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of a block of `block_size` tokens in all layers."""
        return math.ceil(block_size * sum(self.group_bytes_per_token))

    def bytes_read(self, context: int) -> float:
        """Return the bytes that one decode step reads for a sequence of `context` tokens, windows respected."""
        pairs = zip(self.groups, self.group_bytes_per_token, strict=True)
        return sum((group.tokens_read(context) * per_token for group, per_token in pairs), start=0.0)
