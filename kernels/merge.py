"""Attention in parts: merging what was attended to apart, and a prefix that all sequences share read once for all."""

import math
import sys
from typing import Any

import numpy as np

from pagedkv.kernels.contract import counting, device_type, host_array, is_torch, narrowed, need, nhd, widened
from pagedkv.kernels.dispatch import paged_attention


def merge_state(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """Merge attention to two disjoint sets of keys into attention to both. Sinks, if any, belong to one of the two.

    Args:
        out_a: Output [..., num_heads, head_dim], numpy or torch; uint16 are bit patterns of bfloat16.
        lse_a: Its log-sum-exp [..., num_heads], natural log; -inf where no key was seen.
        out_b: The other output.
        lse_b: The other log-sum-exp.

    Returns:
        (out, lse), `out` of the type of `out_a`, `lse` in float32.

    Raises:
        KernelError: If shapes differ.
    """
    shapes = [tuple(array.shape) for array in (out_a, lse_a, out_b, lse_b)]
    fits = shapes[0] == shapes[2] and shapes[1] == shapes[3] == shapes[0][:-1]
    need(fits, f"states of shapes {shapes}: need out [..., heads, head_dim] twice and lse [..., heads] twice")
    if is_torch(out_a):
        xp: Any = sys.modules["torch"]
        parts = [array.float() for array in (out_a, lse_a, out_b, lse_b)]
    else:
        xp = np
        parts = [widened(array).astype(np.float32) for array in (out_a, lse_a, out_b, lse_b)]
    a, log_a, b, log_b = parts
    highest = xp.maximum(log_a, log_b)
    base = xp.where(highest == -math.inf, xp.zeros_like(highest), highest)  # -inf minus -inf would be NaN
    weight_a, weight_b = xp.exp(log_a - base), xp.exp(log_b - base)
    total = weight_a + weight_b
    seen = xp.where(total == 0, xp.ones_like(total), total)
    out = a * (weight_a / seen)[..., None] + b * (weight_b / seen)[..., None]
    lse = xp.where(total == 0, highest, base + xp.log(seen))
    return (out.to(out_a.dtype) if is_torch(out_a) else narrowed(out, out_a.dtype)), lse


def cascade_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    num_shared_tokens: int,
    cu_seqlens_q: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    kv_layout: str = "NHD",
    **options: Any,
) -> Any:
    """Attend, reading a prefix that all sequences share once for all their queries instead of once per sequence.

    Args:
        q: As `paged_attention`, like the other arguments and `options`; windows and `out` excluded.
        k_cache: Keys.
        v_cache: Values.
        block_table: Whole tables: each begins with the blocks of the shared prefix.
        cache_seqlens: Whole lengths, prefix included.
        num_shared_tokens: Length of the prefix: full blocks, before every query.
        cu_seqlens_q: As `paged_attention`.
        sinks: As `paged_attention`.
        return_lse: As `paged_attention`.
        kv_layout: "NHD" or "HND".
        **options: Scales, softcap, num_splits, backend.

    Raises:
        KernelError: If the prefix is not shared, or something cannot be cut there.
    """
    block_size = int(nhd(k_cache, kv_layout).shape[1])
    blocks, rest = divmod(num_shared_tokens, block_size)
    need(blocks >= 0 and rest == 0, f"num_shared_tokens is {num_shared_tokens}: needs a multiple of the block size {block_size}")
    need(not {"window_size", "out"} & options.keys(), "a cascade has no window_size and no out: leave them out")
    if device_type(block_table) == "cpu":
        tables, lengths = host_array(block_table), host_array(cache_seqlens)
        queries = 1 if cu_seqlens_q is None else np.diff(host_array(cu_seqlens_q))
        need((lengths - queries >= num_shared_tokens).all(), f"{num_shared_tokens} shared tokens: need to lie before every query")
        same = (tables[:, :blocks] == tables[:1, :blocks]).all()
        need(same, f"the first {blocks} blocks of the tables differ: need to be the same")
    caches: dict[str, Any] = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "kv_layout": kv_layout, "return_lse": True, **options}
    prefix = paged_attention(
        block_table=block_table[:1, :blocks],
        cache_seqlens=counting(1, block_table) + num_shared_tokens,
        cu_seqlens_q=counting(2, block_table) * len(q),
        causal=False,
        **caches,
    )
    own_seqlens = cache_seqlens - num_shared_tokens
    own = paged_attention(
        block_table=block_table[:, blocks:], cache_seqlens=own_seqlens, cu_seqlens_q=cu_seqlens_q, sinks=sinks, **caches
    )
    out, lse = merge_state(*prefix, *own)
    return (out, lse) if return_lse else out
