"""A cache for transformers whose keys and values lie in blocks of a real allocator."""

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from pagedkv.allocation import Forkable, KVPoolSettings
from pagedkv.allocators.hybrid import HybridAllocator
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.arrays import BoolArray
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.runtime.batch_sequences import BatchSequences
from pagedkv.runtime.forward_plan import ForwardPlan
from pagedkv.runtime.model_layers import model_layers
from pagedkv.runtime.paged_layer import PagedLayer
from pagedkv.runtime.storage import PagedKVStorage
from pagedkv.runtime.storage_layout import plan_storage


class PagedCache(Cache):
    """Keys and values of a batch of sequences, in blocks that are taken as tokens come. Padding takes no room.

    For `model.generate(..., past_key_values=PagedCache(model, num_blocks=...))`, after `use_paged_attention(model)`. A cache goes
    on where it was, as others of transformers do: `reset()` frees all.

    Two allocators: `hybrid` gives layers with a sliding window block tables of their own, whose blocks return to the pool once they
    are out of the window; `paged` has one table for all layers, and can be forked (beam search) and cropped (assisted generation).
    """

    def __init__(
        self,
        model: Any,
        *,
        num_blocks: int | None = None,
        budget_bytes: int | None = None,
        block_size: int = 16,
        dtype: torch.dtype | str | None = None,
        allocator: str = "auto",
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        kv_layout: str = "NHD",
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        backend: str = "auto",
    ) -> None:
        """Take the memory.

        Args:
            model: A model of transformers; its configuration says what layers cache, its weights which type, and where.
            num_blocks: Blocks of the pool, of which one is never used; or else `budget_bytes`.
            budget_bytes: Take as many blocks as fit into so many bytes.
            block_size: Tokens per block.
            dtype: Element type, see `PagedKVStorage`; None: the model's.
            allocator: "paged", "hybrid", or "auto": "hybrid" if some layers have a window, else "paged".
            max_num_seqs: Most sequences in a batch.
            max_model_len: Most tokens of a sequence; None: as many as the pool holds, or, where all layers have windows, the model
                takes.
            kv_layout: "NHD" or "HND".
            k_scale: Scale of keys in fp8.
            v_scale: Scale of values in fp8.
            backend: Which kernel attends, see `pagedkv.kernels.paged_attention`.

        Raises:
            ConfigError: If the model is not supported, or numbers cannot be: with what would work.
        """
        self.config, self.backend = model.config, backend
        layers = model_layers(self.config)
        names = ("auto", "paged", "hybrid")
        if allocator not in names:
            raise unknown_name("allocator of a PagedCache", allocator, names)
        windows = any(layer.window is not None for layer in layers)
        hybrid = windows if allocator == "auto" else allocator == "hybrid"
        layout = plan_storage(layers, block_size=block_size, share_windows=hybrid)
        self.storage = PagedKVStorage(
            layout,
            num_blocks=num_blocks,
            budget_bytes=budget_bytes,
            dtype=model.dtype if dtype is None else dtype,
            device=model.device,
            kv_layout=kv_layout,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        room = (self.storage.num_blocks - 1) * max(layout.block_sizes)
        if hybrid and all(layer.window is not None for layer in layers):
            room = max(room, self.config.max_position_embeddings)
        settings = KVPoolSettings(
            num_blocks=self.storage.num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=room if max_model_len is None else max_model_len,
            layer_groups=layers,
        )
        self.allocator: PagedAllocator | HybridAllocator = HybridAllocator(settings) if hybrid else PagedAllocator(settings)
        self.sequences = BatchSequences(self.storage, self.allocator)
        self.peak_blocks_held = 0
        """Most blocks that sequences held at once, since the beginning."""
        self._plan: ForwardPlan | None = None
        super().__init__(layers=[PagedLayer(self, index) for index in range(len(layers))])

    @property
    def is_forkable(self) -> bool:
        """Whether sequences can share blocks and be cut, as beam search and assisted generation ask."""
        return isinstance(self.allocator, Forkable)

    @property
    def num_blocks_held(self) -> int:
        """Blocks that sequences hold now; a shared one counts once."""
        return self.storage.num_blocks - 1 - self.allocator.manager.num_free_blocks

    @property
    def num_bytes_held(self) -> int:
        """Bytes of those blocks."""
        return self.num_blocks_held * self.storage.block_bytes

    def plan_step(self, first_column: int, batch: int, columns: int, attention_mask: torch.Tensor | None) -> ForwardPlan:
        """Return the plan of the forward pass over these columns; the first layer that asks gets their tokens slots.

        Raises:
            ConfigError: If the pool is too small, or the mask contradicts what is stored: see `BatchSequences.extend`.
        """
        plan = self._plan
        if plan is None or (plan.first_column, plan.last_column) != (first_column, first_column + columns):
            self.sequences.open(batch)
            plan = self._plan = self.sequences.extend(self._new_columns(first_column, columns, attention_mask))
            self.peak_blocks_held = max(self.peak_blocks_held, self.num_blocks_held)
        return plan

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See `PagedLayer.update`."""
        if layer_idx >= len(self.layers):
            raise ConfigError(
                f"layer {layer_idx} of a model, in a cache made for {len(self.layers)} layers, by {type(self.config).__name__}: "
                "make one by PagedCache of this very model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Give all blocks back."""
        self.sequences.close()
        self._set_columns()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i go on from what row beam_idx[i] holds. Nothing is copied before somebody writes.

        Raises:
            ConfigError: If a row is used twice and the allocator cannot share.
        """
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row be `repeats` rows."""
        self.batch_select_indices(torch.arange(len(self.sequences.requests)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Let the batch be these rows, each any number of times."""
        self.sequences.select(torch.arange(len(self.sequences.requests))[indices.cpu()].tolist())
        self._plan = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` columns.

        Raises:
            ConfigError: If it is positive, more than there are, or the allocator cannot.
        """
        if tokens_to_remove:
            self.sequences.cut(-tokens_to_remove)
            self._set_columns()

    def _set_columns(self) -> None:
        self._plan = None
        for layer in self.layers:
            layer.begin(self.sequences.num_columns)

    def _new_columns(self, first_column: int, columns: int, attention_mask: torch.Tensor | None) -> BoolArray:
        """Return which of the new columns hold tokens [batch, columns]."""
        batch, before = len(self.sequences.requests), self.sequences.real
        if first_column != before.shape[1]:
            raise ConfigError(f"a layer has seen {first_column} columns, the cache {before.shape[1]}: reset() the cache")
        if attention_mask is None:
            return np.ones((batch, columns), np.bool_)
        mask: BoolArray = attention_mask.detach().cpu().numpy().astype(np.bool_)
        shape = batch, first_column + columns
        if mask.shape != shape or (mask[:, :first_column] != before).any():
            beside = f", and what it was in the first {first_column}, which this cache holds: or reset() it for another batch"
            raise ConfigError(f"an attention mask of shape {mask.shape}: needs {shape}{beside if first_column else ''}")
        return mask[:, first_column:]
