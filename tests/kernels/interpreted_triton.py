"""The Triton kernels' numbers, in Triton's interpreter on the CPU: test_triton.py sets TRITON_INTERPRET=1 before the import."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_checks import watch
from numpy.random import default_rng

from pagedkv.kernels.adapters import flash_attn_with_kvcache
from pagedkv.kernels.contract import KernelError, check_call
from pagedkv.kernels.merge import cascade_attention
from pagedkv.kernels.reference import attend
from pagedkv.kernels.triton_cache import write_slots
from pagedkv.kernels.triton_decode import decode
from pagedkv.kernels.triton_prefill import prefill
from pagedkv.kernels.triton_tile import INTERPRETED

assert INTERPRETED
watch()

TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 1e-5},
    torch.float16: {"atol": 2e-6, "rtol": 2**-10},
    torch.bfloat16: {"atol": 2e-6, "rtol": 2**-7},
}
"""The interpreter multiplies in fp32, so what remains is the rounding of the output (bf16 is cut off)."""


def cached(
    lengths: list[int], *, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, layout: str, seed: int = 0
) -> dict[str, Any]:
    """Return a pool of shuffled blocks, a table padded with -1, and NaN wherever no key is."""
    rng = default_rng(seed)
    counts = [-(-n // block_size) for n in lengths]
    pool = sum(counts) + 3
    table = torch.full((len(lengths), max(counts, default=0) + 2), -1, dtype=torch.int32)
    free = list(rng.permutation(pool))
    caches = torch.full((2, pool, block_size, kv_heads, dim), math.nan)
    for row, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        for i in range(count):
            table[row, i] = block = int(free.pop())
            used = min(block_size, n - i * block_size)
            caches[:, block, :used] = torch.from_numpy(rng.standard_normal((2, used, kv_heads, dim))).float()
    k, v = (c.to(dtype) for c in caches)
    if layout == "HND":
        k, v = (c.transpose(1, 2).contiguous() for c in (k, v))
    return {
        "k_cache": k,
        "v_cache": v,
        "block_table": table,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "kv_layout": layout,
    }


def expected(q: torch.Tensor, cache: dict[str, Any], starts: list[int], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of the reference, from the values that are stored."""
    options.pop("max_seqlen", None)
    values = {name: cache[name].float() for name in ("k_cache", "v_cache")}
    cu_seqlens_q = torch.tensor(starts, dtype=torch.int32)
    out, lse = attend(check_call(q.float(), **{**cache, **values}, cu_seqlens_q=cu_seqlens_q, **options))
    return torch.from_numpy(out), torch.from_numpy(lse)


def check_decode(
    lengths: list[int], *, heads: int, seed: int = 0, q_dtype: torch.dtype | None = None, num_splits: int = 0, **options: Any
) -> None:
    shape = {name: options.pop(name) for name in ("block_size", "kv_heads", "dim", "dtype", "layout")}
    cache = cached(lengths, **shape, seed=seed)
    q = torch.from_numpy(default_rng(seed + 1).standard_normal((len(lengths), heads, shape["dim"]))).to(q_dtype or shape["dtype"])
    out, lse = decode(q, **cache, num_splits=num_splits, return_lse=True, **options)
    want, want_lse = expected(q, cache, list(range(len(lengths) + 1)), **options)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), want, **TOLERANCE[q.dtype])
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


def check_prefill(
    lengths: list[int], chunks: list[int], *, heads: int, seed: int = 0, q_dtype: torch.dtype | None = None, **options: Any
) -> None:
    shape = {name: options.pop(name) for name in ("block_size", "kv_heads", "dim", "dtype", "layout")}
    cache = cached(lengths, **shape, seed=seed)
    starts = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    q = torch.from_numpy(default_rng(seed + 1).standard_normal((starts[-1], heads, shape["dim"]))).to(q_dtype or shape["dtype"])
    out, lse = prefill(q, **cache, cu_seqlens_q=torch.tensor(starts, dtype=torch.int32), return_lse=True, **options)
    want, want_lse = expected(q, cache, starts, **options)
    torch.testing.assert_close(out.double(), want, **TOLERANCE[q.dtype])
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


USUAL: dict[str, Any] = {"heads": 4, "block_size": 16, "kv_heads": 2, "dim": 32, "dtype": torch.float32, "layout": "NHD"}
FP8 = {"dtype": torch.float8_e4m3fn, "q_dtype": torch.bfloat16, "k_scale": 0.5, "v_scale": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "bf16 queries, fp32 cache": {"q_dtype": torch.bfloat16},
    "fp8": FP8,
    "fp8, fp32 queries": {**FP8, "q_dtype": torch.float32},
    "MHA": {"heads": 2},
    "group of 3": {"heads": 6},
    "group of 17": {"heads": 17, "kv_heads": 1},
    "head of 80": {"dim": 80},
    "blocks of 1": {"block_size": 1},
    "blocks of 7": {"block_size": 7},
    "blocks of 256": {"block_size": 256},
    "HND": {"layout": "HND", "kv_heads": 4},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": torch.tensor([0.5, -2.0, 3.0, 0.0])},
    "window of 20": {"window_size": (20, 0)},
    "window of 0": {"window_size": (0, 0)},
    "scale": {"softmax_scale": 0.4},
    "all": {
        **FP8,
        "heads": 6,
        "layout": "HND",
        "block_size": 5,
        "softcap": 3.0,
        "sinks": torch.linspace(-2, 2, 6),
        "window_size": (30, -1),
    },
}


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decode(variant: str, num_splits: int) -> None:
    check_decode([75, 1, 33], **{**USUAL, **VARIANTS[variant]}, num_splits=num_splits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill(variant: str) -> None:
    check_prefill([40, 3, 70], [9, 3, 21], **{**USUAL, **VARIANTS[variant]})


@pytest.mark.parametrize("num_splits", [0, 1, 12])
def test_rows_without_keys_and_more_splits_than_keys(num_splits: int) -> None:
    check_decode([0, 130, 0, 2], **USUAL, num_splits=num_splits)


@pytest.mark.parametrize("window_size", [(-1, -1), (4, 6), (-1, 0), (-1, 30)])
def test_a_chunk_that_sees_to_its_right(window_size: tuple[int, int]) -> None:
    check_prefill([40, 3, 70], [9, 3, 21], **USUAL, causal=False, window_size=window_size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_flash_attention(seqlen_q: int, causal: bool) -> None:
    cache = cached([21, 40], block_size=16, kv_heads=2, dim=32, dtype=torch.float32, layout="NHD")
    layout = cache.pop("kv_layout")
    q = torch.from_numpy(default_rng(1).standard_normal((2, seqlen_q, 4, 32))).float()
    out = flash_attn_with_kvcache(q, **cache, causal=causal, num_splits=2, backend="triton")
    rows = {**cache, "kv_layout": layout}
    want, _ = expected(q.flatten(0, 1), rows, [0, seqlen_q, 2 * seqlen_q], causal=causal)
    torch.testing.assert_close(out.flatten(0, 1).double(), want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("chunks", [None, [5, 17]])
def test_a_cascade(chunks: list[int] | None) -> None:
    cache = cached([70, 90], block_size=16, kv_heads=2, dim=32, dtype=torch.float32, layout="NHD")
    table = cache["block_table"]
    table[1, :3] = table[0, :3]
    starts = [0, 1, 2] if chunks is None else [0, chunks[0], sum(chunks)]
    q = torch.from_numpy(default_rng(1).standard_normal((starts[-1], 4, 32))).float()
    places = {} if chunks is None else {"cu_seqlens_q": torch.tensor(starts, dtype=torch.int32)}
    options: dict[str, Any] = {"sinks": torch.tensor([0.5, -2.0, 3.0, 0.0]), "softcap": 2.0}
    out, lse = cascade_attention(
        q, **cache, **places, **options, num_shared_tokens=48, num_splits=2, return_lse=True, backend="triton"
    )
    want, want_lse = expected(q, cache, starts, **options)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


def test_a_query_may_see_nothing_in_its_tiles_first_keys() -> None:
    check_prefill([80], [60], **{**USUAL, "heads": 2, "dim": 128}, window_size=(3, 0))


def test_a_chunk_of_nothing() -> None:
    check_prefill([0, 20, 7, 12], [0, 4, 0, 12], **USUAL)


def test_the_heuristic_splits_a_single_long_row() -> None:
    check_decode([700], **{**USUAL, "kv_heads": 4})


def test_a_row_longer_than_the_host_expected_is_read_whole() -> None:
    check_decode([300, 20], **USUAL, num_splits=3, max_seqlen=64)


def test_a_table_far_wider_than_the_rows_does_not_leave_them_to_one_piece() -> None:
    """Tables as wide as a sequence may become are usual: each piece still has its part of the keys."""
    cache = cached([200, 75], block_size=16, kv_heads=2, dim=32, dtype=torch.float32, layout="NHD")
    cache["block_table"] = torch.nn.functional.pad(cache["block_table"], (0, 1000), value=-1)
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagedkv.kernels.triton_decode.merge_kernel", {(8,): lambda *given, **_: seen.append(given[1].clone())})
        decode(torch.randn(2, 4, 32), **cache, num_splits=4)
    assert torch.isfinite(seen[0][0]).all()  # the log-sum-exp of each piece of the longer row: it saw keys
    check_decode([200, 75], **USUAL, num_splits=4)


def test_numbers_that_are_no_known_type_are_refused() -> None:
    cache = cached([21], block_size=16, kv_heads=2, dim=32, dtype=torch.float32, layout="NHD")
    stored = {name: cache[name].to(torch.float8_e4m3fn).view(torch.uint8) for name in ("k_cache", "v_cache")}
    with pytest.raises(KernelError, match=r"caches of torch.uint8: needs float32, .*float8_e4m3fn, the last in caches only"):
        decode(torch.randn(1, 4, 32), **{**cache, **stored})


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_each_token_is_written_to_its_slot_and_padding_nowhere(layout: str, dtype: torch.dtype) -> None:
    pool = torch.randint(0, 99, (7, 2, 4, 3, 24)).to(dtype)
    if layout == "HND":
        pool = pool.swapaxes(2, 3).contiguous().swapaxes(2, 3)
    new = torch.randint(100, 199, (5, 2, 3, 24)).to(dtype)
    slots = torch.tensor([27, -1, 3, 4, -1])
    want = pool.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[slot // 4, :, slot % 4] = new[token]
    write_slots(new[:, 0], new[:, 1], pool[:, 0], pool[:, 1], slots)
    assert (pool == want).all()
    k_cache, v_cache = torch.zeros(7, 4, 3, 24, dtype=dtype), pool[:, 1]
    write_slots(new[:, 0], new[:, 1], k_cache, v_cache, slots)  # strides need not be the same
    assert (k_cache.flatten(0, 1)[[27, 3, 4]] == new[[0, 2, 3], 0]).all()
    assert (pool == want).all()
    write_slots(new[:0, 0], new[:0, 1], pool[:, 0], pool[:, 1], slots[:0])
    apart = torch.stack([new[:, 0], new[:, 1]], dim=-1)  # elements of a head do not lie side by side
    write_slots(apart[..., 1], apart[..., 0], pool[:, 1], pool[:, 0], slots)
    assert (pool == want).all()


def test_out_may_be_a_view_and_queries_too() -> None:
    cache = cached([21, 40], block_size=16, kv_heads=2, dim=32, dtype=torch.float32, layout="NHD")
    packed = torch.randn(2, 8, 32)
    out = torch.full((2, 8, 32), 7.0)
    assert decode(packed[:, :4], **cache, out=out[:, 4:]).data_ptr() == out[:, 4:].data_ptr()
    torch.testing.assert_close(out[:, 4:].double(), expected(packed[:, :4], cache, [0, 1, 2])[0], **TOLERANCE[torch.float32])
    assert (out[:, :4] == 7.0).all()


@pytest.mark.parametrize("name", ["q", "k_cache", "block_table", "cache_seqlens", "out"])
def test_strides_that_would_be_misread_are_refused(name: str) -> None:
    cache = cached([21, 40], block_size=16, kv_heads=2, dim=32, dtype=torch.float32, layout="NHD")
    arguments = {"q": torch.randn(2, 4, 32), "out": torch.empty(2, 4, 32), **cache}
    arguments[name] = torch.stack([arguments[name]] * 2, dim=-1)[..., 0]
    with pytest.raises(KernelError, match=f"{name} has strides .* needs its last axis contiguous"):
        decode(**arguments)


def test_a_pool_of_interleaved_keys_and_values() -> None:
    cache = cached([21, 40], block_size=16, kv_heads=2, dim=32, dtype=torch.float32, layout="NHD")
    pool = torch.stack([cache["k_cache"], cache["v_cache"]], dim=1)
    q = torch.randn(2, 4, 32)
    want = decode(q, **cache)
    torch.testing.assert_close(decode(q, **{**cache, "k_cache": pool[:, 0], "v_cache": pool[:, 1]}), want)
    torch.testing.assert_close(decode(q, **{**cache, "v_cache": pool[:, 1]}), want)  # strides need not be the same
    chunk, starts = torch.randn(9, 4, 32), torch.tensor([0, 2, 9], dtype=torch.int32)
    want = prefill(chunk, **cache, cu_seqlens_q=starts)
    torch.testing.assert_close(prefill(chunk, **{**cache, "k_cache": pool[:, 0]}, cu_seqlens_q=starts), want)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    options: dict[str, Any] = {
        "kv_heads": kv_heads,
        "heads": kv_heads * group,
        "block_size": draw(st.integers(1, 40)),
        "dim": draw(st.sampled_from([16, 24, 64])),
        "dtype": dtype,
        "layout": draw(st.sampled_from(["NHD", "HND"])),
        "window_size": (draw(st.integers(-1, 60)), -1),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "seed": draw(st.integers(0, 99)),
    }
    return options


@settings(max_examples=15)
@given(shapes(), st.lists(st.integers(0, 90), min_size=1, max_size=3), st.integers(1, 4))
def test_any_decode(options: dict[str, Any], lengths: list[int], num_splits: int) -> None:
    check_decode(lengths, **options, num_splits=num_splits)


@settings(max_examples=10)
@given(shapes(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=3))
def test_any_prefill(options: dict[str, Any], rows: list[tuple[int, int]]) -> None:
    check_prefill([before + new for before, new in rows], [new for _, new in rows], **options)
