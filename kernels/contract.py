"""What a call to paged attention means, checked once for every backend.

Layouts: a cache is NHD, [num_blocks, block_size, num_kv_heads, head_dim], or HND, [num_blocks, num_kv_heads, block_size, head_dim].
Both are read as NHD through strides, so a pool [num_blocks, 2, block_size, num_kv_heads, head_dim] gives keys and values as views.
Token t of a sequence lies in block `block_table[sequence, t // block_size]`, at offset t % block_size. Entries that no visible
token needs (padding, -1; blocks that have left the window) are never looked at.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array
from pagedkv.errors import ConfigError

KV_LAYOUTS = ("NHD", "HND")
HOST_DTYPES = ("float32", "float16", "bfloat16")
"""What the CPU stores and computes with; numpy has no bfloat16, its bit patterns are uint16 there."""


class AttentionOptions(TypedDict, total=False):
    """Keywords of `dispatch.paged_attention` that every backend answers to; they are described there."""

    softmax_scale: float | None
    num_splits: int
    k_scale: float
    v_scale: float
    window_size: tuple[int, int]
    softcap: float
    sinks: Any
    kv_layout: str


class KernelError(ConfigError):
    """A call that cannot be served: says what is wrong, the value, and what works."""


def need(ok: object, problem: str) -> None:
    """Raise KernelError with `problem` unless `ok`."""
    if not ok:
        raise KernelError(problem)


def dtype_name(array: Any) -> str:
    """Return the element type's name, the same for numpy and torch; uint16 counts as the bit patterns of bfloat16."""
    return _dtype_name(array.dtype)


@cache
def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return "bfloat16" if name == "uint16" else name


def is_torch(array: Any) -> bool:
    """Tell whether `array` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def device_type(array: Any) -> str:
    """Return "cpu", "cuda" or whatever else torch calls the kind of the array's device."""
    return str(array.device.type) if is_torch(array) else "cpu"


def host_array(array: Any) -> npt.NDArray[Any]:
    """Return `array` as numpy sees it, without a copy: bfloat16 as uint16 bit patterns.

    Raises:
        KernelError: If it lies on another device, or is of a type that numpy does not have.
    """
    if not is_torch(array):
        return np.asarray(array)
    need(
        array.device.type == "cpu", f"a tensor on {array.device}: 'cpu' and 'reference' need it on the CPU, 'triton' reads it there"
    )
    torch: Any = sys.modules["torch"]
    tensor = array.detach()
    try:
        viewed: npt.NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except TypeError as unknown:
        works = f"'cpu' and 'reference' read {', '.join(HOST_DTYPES)}, 'triton' reads float8_e4m3fn on a GPU"
        raise KernelError(f"a {dtype_name(tensor)} tensor on the CPU, a type that numpy lacks: {works}") from unknown
    return viewed


def number(name: str, value: Any) -> float:
    """Return `value` as a float.

    Raises:
        KernelError: If it is a tensor on a GPU, for which each call would have to wait, or not finite.
    """
    if device_type(value) != "cpu":
        raise KernelError(
            f"{name} is a tensor on {value.device}: needs a number, or each call waits for the GPU; keep float({name})"
        )
    need(math.isfinite(float(value)), f"{name} is {value}: needs a finite number")
    return float(value)


def integers(numbers: Any, like: Any, *, bits: int = 32) -> Any:
    """Return `numbers` as int32, or with so many bits; a tensor on the device of `like` if that is one."""
    if is_torch(like):
        torch: Any = sys.modules["torch"]
        return torch.as_tensor(numbers, dtype=getattr(torch, f"int{bits}"), device=like.device)
    return np.asarray(host_array(numbers), f"int{bits}")


def counting(count: int, like: Any) -> Any:
    """Return 0, 1, 2 and so on, `count` of them, int32; a tensor made where `like` is, not sent there, if that is one."""
    if is_torch(like):
        torch: Any = sys.modules["torch"]
        return torch.arange(count, dtype=torch.int32, device=like.device)
    return np.arange(count, dtype=np.int32)


def fetched(array: Any) -> Any:
    """Return `array` as it is, or what lies on a GPU, brought to the CPU."""
    return array.cpu() if is_torch(array) else array


def nhd(cache: Any, kv_layout: str) -> Any:
    """Return a view of `cache`, numpy or torch, with its axes in the order NHD."""
    return cache.swapaxes(1, 2) if kv_layout == "HND" else cache


def check_shapes(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    cu_seqlens_q: Any,
    num_splits: int,
    window_size: tuple[int, int],
    softcap: float,
    sinks: Any,
    kv_layout: str,
) -> None:
    """Check what needs no look at the values: shapes, types and settings, of numpy arrays or of tensors on any device.

    Raises:
        KernelError: With what would work.
    """
    check_cache_pair(k_cache, v_cache, kv_layout)
    need(len(q.shape) == 3, f"q has shape {tuple(q.shape)}: needs [queries, num_q_heads, head_dim]")
    heads, head_dim = int(q.shape[1]), int(q.shape[2])
    kv_heads, cached_dim = int(nhd(k_cache, kv_layout).shape[2]), int(k_cache.shape[3])
    need(head_dim == cached_dim, f"q has head_dim {head_dim}, the caches {cached_dim}: needs the same")
    need(heads and heads % kv_heads == 0, f"{heads} query heads over {kv_heads} KV heads: needs a multiple of {kv_heads}")
    need(dtype_name(q) in HOST_DTYPES, f"q is {dtype_name(q)}: needs {', '.join(HOST_DTYPES)} (uint16 bit patterns in numpy)")
    need(len(block_table.shape) == 2, f"block_table has shape {tuple(block_table.shape)}: needs [batch, max_blocks]")
    batch = int(block_table.shape[0])
    shape = tuple(cache_seqlens.shape)
    need(shape == (batch,), f"cache_seqlens has shape {shape}: {batch} sequences need [{batch}]")
    if cu_seqlens_q is None:
        need(q.shape[0] == batch, f"{q.shape[0]} queries for {batch} block tables: decoding needs one query per sequence")
    else:
        shape = tuple(cu_seqlens_q.shape)
        need(shape == (batch + 1,), f"cu_seqlens_q has shape {shape}: {batch} sequences need [{batch + 1}]")
    if sinks is not None:
        need(tuple(sinks.shape) == (heads,), f"sinks have shape {tuple(sinks.shape)}: {heads} query heads need [{heads}]")
    need(num_splits >= 0, f"num_splits is {num_splits}: needs 0 (automatic) or more")
    window_fits = len(window_size) == 2 and min(window_size) >= -1
    need(window_fits, f"window_size is {window_size}: needs (left, right), each -1 (no limit) or more")
    need(softcap >= 0 and math.isfinite(softcap), f"softcap is {softcap}: needs 0 (none) or more")


def check_cache_pair(k_cache: Any, v_cache: Any, kv_layout: str) -> None:
    """Raise KernelError unless these are the keys and values of one cache."""
    need(kv_layout in KV_LAYOUTS, f"kv_layout is {kv_layout!r}: needs 'NHD' or 'HND'")
    for name, array in (("k_cache", k_cache), ("v_cache", v_cache)):
        axes = "block_size, num_kv_heads" if kv_layout == "NHD" else "num_kv_heads, block_size"
        need(len(array.shape) == 4, f"{name} has shape {tuple(array.shape)}: {kv_layout} is [num_blocks, {axes}, head_dim]")
        need(min(array.shape[1:]) > 0, f"{name} has shape {tuple(array.shape)}: needs at least 1 in every axis")
    shapes = tuple(k_cache.shape), tuple(v_cache.shape)
    need(shapes[0] == shapes[1], f"k_cache has shape {shapes[0]}, v_cache {shapes[1]}: needs the same")
    need(k_cache.dtype == v_cache.dtype, f"k_cache is {dtype_name(k_cache)}, v_cache {dtype_name(v_cache)}: needs the same")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCall:
    """One checked call as the CPU backends take it: numpy arrays, decode and prefill alike."""

    q: npt.NDArray[Any]
    """Queries [total_q, num_q_heads, head_dim], those of one sequence together."""
    k_cache: npt.NDArray[Any]
    """Keys [num_blocks, block_size, num_kv_heads, head_dim], any strides."""
    v_cache: npt.NDArray[Any]
    """Values, as `k_cache`."""
    block_table: Int32Array
    """By sequence: its blocks [batch, max_blocks]."""
    cu_seqlens_q: Int32Array
    """Sequence i has queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] [batch + 1]."""
    cache_seqlens: Int32Array
    """By sequence: keys present [batch]. Query j of n sits at position cache_seqlens - n + j."""
    softmax_scale: float
    """Factor of q . k, the keys' scale included."""
    v_scale: float
    """What a stored value is multiplied by."""
    window_size: tuple[int, int]
    """Keys visible to the left and to the right of the query's position; -1: all."""
    softcap: float
    """Scores become softcap * tanh(score / softcap); 0 leaves them."""
    sinks: npt.NDArray[np.float32] | None
    """By query head: a logit that takes softmax mass and gives no value."""
    causal: bool
    """A query sees nothing to its right; else as far as the window allows."""
    num_splits: int
    """Pieces that a sequence's keys are split into; 0: as many as keep the threads busy."""

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return int(self.q.shape[1]) // int(self.k_cache.shape[2])

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.k_cache.shape[1])


def check_call(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    cu_seqlens_q: Any = None,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Any = None,
    kv_layout: str = "NHD",
    causal: bool = True,
) -> AttentionCall:
    """Check a call with arrays on the CPU, values included, and return it. Without `cu_seqlens_q`: one query per sequence.

    Raises:
        KernelError: With what would work.
    """
    arrays = [host_array(array) for array in (q, k_cache, v_cache)]
    tables = [np.ascontiguousarray(host_array(array), np.int32) for array in (block_table, cache_seqlens)]
    if cu_seqlens_q is not None:
        cu_seqlens_q = np.ascontiguousarray(host_array(cu_seqlens_q), np.int32)
    sinks = None if sinks is None else widened(host_array(sinks)).astype(np.float32)
    options: dict[str, Any] = {"num_splits": num_splits, "window_size": window_size, "softcap": float(softcap), "sinks": sinks}
    check_shapes(*arrays, *tables, cu_seqlens_q=cu_seqlens_q, kv_layout=kv_layout, **options)
    caches = [nhd(cache, kv_layout) for cache in arrays[1:]]
    kind = dtype_name(caches[0])
    need(
        kind in HOST_DTYPES,
        f"the caches are {kind}: the CPU reads {', '.join(HOST_DTYPES)} (uint16 bit patterns), 'triton' fp8 too",
    )
    if cu_seqlens_q is None:
        cu_seqlens_q = np.arange(len(tables[1]) + 1, dtype=np.int32)
    scale = (arrays[0].shape[2] ** -0.5 if softmax_scale is None else softmax_scale) * k_scale
    need(math.isfinite(scale) and math.isfinite(v_scale), f"scales {softmax_scale}, {k_scale}, {v_scale}: need finite numbers")
    call = AttentionCall(
        q=arrays[0],
        k_cache=caches[0],
        v_cache=caches[1],
        block_table=tables[0],
        cu_seqlens_q=cu_seqlens_q,
        cache_seqlens=tables[1],
        softmax_scale=float(scale),
        v_scale=float(v_scale),
        causal=causal,
        **options,
    )
    _check_values(call)
    return call


def _check_values(call: AttentionCall) -> None:
    starts, seqlens, table = call.cu_seqlens_q, call.cache_seqlens, call.block_table
    if not (starts[0] == 0 and starts[-1] == len(call.q) and (starts[1:] >= starts[:-1]).all()):
        raise KernelError(f"cu_seqlens_q is {starts.tolist()}: needs to rise from 0 to the number of queries, {len(call.q)}")
    room = table.shape[1] * call.block_size
    longest = int(seqlens.max(initial=0))
    if longest > room or seqlens.min(initial=0) < 0:
        i = int(np.flatnonzero((seqlens < 0) | (seqlens > room))[0])
        works = f"a block table of {table.shape[1]} blocks of {call.block_size} tokens holds 0 to {room}"
        raise KernelError(f"cache_seqlens[{i}] is {seqlens[i]}: {works}")
    entries = table[:, : -(-longest // call.block_size)]
    if entries.max(initial=0) >= len(call.k_cache) or entries.min(initial=0) < 0:  # perhaps only where nobody looks
        _check_entries(call, entries)


def _check_entries(call: AttentionCall, entries: Int32Array) -> None:
    """Raise KernelError if a block that some visible key is in does not exist."""
    left, num_queries = call.window_size[0], np.diff(call.cu_seqlens_q)
    first = np.maximum(call.cache_seqlens - num_queries - left, 0) // call.block_size if left >= 0 else np.zeros_like(num_queries)
    last = np.where(num_queries > 0, -(-call.cache_seqlens // call.block_size), 0)
    column = np.arange(entries.shape[1])
    used = (column >= first[:, None]) & (column < last[:, None])
    bad = np.argwhere(used & ((entries < 0) | (entries >= len(call.k_cache))))
    for row, place in bad[:1]:
        needed = f"sequence {row} needs blocks {first[row]} to {last[row] - 1} of its table, each 0 to {len(call.k_cache) - 1}"
        raise KernelError(f"block_table[{row}, {place}] is {entries[row, place]}: {needed}")


def widened(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return `array` as floating point numpy can compute with: bit patterns of bfloat16 become float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def narrowed(values: npt.NDArray[Any], dtype: Any) -> npt.NDArray[Any]:
    """Return `values` as `dtype`, to nearest even; uint16 are bit patterns of bfloat16."""
    if dtype != np.uint16:
        return values.astype(dtype)
    single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)
