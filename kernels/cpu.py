"""Paged attention on the CPU: what users without a GPU run.

The work is cut into items: some queries of one sequence, some KV heads, some of the keys. Threads take items until none is left,
the largest first, so that slow and busy cores hold nobody up. Whoever ends the last piece of a split sequence merges its pieces.
Decode and prefill are one path: a decode step is a prefill of one query per sequence.
"""

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import parallel_jit
from pagedkv.kernels.contract import AttentionCall, need, widened
from pagedkv.kernels.cpu_items import Float32Array, Operands, Settings, Workspace, worker
from pagedkv.kernels.cpu_plan import Plan, plan
from pagedkv.kernels.cpu_tiles import tile_kernels
from pagedkv.kernels.simd import LANES

_LOG2E = math.log2(math.e)


@parallel_jit
def _run(
    work: Any,
    items: Any,
    progress: Any,
    operands: Any,
    settings: Any,
    floats: Any,
    limits: Any,
    places: Any,
    score: Any,
    weigh: Any,
) -> None:
    for thread in numba.prange(floats.shape[0]):
        mine = floats[thread]
        space = Workspace(mine[0], mine[1], mine[2], mine[3], limits[thread], places[thread])
        work(items, progress, operands, settings, space, score, weigh)


def attend(call: AttentionCall) -> tuple[Float32Array, Float32Array]:
    """Attend and return (out [total_q, num_q_heads, head_dim], lse [total_q, num_q_heads]) in float32, natural log.

    O(queries * heads * keys * head_dim / threads); keys and values are read once for the query heads that share them.

    Raises:
        KernelError: If the head is shorter than a vector, or its elements are not next to each other.
    """
    total_q, num_heads, head_dim = call.q.shape
    need(head_dim >= LANES, f"head_dim is {head_dim}: the CPU kernel needs {LANES} or more; 'reference' takes any")
    out, lse = np.zeros(call.q.shape, np.float32), np.full((total_q, num_heads), -np.inf, np.float32)
    threads = numba.get_num_threads()
    todo = plan(call, threads)
    (keys, key_strides), (values, value_strides) = _flat(call.k_cache, "k_cache"), _flat(call.v_cache, "v_cache")
    factor = call.softmax_scale / call.softcap if call.softcap else call.softmax_scale * _LOG2E
    operands = Operands(
        q=np.multiply(widened(call.q), np.float32(factor), dtype=np.float32, order="C"),
        keys=keys,
        values=values,
        strides=np.array(key_strides + value_strides),
        block_table=np.require(call.block_table, requirements=["C", "W"]),
        first=todo.first,
        last=todo.last,
        sinks=np.full(num_heads, -np.inf, np.float32) if call.sinks is None else call.sinks * np.float32(_LOG2E),
        out=out,
        lse=lse,
        parts=np.empty((todo.num_part_rows, num_heads, head_dim), np.float32),
        part_lse=np.empty((todo.num_part_rows, num_heads), np.float32),
    )
    settings = Settings(call.k_cache.shape[2], call.block_size, todo.tile_tokens, call.v_scale, call.softcap)
    progress = np.append(0, todo.pieces_left)
    spaces = _workspaces(min(threads, len(todo.items)), todo, head_dim)
    _run(worker(), todo.items, progress, operands, settings, *spaces, *tile_kernels(call.k_cache.dtype))
    return out, lse


class _Memory:
    """Bytes from an address on, writable for numba, which compiles anew for what is not; `owner` keeps them alive."""

    def __init__(self, address: int, size: int, owner: npt.NDArray[Any]) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": (size,), "typestr": "|u1"}
        self.owner = owner


def _flat(cache: npt.NDArray[Any], name: str) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    """Return all memory from the cache's first element to its last, and the strides of block, slot and KV head in elements."""
    strides = tuple(step // cache.itemsize for step in cache.strides)
    works = f"{name} has strides of {strides} elements: needs the elements of a head next to each other, and no stride below 0"
    need(strides[3] == 1 and min(strides) >= 0, works)
    extent = 1 + sum((size - 1) * step for size, step in zip(cache.shape, strides, strict=True)) if cache.size else 0
    return np.asarray(_Memory(cache.ctypes.data, extent * cache.itemsize, cache)), strides[:3]


def _workspaces(threads: int, todo: Plan, head_dim: int) -> tuple[Float32Array, Int32Array, Int64Array]:
    """Return what the threads' `Workspace` are made of: the float32 arrays [threads, 4, size], limits and places.

    Each begins a cache line, of 64 bytes, which vectors then do not straddle.
    """
    size = todo.num_rows * max(-(-head_dim // LANES) * LANES, todo.tile_tokens)
    size = -(-size // 16) * 16
    memory = np.empty(threads * 4 * size + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    floats = memory[start : start + threads * 4 * size].reshape(threads, 4, size)
    return floats, np.empty((threads, 2, todo.num_rows), np.int32), np.empty((threads, 2, 2 * todo.tile_tokens), np.int64)
