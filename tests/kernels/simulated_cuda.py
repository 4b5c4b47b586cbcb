"""The readable kernel's numbers, in numba's CUDA simulator: test_cuda.py sets NUMBA_ENABLE_CUDASIM=1 before the import."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from thread_turns import in_turns

from pagedkv.kernels import cuda
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
    "more heads than threads": {"heads": 20, "kv_heads": 1, "threads": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode(variant: str) -> None:
    check([9, 1, 0, 5], **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["usual", "bf16", "sinks", "window"])
def test_pieces_are_merged(variant: str) -> None:
    check([9, 1, 0], **VARIANTS[variant], num_splits=3)


def test_keys_and_values_may_have_other_strides() -> None:
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((5, 2, 4, 2, 8)).astype(np.float32)
    q, tables = rng.standard_normal((1, 4, 8)).astype(np.float32), (np.array([[3, 1, 4]], np.int32), np.array([11], np.int32))
    want = decode(q, pool[:, 0].copy(), pool[:, 1].copy(), *tables, threads=16, num_splits=1)
    np.testing.assert_array_equal(decode(q, pool[:, 0].copy(), pool[:, 1], *tables, threads=16, num_splits=1), want)
    np.testing.assert_array_equal(decode(q, pool[:, 0], pool[:, 1].copy(), *tables, threads=16, num_splits=1), want)


def test_several_tiles() -> None:
    check([150], heads=2, kv_heads=1, threads=32, num_splits=2)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("variant", ["usual", "sinks", "more heads than threads", "more outputs than threads"])
def test_no_thread_reads_what_another_may_not_have_written(variant: str, backwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_turns(monkeypatch, backwards=backwards):
        check([150, 9, 0], **{"kv_heads": 1, **VARIANTS[variant]}, num_splits=2)  # several tiles


def test_what_it_cannot_read() -> None:
    q, cache = np.zeros((1, 2, 6), np.float16), np.zeros((1, 4, 2, 6), np.float16)
    tables = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    with pytest.raises(KernelError, match="multiple of 4"):
        decode(q, cache, cache, *tables)
    many = np.zeros((1, 128, 128), np.float16), *[np.zeros((1, 4, 1, 128), np.float16)] * 2
    with pytest.raises(KernelError, match=r"128 query heads of 128 per KV head: .* 48 KiB"):
        decode(*many, *tables)
    apart = np.zeros((1, 4, 2, 8, 2), np.float16)[..., 0]
    with pytest.raises(KernelError, match="heads need to begin at multiples of 8 bytes"):
        decode(np.zeros((1, 2, 8), np.float16), apart, apart, *tables)


class Launched:
    """In place of a kernel: how it is launched."""

    def __init__(self) -> None:
        self.configurations: list[Any] = []

    def __getitem__(self, configuration: Any) -> Any:
        self.configurations.append(configuration)
        return lambda *_: None


def test_grids_fit_a_gpu_however_large_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, merging = Launched(), Launched()
    monkeypatch.setattr(cuda, "decode_kernel", lambda *_: decoding)
    monkeypatch.setattr(cuda, "merge_kernel", lambda: merging)
    q, cache = np.zeros((70_000, 2, 4), np.float16), np.zeros((1, 1, 1, 4), np.float16)
    decode(q, cache, cache, np.zeros((70_000, 1), np.int32), np.ones(70_000, np.int32), num_splits=1_000)
    (grid, _, _), (merge_grid, _, _) = *decoding.configurations, *merging.configurations
    assert grid == (70_000, 128)  # y at most 65,535, x 2**31 - 1: CUDA C++ Programming Guide
    assert merge_grid == 140_000


def test_kernels_run_on_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere nothing would order them after the work that made their inputs."""
    asked: list[Any] = []

    def current(device: Any) -> Any:
        asked.append(device)
        return SimpleNamespace(cuda_stream=77)

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(current_stream=current)))
    monkeypatch.setattr(cuda, "is_torch", lambda _: True)
    monkeypatch.setattr(cuda.cuda, "external_stream", lambda handle: f"stream {handle}", raising=False)
    assert cuda._stream(SimpleNamespace(is_cuda=True, device="cuda:1")) == "stream 77"
    assert asked == ["cuda:1"]
    assert cuda._stream(SimpleNamespace(is_cuda=False)) == 0
