"""What a sequence costs in the KV cache: one description of layers for every kind of attention."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal, get_args

from pagedkv.errors import ConfigError, unknown_name

LayerKind = Literal["full", "sliding_window", "chunked", "mla", "state"]
LAYER_KINDS: tuple[str, ...] = get_args(LayerKind)

INDEX_KEY_ELEMENT_BYTES = 1 + 4 / 128
"""An indexer's key: FP8 with a 32-bit scale per 128 elements, whatever `--kv-cache-dtype`.
Source: vLLM, DeepseekV32IndexerCache, uint8 x (128 + 4)."""

KV_CACHE_DTYPES: Mapping[str, float] = MappingProxyType(
    {
        "auto": 2.0,
        "bfloat16": 2.0,
        "bf16": 2.0,
        "float16": 2.0,
        "fp16": 2.0,
        "f16": 2.0,
        "fp8": 1.0,
        "fp8_e4m3": 1.0,
        "fp8_e5m2": 1.0,
        "q8_0": 34 / 32,
        "q5_1": 24 / 32,
        "q5_0": 22 / 32,
        "q4_1": 20 / 32,
        "q4_0": 18 / 32,
    }
)
"""Bytes per cached element under vLLM's and llama.cpp's names; `auto` is the model's own 16 bits.

Source: llama.cpp, ggml-common.h: a block of 32 elements has a 16-bit scale (`_1`: two) and 8, 5 or 4 bits per element.
"""


@cache
def kv_element_pair_bytes(dtype_name: str) -> tuple[float, float]:
    """Return the bytes of one element of a key and of a value; `q8_0/q4_0` names them apart.

    Raises:
        ConfigError: If `dtype_name` is neither one of `KV_CACHE_DTYPES` nor two of them.
    """
    key_name, _, value_name = dtype_name.lower().partition("/")
    pair = []
    for name in (key_name, value_name if "/" in dtype_name else key_name):
        if name not in KV_CACHE_DTYPES:
            raise unknown_name("--kv-cache-dtype", dtype_name, KV_CACHE_DTYPES, hint="Keys and values may differ, as in q8_0/q4_0.")
        pair.append(KV_CACHE_DTYPES[name])
    return pair[0], pair[1]


def kv_element_bytes(dtype_name: str) -> float:
    """Return the bytes of one cached element, the mean of keys and values.

    Raises:
        ConfigError: As `kv_element_pair_bytes`.
    """
    return sum(kv_element_pair_bytes(dtype_name)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that cache alike. A layer with two caches, such as a window and compressed entries, is in two groups.

    An entry is what the cache holds for `compression` tokens: a key and a value per head, or, where `value_dim` is 0, one
    vector that serves as both (MLA's latent, shared keys and values).
    """

    kind: LayerKind
    """`full` and `mla` attend to every token, `sliding_window` to the last `window`, `chunked` to those since the last
    multiple of `window`, `state` (linear attention, Mamba) to a state of fixed size."""
    num_layers: int
    """Layers that own such a cache."""
    num_kv_heads: int = 0
    """Key and value heads per layer; 0 for `state`."""
    key_dim: int = 0
    """Elements of one key of one head."""
    value_dim: int = 0
    """Elements of one value of one head; 0 where the key is the value."""
    window: int | None = None
    """Tokens of a sliding window, the query's own included, or of a chunk; None for other kinds."""
    compression: int = 1
    """Tokens per entry."""
    index_key_dim: int = 0
    """Elements of the indexer's key of an entry; 0 without an indexer. Every rank has it whole."""
    index_topk: int | None = None
    """Entries that an indexer selects for a query; None: attention reads all."""
    state_bytes: int = 0
    """Bytes per sequence and layer that do not grow with its length."""
    state_heads: int = 1
    """Heads over which tensor parallelism divides the state; 1: every rank has it whole."""
    num_sharing_layers: int = 0
    """More layers that read these caches and own none."""
    attention_dim: int = 0
    """Elements of a query-key product and of a weighted value together, per query head; 0: those of the cache."""

    def __post_init__(self) -> None:
        if self.kind not in LAYER_KINDS:
            raise unknown_name("layer kind", self.kind, LAYER_KINDS)
        if (self.window is None) == (self.kind in ("sliding_window", "chunked")):
            raise ConfigError(f"window {self.window} does not go with kind {self.kind!r}: sliding_window and chunked have one")
        if self.kind == "state" and (self.num_kv_heads or self.key_dim or not self.state_bytes):
            raise ConfigError("a layer group of kind 'state' has state_bytes and neither num_kv_heads nor key_dim")
        positive = ["num_layers", "window", "compression", "index_topk", "state_heads"]
        positive += [] if self.kind == "state" else ["num_kv_heads", "key_dim"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value} of a layer group must be positive")
        for name in ("value_dim", "index_key_dim", "state_bytes", "num_sharing_layers", "attention_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} of a layer group must not be negative")

    @property
    def elements_per_token(self) -> float:
        """Elements of the keys and values of one token in all layers of the group."""
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim) / self.compression

    @property
    def query_dim(self) -> int:
        """Elements that one query head multiplies and adds for one entry."""
        return self.attention_dim or self.key_dim + (self.value_dim or self.key_dim)

    def tokens_kept(self, context: int) -> int:
        """Return how many of `context` tokens the cache must still hold when the last of them is computed."""
        if self.kind == "state":
            return 0
        if self.window is None:
            return context
        if self.kind == "chunked":
            return context - max(context - 1, 0) // self.window * self.window
        return min(context, self.window)

    def tokens_read(self, context: int) -> int:
        """Return how many cached tokens one query attends to when `context` tokens precede and include it."""
        kept = self.tokens_kept(context)
        return kept if self.index_topk is None else min(kept, self.index_topk * self.compression)

    def entry_bytes(self, key_bytes: float, value_bytes: float) -> float:
        """Return the bytes of one entry in one layer but for the indexer's key, from those of an element."""
        return self.num_kv_heads * (self.key_dim * key_bytes + self.value_dim * value_bytes)

    def per_rank(self, tensor_parallel_size: int) -> "LayerGroup":
        """Return the share of one of `tensor_parallel_size` ranks; fewer heads than ranks are replicated.

        Raises:
            ConfigError: If the heads divide neither into nor by the ranks.
        """
        heads = {name: getattr(self, name) for name in ("num_kv_heads", "state_heads")}
        for name, count in heads.items():
            if count > 1 and count % tensor_parallel_size and tensor_parallel_size % count:
                fits = [str(n) for n in range(1, count + 1) if count % n == 0]
                raise ConfigError(
                    f"tensor-parallel-size {tensor_parallel_size} does not divide {count} {name}: use {', '.join(fits)}"
                )
        parts = min(self.state_heads, tensor_parallel_size)
        return replace(
            self,
            num_kv_heads=-(-self.num_kv_heads // tensor_parallel_size),
            state_heads=self.state_heads // parts,
            state_bytes=-(-self.state_bytes // parts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The KV cache of a model, or of one rank of it, in one pair of element types."""

    groups: tuple[LayerGroup, ...]
    """All caches of the model."""
    dtype_name: str
    """Name of the element type, a key of `KV_CACHE_DTYPES` or two of them."""

    @property
    def bytes_per_element(self) -> float:
        """Bytes of one element, scales included, the mean of keys and values."""
        return kv_element_bytes(self.dtype_name)

    @property
    def group_bytes_per_token(self) -> tuple[float, ...]:
        """Bytes of one token in each group if it keeps every token, in the order of `groups`."""
        pair = kv_element_pair_bytes(self.dtype_name)
        return tuple(
            g.num_layers * (g.entry_bytes(*pair) + g.index_key_dim * INDEX_KEY_ELEMENT_BYTES) / g.compression for g in self.groups
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token when every layer keeps every token."""
        return math.ceil(sum(self.group_bytes_per_token))

    @property
    def state_bytes_per_sequence(self) -> int:
        """Bytes of a sequence that do not depend on its length."""
        return sum(group.num_layers * group.state_bytes for group in self.groups)

    @property
    def longest_window(self) -> int:
        """Tokens of the longest window of its layers; 0 if they have none."""
        return max(group.window or 0 for group in self.groups)

    def apart(self) -> "tuple[KVCacheSpec, KVCacheSpec | None]":
        """Return what grows with a sequence, and the layers with a window; None where there are none, or nothing grows beside."""
        windows = tuple(group for group in self.groups if group.window is not None)
        rest = tuple(group for group in self.groups if group.window is None)
        if not windows or not any(group.elements_per_token for group in rest):
            return self, None
        return replace(self, groups=rest), replace(self, groups=windows)

    def per_rank(self, tensor_parallel_size: int) -> "KVCacheSpec":
        """Return the cache of one of `tensor_parallel_size` ranks.

        Raises:
            ConfigError: If it is below 1 or does not divide the heads.
        """
        if tensor_parallel_size < 1:
            raise ConfigError(f"tensor-parallel-size {tensor_parallel_size} must be 1 or more")
        return replace(self, groups=tuple(group.per_rank(tensor_parallel_size) for group in self.groups))

    def kv_bytes_per_token(self, tensor_parallel_size: int = 1) -> int:
        """Return the bytes of one token on each of `tensor_parallel_size` ranks.

        Raises:
            ConfigError: As `per_rank`.
        """
        return self.per_rank(tensor_parallel_size).bytes_per_token

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of a block of `block_size` tokens in all layers."""
        return math.ceil(block_size * sum(self.group_bytes_per_token))

    def sequence_bytes(self, context: int) -> int:
        """Return the bytes that a sequence of `context` tokens needs: windows respected, states included, blocks not rounded."""
        pairs = zip(self.groups, self.group_bytes_per_token, strict=True)
        # An entry under construction takes its place: whole groups of `compression` tokens.
        tokens = (-(-group.tokens_kept(context) // group.compression) * group.compression * per_token for group, per_token in pairs)
        return math.ceil(sum(tokens)) + self.state_bytes_per_sequence

    def bytes_read(self, context: int) -> float:
        """Return the bytes that one decode step reads for a sequence of `context` tokens.

        Windows and an indexer's selection are respected; all its keys are read, and so are states.
        """
        pair, total = kv_element_pair_bytes(self.dtype_name), 0.0
        for group in self.groups:
            layers = group.num_layers + group.num_sharing_layers
            total += layers * group.entry_bytes(*pair) * group.tokens_read(context) / group.compression
            total += (
                group.num_layers * group.index_key_dim * INDEX_KEY_ELEMENT_BYTES * group.tokens_kept(context) / group.compression
            )
            total += group.num_layers * group.state_bytes
        return total
