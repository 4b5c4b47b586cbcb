"""Keys and values in torch tensors, in blocks, as an allocator hands them out."""

from collections.abc import Mapping
from numbers import Integral
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.kernels.cache_ops import copy_blocks, copy_slots, reshape_and_cache
from pagedkv.kernels.contract import KV_LAYOUTS, need
from pagedkv.kernels.dispatch import paged_attention
from pagedkv.runtime.storage_layout import StorageLayout

FP8 = torch.float8_e4m3fn
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
        "fp8": FP8,
        "fp8_e4m3": FP8,
    }
)
"""Element types of a storage by name."""


class PagedKVStorage:
    """Memory for blocks: per layer a pool [num_blocks, 2, block_size, num_kv_heads, head_dim], keys and values.

    It owns bytes and no decisions: which block is whose, an allocator says. Block 0 is its null block, which nobody gets.
    What lies in a slot that was never written is undefined.

    fp8 (e4m3) stores x / scale. A GPU kernel reads it as it is; on the CPU the blocks that a call reads are widened for it.

    Example:
        >>> from pagedkv.kv_spec import LayerGroup
        >>> from pagedkv.runtime.storage_layout import plan_storage
        >>> layer = LayerGroup(kind="full", num_layers=1, num_kv_heads=2, key_dim=16, value_dim=16)
        >>> storage = PagedKVStorage(plan_storage([layer] * 3, block_size=4), budget_bytes=16_000, dtype="bf16")
        >>> storage.block_bytes, storage.num_blocks, storage.num_bytes
        (1536, 10, 15360)
        >>> tuple(storage.keys(0).shape)
        (10, 4, 2, 16)
    """

    def __init__(
        self,
        layout: StorageLayout,
        *,
        num_blocks: int | None = None,
        budget_bytes: int | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        kv_layout: str = "NHD",
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Take the memory.

        Args:
            layout: Where the layers lie.
            num_blocks: Blocks of the pool, the null block included; or else `budget_bytes`.
            budget_bytes: Take as many blocks as fit into so many bytes.
            dtype: Element type, one of `DTYPES` or its name.
            device: Where.
            kv_layout: "NHD", or "HND" for blocks of [num_kv_heads, block_size, head_dim].
            k_scale: What a key that is stored in fp8 is divided by, and multiplied by when it is read.
            v_scale: The same for values.

        Raises:
            ConfigError: With what would work.
        """
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise unknown_name("element type of the KV storage", dtype, DTYPES)
        self.dtype: torch.dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
        need(self.dtype in DTYPES.values(), f"a KV storage of {self.dtype}: needs one of {', '.join(DTYPES)}")
        need(kv_layout in KV_LAYOUTS, f"kv_layout is {kv_layout!r}: needs 'NHD' or 'HND'")
        scales = f"k_scale {k_scale}, v_scale {v_scale}: fp8 needs positive numbers, other types store what they get, at 1.0"
        need(k_scale > 0 and v_scale > 0 and (self.dtype == FP8 or k_scale == v_scale == 1.0), scales)
        self.layout, self.kv_layout, self.k_scale, self.v_scale = layout, kv_layout, k_scale, v_scale
        self.device = torch.device(device)
        self.block_bytes: int = sum(layout.tensor_elements) * self.dtype.itemsize
        """Bytes of one block in all tensors."""
        self.num_blocks = _num_blocks(num_blocks, budget_bytes, self.block_bytes)
        self._tensors = self._take()
        self._pools = [self._pool(layer) for layer in range(len(layout.places))]
        self._widest = layout.widest_layers

    @property
    def num_bytes(self) -> int:
        """Bytes taken."""
        return sum(int(tensor.untyped_storage().nbytes()) for tensor in self._tensors)

    def pool(self, layer: int) -> torch.Tensor:
        """Return keys and values of a layer, [num_blocks, 2, block_size, num_kv_heads, head_dim] (HND accordingly), a view."""
        return self._pools[layer]

    def keys(self, layer: int) -> torch.Tensor:
        """Return the keys of a layer, [num_blocks, block_size, num_kv_heads, head_dim] (HND accordingly), a view."""
        return self._pools[layer][:, 0]

    def values(self, layer: int) -> torch.Tensor:
        """Return the values of a layer, as `keys`."""
        return self._pools[layer][:, 1]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, slot_mapping: Any) -> None:
        """Write keys and values [tokens, num_kv_heads, head_dim] to slots [tokens], block * block_size + offset; -1 skips.

        Raises:
            KernelError: If shapes or types do not fit (into fp8, any floating type does), or, on the CPU, a slot is outside or
                given twice.
        """
        keys, values = self.keys(layer), self.values(layer)
        if self.dtype == FP8:
            for name, new in (("key", key), ("value", value)):
                need(new.is_floating_point() and new.dtype != FP8, f"{name} is {new.dtype}: fp8 is made of a wider floating type")
            key, value = _to_fp8(key, self.k_scale), _to_fp8(value, self.v_scale)
        reshape_and_cache(key, value, keys, values, slot_mapping, kv_layout=self.kv_layout)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Attend from `q` [queries, num_q_heads, head_dim] to what is stored: see `pagedkv.kernels.paged_attention`.

        Without `cu_seqlens_q` one query per sequence. Layout and scales are the storage's, further keywords the kernel's.

        Raises:
            KernelError: If the arguments do not fit, or, on the CPU, a table names a block outside the pool that is needed.
        """
        keys, values = self.keys(layer), self.values(layer)
        if self.dtype == FP8 and self.device.type == "cpu":
            outside = int(block_table.max()) >= self.num_blocks if block_table.numel() else False
            need(not outside, f"block_table names block {int(block_table.max()) if outside else 0}: the pool has {self.num_blocks}")
            used, table = torch.unique(block_table, return_inverse=True)
            blocks = used.clamp(min=0).long()
            keys, values = keys[blocks].float(), values[blocks].float()
            block_table = torch.where(block_table < 0, -1, table).int()
        return paged_attention(
            q,
            keys,
            values,
            block_table,
            cache_seqlens,
            cu_seqlens_q=cu_seqlens_q,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            kv_layout=self.kv_layout,
            **options,
        )

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks [n, 2], source and destination, in order, whole: forks that are written to. O(copies * tensors).

        Raises:
            KernelError: On the CPU, if a block is outside.
        """
        for batch in _independent(pairs):
            for layer in self._widest:
                copy_blocks(self.keys(layer), self.values(layer), batch, kv_layout=self.kv_layout)

    def apply_copies(self, copies: Int64Array) -> None:
        """Make the copies of a grant, [n, 2] of source and destination slots, in order, in all layers. O(copies * layers).

        Raises:
            KernelError: If there are any and layers have block tables of their own: nothing says which layers they mean.
        """
        if not len(copies):
            return
        need(self.layout.num_groups == 1, f"copies for {self.layout.num_groups} groups of layers: needs a storage of one group")
        for batch in _independent(copies):
            for layer in range(len(self._pools)):
                copy_slots(self.keys(layer), self.values(layer), batch, kv_layout=self.kv_layout)

    def _take(self) -> list[torch.Tensor]:
        sizes = self.layout.tensor_elements
        try:
            return [torch.empty(self.num_blocks, size, dtype=self.dtype, device=self.device) for size in sizes]
        except RuntimeError as shortage:  # torch has no class for it that CPUs and GPUs share
            raise ConfigError(
                f"{self.num_blocks} blocks of {self.block_bytes} bytes take {self.num_blocks * self.block_bytes} bytes, which "
                f"{self.device} does not give: take fewer by num_blocks or budget_bytes, or a narrower dtype ({shortage})"
            ) from shortage

    def _pool(self, layer: int) -> torch.Tensor:
        place = self.layout.places[layer]
        slots = (place.block_size, place.num_kv_heads) if self.kv_layout == "NHD" else (place.num_kv_heads, place.block_size)
        return self._tensors[place.tensor][:, : place.block_elements].unflatten(1, (2, *slots, place.head_dim))


def _num_blocks(num_blocks: int | None, budget_bytes: int | None, block_bytes: int) -> int:
    if (num_blocks is None) == (budget_bytes is None):
        raise ConfigError(f"num_blocks is {num_blocks}, budget_bytes {budget_bytes}: needs one of them")
    for name, number in (("num_blocks", num_blocks), ("budget_bytes", budget_bytes)):
        if number is not None and not isinstance(number, Integral):
            raise ConfigError(f"{name} is {number!r}: needs a whole number")
    if budget_bytes is not None:
        num_blocks = budget_bytes // block_bytes
        if num_blocks < 2:
            raise ConfigError(
                f"a budget of {budget_bytes} bytes holds {max(num_blocks, 0)} blocks of {block_bytes} bytes: needs "
                f"{2 * block_bytes} or more, for the null block and one to use; or smaller blocks, by block_size or dtype"
            )
    assert num_blocks is not None
    if num_blocks < 2:
        raise ConfigError(f"num_blocks is {num_blocks}: needs 2 or more, the null block and one to use")
    return num_blocks


def _to_fp8(values: torch.Tensor, scale: float) -> torch.Tensor:
    limit = torch.finfo(FP8).max
    return (values.float() / scale).clamp(-limit, limit).to(FP8)


def _independent(copies: Int64Array | Int32Array) -> list[Int64Array]:
    """Cut copies that are to be made in order into runs that can be made at once: none reads or writes what one before wrote."""
    runs, start, written = [], 0, set[int]()
    for i, (source, destination) in enumerate(copies.tolist()):
        if source in written or destination in written:
            runs.append(np.asarray(copies[start:i], np.int64))
            start, written = i, set()
        written.add(destination)
    return [*runs, np.asarray(copies[start:], np.int64)] if len(copies) else []
