"""Which kernel serves a call, and the functions that users call."""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Unpack

from pagedkv.errors import unknown_name
from pagedkv.kernels.contract import (
    HOST_DTYPES,
    AttentionOptions,
    KernelError,
    check_call,
    check_shapes,
    device_type,
    dtype_name,
    host_array,
    is_torch,
    narrowed,
    need,
    number,
)
from pagedkv.kernels.gpu_arguments import check_devices, on_device_of

HOST_BACKENDS = {"cpu": "pagedkv.kernels.cpu", "reference": "pagedkv.kernels.reference"}
"""Each has `attend(call)`, for arrays and tensors on the CPU."""
DEVICE_BACKENDS = {"triton": "pagedkv.kernels.triton_decode", "cuda": "pagedkv.kernels.cuda"}
"""Each has `decode(...)`, for tensors on a GPU, the fastest first. Where they are simulated, they take what is on the CPU too."""


def available() -> dict[str, str | None]:
    """Return by backend None if it can run here, or why not."""
    return {name: why_not(name) for name in (*DEVICE_BACKENDS, *HOST_BACKENDS)}


@cache
def why_not(backend: str) -> str | None:
    """Return None if `backend` can run here, or the reason. Imports what the backend needs."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return "numba does not compile here: unset NUMBA_DISABLE_JIT" if import_module("numba").config.DISABLE_JIT else None
    if backend == "triton":
        for library in ("torch", "triton"):
            if find_spec(library) is None:
                return f"{library} is not installed: a CUDA build of torch has it"
    if simulated(backend):
        return None
    if not (find_spec("torch") and import_module("torch").cuda.is_available()):
        return "torch finds no CUDA GPU"
    if backend == "triton" or import_module("numba.cuda").is_available():
        return None
    return "numba finds no CUDA driver, or no NVVM, which is in CUDA's toolkit and in pip install 'numba-cuda[cu13]'"


def simulated(backend: str) -> bool:
    """Tell whether a GPU backend runs on the CPU here, slowly: Triton's interpreter, numba's CUDA simulator."""
    if backend == "cuda":
        return bool(import_module("numba").config.ENABLE_CUDASIM)
    return backend == "triton" and bool(import_module("triton").knobs.runtime.interpret)


NO_LIMIT = 1 << 30
"""A window so wide is none; wider ones could pass 2**31 - 1 when a position is added on a GPU."""


class CallOptions(AttentionOptions, total=False):
    """Keywords of `paged_attention` but for those that make a call a decode step or a prefill."""

    out: Any
    return_lse: bool
    backend: str


def paged_attention_decode(
    q: Any, k_cache: Any, v_cache: Any, block_table: Any, cache_seqlens: Any, **options: Unpack[CallOptions]
) -> Any:
    """Attend from one query per sequence, the newest token, to its cached keys. `q` is [batch, num_q_heads, head_dim].

    Arguments, results and errors as `paged_attention`.
    """
    return paged_attention(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q=None, **options)


def paged_attention_prefill(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    *,
    causal: bool = True,
    **options: Unpack[CallOptions],
) -> Any:
    """Attend from the newest tokens of sequences to their cached keys, own included. `q` is [total_q, num_q_heads, head_dim].

    Arguments, results and errors as `paged_attention`.
    """
    return paged_attention(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q=cu_seqlens_q, causal=causal, **options)


def paged_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    cu_seqlens_q: Any = None,
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
    causal: bool = True,
    backend: str = "auto",
) -> Any:
    """Attend to keys and values that lie in blocks; numpy arrays on the CPU, torch tensors anywhere.

    Args:
        q: Queries [total_q, num_q_heads, head_dim]; float32, float16 or bfloat16 (numpy: uint16 bit patterns).
        k_cache: Keys [num_blocks, block_size, num_kv_heads, head_dim], or HND; any strides, elements of a head contiguous.
        v_cache: Values, as `k_cache`.
        block_table: By sequence: its blocks [batch, max_blocks], int32. What no visible key needs is never looked at.
        cache_seqlens: By sequence: keys present [batch], int32, those of the queries included. 0 gives output 0 and LSE -inf.
        cu_seqlens_q: Sequence i has queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] [batch + 1]; None: one each. Query j of n
            sits at position cache_seqlens - n + j.
        softmax_scale: Factor of the scores; None is head_dim ** -0.5.
        out: Where the result goes; None makes a new array like `q`.
        num_splits: Pieces that a sequence's keys are split into; 0 lets the backend choose. It guides speed only: "triton" does not
            split a prefill, "reference" nothing.
        return_lse: Whether to return the log-sum-exp too.
        k_scale: What a stored key is multiplied by.
        v_scale: What a stored value is multiplied by.
        window_size: (left, right) as FlashAttention: `left` tokens before the query are visible; -1 is all.
        softcap: Scores become softcap * tanh(score / softcap); 0 leaves them.
        sinks: One extra logit per query head [num_q_heads] that takes softmax mass and gives no value. The LSE counts it.
        kv_layout: "NHD" or "HND".
        causal: A query sees nothing to its right.
        backend: "auto", "cpu", "reference", "triton" or "cuda". "auto" is never "reference", which is for comparison.

    Returns:
        out like `q`, or (out, lse [total_q, num_q_heads] float32, natural log).

    Raises:
        KernelError: If the arguments do not fit together, or no backend here serves them: with what works.
        ConfigError: If there is no such backend.
    """
    arrays = (q, k_cache, v_cache, block_table, cache_seqlens)
    backend = choose(q, backend, decode=cu_seqlens_q is None)
    options: AttentionOptions = {
        "softmax_scale": None if softmax_scale is None else number("softmax_scale", softmax_scale),
        "num_splits": num_splits,
        "k_scale": number("k_scale", k_scale),
        "v_scale": number("v_scale", v_scale),
        "window_size": window_size,
        "softcap": number("softcap", softcap),
        "sinks": sinks,
        "kv_layout": kv_layout,
    }
    if out is not None:
        need(tuple(out.shape) == tuple(q.shape), f"out has shape {tuple(out.shape)}: needs q's, {tuple(q.shape)}")
    if backend in HOST_BACKENDS:
        call = check_call(*arrays, cu_seqlens_q=cu_seqlens_q, causal=causal, **options)
        result, lse = import_module(HOST_BACKENDS[backend]).attend(call)
        result, lse = _like(q, result, out), _like_lse(q, lse)
        return (result, lse) if return_lse else result
    check_shapes(
        *arrays,
        cu_seqlens_q=cu_seqlens_q,
        num_splits=num_splits,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        kv_layout=kv_layout,
    )
    tables = {"block_table": block_table, "cu_seqlens_q": cu_seqlens_q, "cache_seqlens": cache_seqlens}
    check_devices(q, tables, {"k_cache": k_cache, "v_cache": v_cache, "sinks": sinks, "out": out})
    options["window_size"] = min(window_size[0], NO_LIMIT), min(window_size[1], NO_LIMIT)
    with on_device_of(q):
        if cu_seqlens_q is None:
            return import_module(DEVICE_BACKENDS[backend]).decode(*arrays, out=out, return_lse=return_lse, **options)
        del options["num_splits"]
        prefill = import_module("pagedkv.kernels.triton_prefill").prefill
        return prefill(q, k_cache, v_cache, *tables.values(), out=out, return_lse=return_lse, causal=causal, **options)


def choose(q: Any, backend: str, *, decode: bool) -> str:
    """Return the backend for queries like `q`: the one that was asked for, or the fastest one that works where they are.

    Raises:
        KernelError: If it cannot run here: with those that can.
        ConfigError: If there is no such backend.
    """
    device = device_type(q)
    if backend == "auto":
        names = ["cpu"] if device == "cpu" else [name for name in DEVICE_BACKENDS if decode or name != "cuda"]
        for name in names:
            if why_not(name) is None:
                return name
        reasons = "; ".join(f"'{name}': {why_not(name)}" for name in names)
        works = (
            "make it work, or ask for 'reference', slow and exact" if device == "cpu" else "move them to the CPU, or make one work"
        )
        raise KernelError(f"no backend for arrays on {device} ({reasons}): {works}")
    if backend not in (*HOST_BACKENDS, *DEVICE_BACKENDS):
        raise unknown_name("backend", backend, ("auto", *HOST_BACKENDS, *DEVICE_BACKENDS))
    if why_not(backend) is not None:  # only now ask the others, which imports what they need
        works = ", ".join(name for name, reason in available().items() if reason is None)
        raise KernelError(f"backend '{backend}' cannot run here: {why_not(backend)}. What can: {works}")
    here = backend in HOST_BACKENDS or device != "cpu" or simulated(backend)
    need(here, f"backend '{backend}' reads tensors on a GPU, these are on the CPU: move them, or let 'cpu' read them")
    need(decode or backend != "cuda", "'cuda' decodes only, one query per sequence: 'triton', 'cpu' and 'reference' prefill")
    return backend


def _like(q: Any, result: Any, out: Any) -> Any:
    """Return float `result` in `out`, or as a new array of the type of `q`."""
    if out is not None:
        kind = dtype_name(out)
        target = host_array(out)
        fits = target.flags.writeable and kind in HOST_DTYPES
        need(fits, f"out is {kind}: needs a writable array of {', '.join(HOST_DTYPES)}")
        target[...] = narrowed(result, target.dtype)
        return out
    values = narrowed(result, host_array(q).dtype)
    if not is_torch(q):
        return values
    torch = sys.modules["torch"]
    return torch.from_numpy(values).view(q.dtype)


def _like_lse(q: Any, lse: Any) -> Any:
    values = lse.astype("float32", copy=False)
    return sys.modules["torch"].from_numpy(values) if is_torch(q) else values
