"""Paged decode attention by the readable GPU kernel, `cuda_kernel`: from tensors to a launch and back."""

import sys
from functools import cache
from typing import Any

import numpy as np

from pagedkv.kernels.contract import KernelError, dtype_name, is_torch, narrowed, nhd, widened
from pagedkv.kernels.cuda_kernel import ITEMSIZE, THREADS, cuda, decode_kernel, merge_kernel
from pagedkv.kernels.split_heuristic import MAX_SPLITS, num_splits_for


def _words(cache_: Any) -> Any:
    """Return a strided view of a cache as 8-byte words, for a kernel or for the simulator.

    Raises:
        KernelError: If its heads do not begin at multiples of 8 bytes.
    """
    try:
        words = cache_.view(sys.modules["torch"].int64 if is_torch(cache_) else np.int64)
    except (RuntimeError, ValueError) as odd:
        raise KernelError(
            f"strides {cache_.stride() if is_torch(cache_) else cache_.strides}: the readable kernel reads 8 bytes at a "
            "time, so heads need to begin at multiples of 8 bytes and to lie in one piece; 'triton' lets them begin anywhere"
        ) from odd
    if is_torch(words):
        if words.is_cuda:
            return cuda.as_cuda_array(words)
        words = words.numpy()
    from numba.cuda.simulator.cudadrv import devicearray  # noqa: PLC0415

    fake: Any = devicearray.FakeCUDAArray  # a copy that the simulator makes would have to be contiguous
    return fake(words)


def decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    softmax_scale: float | None = None,
    out: Any = None,
    num_splits: int = 0,
    return_lse: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Any = None,
    kv_layout: str = "NHD",
    threads: int = THREADS,
) -> Any:
    """Attend from one query per row, as `triton_decode.decode`; CUDA tensors of torch, or arrays of numpy in the simulator.

    Raises:
        KernelError: For a type or a head size that this kernel does not read.
    """
    kind, (batch, num_heads, head_dim) = dtype_name(k_cache), q.shape
    if kind not in ITEMSIZE:
        raise KernelError(f"the caches are {kind}: the readable kernel reads {', '.join(ITEMSIZE)}; 'triton' fp8 too")
    if head_dim % (8 // ITEMSIZE[kind]):
        raise KernelError(
            f"head_dim is {head_dim}: the readable kernel reads 8 bytes at a time, a multiple of {8 // ITEMSIZE[kind]}"
        )
    k_view, v_view = nhd(k_cache, kv_layout), nhd(v_cache, kv_layout)
    block_size, num_kv_heads = k_view.shape[1:3]
    kernel = decode_kernel(head_dim, num_heads // num_kv_heads, kind, threads)
    tiles = block_table.shape[1] * block_size // 64
    splits = min(num_splits, MAX_SPLITS) or num_splits_for(batch * num_kv_heads, max(1, tiles), _num_slots())
    queries, extra, new, given = _arrays(q, sinks)
    partial, partial_lse = new(batch, num_heads, splits, head_dim), new(batch, num_heads, splits)
    scale = np.float32((head_dim**-0.5 if softmax_scale is None else softmax_scale) * k_scale)
    stream = _stream(q)
    if batch:
        kernel[(batch * num_kv_heads, splits), threads, stream](
            queries, _words(k_view), _words(v_view), given(block_table), given(cache_seqlens), extra, sinks is not None,
            given(partial), given(partial_lse), scale, np.float32(v_scale), np.float32(softcap), window_size[0],
        )  # fmt: skip
    merged, lse = partial[:, :, 0], partial_lse[:, :, 0]
    if splits > 1 and batch:
        merged, lse = new(batch, num_heads, head_dim), new(batch, num_heads)
        merge_kernel()[batch * num_heads, threads, stream](given(partial), given(partial_lse), given(merged), given(lse))
    result = _stored(merged, q, out)
    return (result, lse) if return_lse else result


def _num_slots() -> int:
    """Return how many thread blocks run at once, four per multiprocessor."""
    device = getattr(cuda, "get_current_device", lambda: None)()  # simulators have none, or one that has no such number
    return 4 * int(getattr(device, "MULTIPROCESSOR_COUNT", 2))


def _stream(q: Any) -> Any:
    """Return the stream that torch uses where `q` is: what torch does before and after is in order with a kernel only there.

    Launched elsewhere, a kernel could not be captured in a CUDA graph either.
    """
    if not is_torch(q) or not q.is_cuda:
        return 0
    return _external_stream(int(sys.modules["torch"].cuda.current_stream(q.device).cuda_stream))


@cache
def _external_stream(handle: int) -> Any:
    return cuda.external_stream(handle) if handle else 0


def _arrays(q: Any, sinks: Any) -> tuple[Any, Any, Any, Any]:
    """Return float32 queries and sinks (one 0 if none), a maker of float32 arrays, and how to hand an array to a kernel."""
    if not is_torch(q):
        extra = np.zeros(1, np.float32) if sinks is None else widened(np.asarray(sinks)).astype(np.float32)
        return widened(q).astype(np.float32), extra, lambda *shape: np.empty(shape, np.float32), lambda array: array
    import torch  # noqa: PLC0415

    given = cuda.as_cuda_array if q.is_cuda else torch.Tensor.numpy
    logits: Any = torch.zeros(1, device=q.device) if sinks is None else sinks.detach().float()
    return given(q.detach().float()), given(logits), lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device), given


def _stored(merged: Any, q: Any, out: Any) -> Any:
    """Return the result in q's type, in `out` if given."""
    if is_torch(q):
        return merged.to(q.dtype) if out is None else out.copy_(merged)
    result = narrowed(merged, q.dtype)
    if out is None:
        return result
    out[...] = result
    return out
