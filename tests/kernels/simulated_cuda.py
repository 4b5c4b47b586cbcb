"""The readable kernel's numbers, in numba's CUDA simulator: test_cuda.py sets NUMBA_ENABLE_CUDASIM=1 before the import."""

import math
from typing import Any

import numpy as np
import pytest

from pagedkv.kernels.contract import KernelError, check_call, narrowed
from pagedkv.kernels.cuda import decode
from pagedkv.kernels.reference import attend

TOLERANCE = {"float32": 1e-5, "float16": 2**-10, "uint16": 2**-8}
"""Relative: the arithmetic is fp32, so what remains is the rounding of the output."""


def check(lengths: list[int], *, threads: int = 16, num_splits: int = 1, **options: Any) -> None:
    heads, kv_heads, dim, block_size, dtype, layout = (
        options.pop(name, usual)
        for name, usual in {"heads": 4, "kv_heads": 2, "dim": 8, "block_size": 4, "dtype": np.float32, "kv_layout": "NHD"}.items()
    )
    rng = np.random.default_rng(0)
    counts = [-(-n // block_size) for n in lengths]
    pool = rng.permutation(sum(counts) + 2)
    table = np.full((len(lengths), max(counts) + 1), -1, np.int32)
    caches = np.full((2, len(pool), block_size, kv_heads, dim), math.nan, np.float32)
    taken = 0
    for row, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = pool[taken : taken + count]
        taken += count
        for t in range(n):
            caches[:, table[row, t // block_size], t % block_size] = rng.standard_normal((2, kv_heads, dim))
    k, v = (narrowed(cache.swapaxes(1, 2).copy() if layout == "HND" else cache, np.dtype(dtype)) for cache in caches)
    q = narrowed(rng.standard_normal((len(lengths), heads, dim)).astype(np.float32), np.dtype(dtype))
    arrays = (q, k, v, table, np.array(lengths, np.int32))
    out, lse = decode(*arrays, threads=threads, num_splits=num_splits, return_lse=True, kv_layout=layout, **options)
    want, want_lse = attend(check_call(*arrays, kv_layout=layout, **options))
    assert out.dtype == q.dtype
    got = (out.astype(np.uint32) << 16).view(np.float32) if out.dtype == np.uint16 else out
    tolerance = TOLERANCE[np.dtype(dtype).name]
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=tolerance)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4, rtol=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "bf16": {"dtype": np.uint16},
    "fp16": {"dtype": np.float16},
    "MHA": {"heads": 2},
    "group of 3": {"heads": 6},
    "blocks of 1": {"block_size": 1},
    "blocks of 7": {"block_size": 7},
    "HND": {"kv_layout": "HND"},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": np.array([0.5, -2.0, 3.0, 0.0], np.float32)},
    "window": {"window_size": (5, 0)},
    "scales": {"softmax_scale": 0.4, "k_scale": 0.5, "v_scale": 2.0},
    "more outputs than threads": {"threads": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode(variant: str) -> None:
    check([9, 1, 0, 5], **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["usual", "bf16", "sinks", "window"])
def test_pieces_are_merged(variant: str) -> None:
    check([9, 1, 0], **VARIANTS[variant], num_splits=3)


def test_several_tiles() -> None:
    check([150], heads=2, kv_heads=1, threads=32, num_splits=2)


def test_what_it_cannot_read() -> None:
    q, cache = np.zeros((1, 2, 6), np.float16), np.zeros((1, 4, 2, 6), np.float16)
    with pytest.raises(KernelError, match="multiple of 4"):
        decode(q, cache, cache, np.zeros((1, 1), np.int32), np.ones(1, np.int32))
