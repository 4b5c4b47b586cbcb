"""One layer's view of a paged cache: what transformers calls with new keys and values."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from pagedkv.errors import ConfigError
from pagedkv.runtime.forward_plan import ForwardPlan
from pagedkv.runtime.model_layers import WORKS
from pagedkv.runtime.storage import FP8, PagedKVStorage

F = TypeVar("F", bound=Callable[..., Any])
ATTENTION = "pagedkv"
"""Name of the attention function in transformers."""
LAYER_TAG = "pagedkv_layer"
"""Attribute of the keys that `PagedLayer.update` returns: how the attention function, which gets them, finds the cache."""


def uncompiled(function: F) -> F:
    """Let torch.compile leave `function` alone: blocks are given out in Python, and kernels are no torch."""
    return cast("F", torch.compiler.disable(function))


class LayersOwner(Protocol):
    """The cache that a layer belongs to: who holds which blocks."""

    config: Any
    """The model's."""
    storage: PagedKVStorage
    """Where keys and values lie."""
    backend: str
    """Which kernel attends."""

    @property
    def is_forkable(self) -> bool:
        """Whether sequences can share blocks and be cut."""

    def plan_step(self, first_column: int, batch: int, columns: int, attention_mask: torch.Tensor | None) -> ForwardPlan:
        """Return the plan of the forward pass over these columns."""


class PagedLayer(CacheLayerMixin):
    """One layer's view of a cache in blocks.

    `update` only names the layer: new keys and values are written by the attention function, which knows what is padding.
    """

    def __init__(self, cache: LayersOwner, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.begin(0)
        self._place = place = cache.storage.layout.places[index]
        self.group, self.window = place.group, place.window
        self.is_sliding, self.is_croppable, self.is_initialized = self.window is not None, cache.is_forkable, True

    def begin(self, num_columns: int) -> None:
        """Have seen so many columns, and wait for the next."""
        self.num_columns, self._is_unread = num_columns, False

    @uncompiled
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both as they are, the keys tagged with this layer.

        Raises:
            ConfigError: If the model's attention would not read the cache, or did not last time, or the cache was made for other
                keys and values.
        """
        attention = self.cache.config._attn_implementation
        if attention != ATTENTION:
            raise ConfigError(
                f"the model attends by {attention!r}, which cannot read blocks: call use_paged_attention(model) first"
            )
        if self._is_unread:
            raise self._strange("attends in code of its own, past the cache")
        self._check(key_states, value_states)
        self._is_unread = True
        setattr(key_states, LAYER_TAG, self)
        return key_states, value_states

    def read(self) -> None:
        """Note that the attention function has come for what `update` was given.

        Raises:
            ConfigError: If it comes a second time.
        """
        if not self._is_unread:
            raise self._strange("attends twice to what it caches once")
        self._is_unread = False

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **options: Any
    ) -> torch.Tensor:
        """Write new keys and values [batch, num_kv_heads, columns, head_dim], and attend from `query` [batch, num_q_heads, ...].

        Args:
            query: Queries of the new columns.
            key: Their keys.
            value: Their values.
            attention_mask: Which columns hold tokens, those before included [batch, all columns]; None: all of the new ones do.
            options: Keywords of `pagedkv.kernels.paged_attention`.

        Returns:
            [batch, columns, num_q_heads, head_dim], 0 where a column is padding.
        """
        plan = self.cache.plan_step(self.num_columns, key.shape[0], key.shape[2], attention_mask)
        self.write(key, value, plan)
        window = (-1, -1) if self.window is None else (self.window - 1, 0)
        out = self.cache.storage.attend(
            self.index,
            _tokens(query, plan),
            plan.block_tables[self.group],
            plan.cache_seqlens,
            cu_seqlens_q=plan.cu_seqlens_q,
            window_size=window,
            backend=self.cache.backend,
            **options,
        )
        batch, heads, columns, head_dim = query.shape
        if plan.tokens is not None:
            padded = out.new_zeros(batch * columns, heads, head_dim)
            padded[plan.tokens] = out
            out = padded
        return out.view(batch, columns, heads, head_dim)

    def write(self, key: torch.Tensor, value: torch.Tensor, plan: ForwardPlan) -> None:
        """Write the new columns' keys and values to the slots that the plan has for them."""
        storage, new = self.cache.storage, [_tokens(states, plan) for states in (key, value)]
        if storage.dtype != FP8:  # which the storage makes itself, by its scales
            new = [states.to(storage.dtype) for states in new]
        storage.write(self.index, new[0], new[1], plan.slot_mapping[self.group])
        self.num_columns = plan.last_column

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the storage is there from the beginning."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns of the mask, the first one): all, in every layer."""
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns seen, padding included, as transformers counts them."""
        return self.num_columns

    def get_max_length(self) -> int:
        """Return -1: the pool is the limit, not a sequence."""
        return -1

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        place, config = self._place, self.cache.config
        if key.shape[1] == value.shape[1] == place.num_kv_heads and key.shape[3] == value.shape[3] == place.head_dim:
            return
        raise ConfigError(
            f"layer {self.index} has keys of {key.shape[1]} heads of {key.shape[3]} elements and values of {value.shape[1]} of "
            f"{value.shape[3]}; its cache was made for {place.num_kv_heads} heads of {place.head_dim}, by {type(config).__name__}: "
            f"make one by PagedCache of this very model. If it is, what it caches is not what its configuration says. {WORKS}"
        )

    def _strange(self, what: str) -> ConfigError:
        return ConfigError(f"{type(self.cache.config).__name__}: layer {self.index} {what}: {WORKS}")


def _tokens(states: torch.Tensor, plan: ForwardPlan) -> torch.Tensor:
    """Return [batch, heads, columns, head_dim] as [tokens, heads, head_dim], without padding."""
    rows = states.transpose(1, 2).flatten(0, 1)
    return rows if plan.tokens is None else rows[plan.tokens]
