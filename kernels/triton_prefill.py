"""Prefill attention in Triton: chunks of queries of several sequences, usually causal, keys and values through the block table.

A tile holds whole queries with all query heads of one KV head, so that K and V are read once for them. Which sequence a tile
belongs to is found on the device: the host needs no lengths, and a launch can be captured in a CUDA graph.
"""
# ruff: noqa: N803, N806, FBT003  names and `if`s of compile-time constants are as usual in Triton
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from pagedkv.kernels.contract import nhd
from pagedkv.kernels.triton_tile import LN2, LOG2E, check_rows, compute_dtype, load_rows, softmax_step


@triton.jit
def find_sequence(cu_seqlens_q, tile, num_seqs, BLOCK_Q: tl.constexpr):
    """Return the sequence of a tile: the last one whose first tile, cu_seqlens_q[i] // BLOCK_Q + i, is not behind it."""
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


VARYING = ("window_left", "window_right", "num_seqs", "stride_table_row")
"""As in `triton_decode`: what the compiler must not make versions of the kernel for."""


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    cu_seqlens_q,
    cache_seqlens,
    sinks,
    out,
    lse,
    scale,
    v_scale,
    softcap,
    window_left,
    window_right,
    num_seqs,
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_slot,
    stride_k_head,
    stride_v_block,
    stride_v_slot,
    stride_v_head,
    stride_table_row,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Attend from BLOCK_M // GROUP queries of one sequence, with the GROUP heads of one KV head. Grid: (tiles, num_kv_heads)."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = find_sequence(cu_seqlens_q, tile, num_seqs, BLOCK_Q)
    q_begin = tl.load(cu_seqlens_q + row)
    num_queries = tl.load(cu_seqlens_q + row + 1) - q_begin
    first_query = (tile - (q_begin // BLOCK_Q + row)) * BLOCK_Q
    if first_query >= num_queries:  # the grid is an upper bound
        return
    seqlen = tl.load(cache_seqlens + row)

    columns = tl.arange(0, BLOCK_D)
    members = tl.arange(0, BLOCK_M)
    query = first_query + members // GROUP
    heads = kv_head * GROUP + members % GROUP
    real = (members < BLOCK_Q * GROUP) & (query < num_queries)
    at = seqlen - num_queries + query  # each query's position: the chunk is the end of the sequence
    q_mask = real[:, None] & (columns < HEAD_DIM)[None, :]
    token = (q_begin + query).to(tl.int64)
    queries = tl.load(
        q + token[:, None] * stride_q_token + heads[:, None] * stride_q_head + columns[None, :], mask=q_mask, other=0.0
    ).to(COMPUTE)

    # Keys that any query of the tile sees.
    last_query = tl.minimum(first_query + BLOCK_Q, num_queries) - 1
    end = tl.where(window_right >= 0, tl.minimum(seqlen - num_queries + last_query + 1 + window_right, seqlen), seqlen)
    begin = tl.where(window_left >= 0, tl.maximum(seqlen - num_queries + first_query - window_left, 0), 0)
    oldest = tl.where(window_left >= 0, at - window_left, 0)
    newest = tl.where(window_right >= 0, at + window_right, seqlen)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        row_max = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * LOG2E
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table_row = block_table + row.to(tl.int64) * stride_table_row
    k_head = k_cache + kv_head.to(tl.int64) * stride_k_head
    v_head = v_cache + kv_head.to(tl.int64) * stride_v_head
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_N)
        present = positions < end
        k = load_rows(k_head, table_row, positions, present, columns, stride_k_block, stride_k_slot, BLOCK_SIZE, HEAD_DIM)
        v = load_rows(v_head, table_row, positions, present, columns, stride_v_block, stride_v_slot, BLOCK_SIZE, HEAD_DIM)
        visible = present[None, :] & (positions[None, :] >= oldest[:, None]) & (positions[None, :] <= newest[:, None])
        row_max, row_sum, acc = softmax_step(
            queries, k, v, visible, row_max, row_sum, acc, scale, softcap, COMPUTE, HAS_SOFTCAP, True
        )

    result = acc * (v_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    out_rows = out + token[:, None] * stride_out_token + heads[:, None] * stride_out_head
    tl.store(out_rows + columns[None, :], result.to(out.dtype.element_ty), mask=q_mask)
    if HAS_LSE:
        tl.store(lse + token * stride_lse_token + heads, (row_max + tl.log2(row_sum)) * LN2, mask=real)


def prefill_options(head_dim: int, group: int, q_itemsize: int, capability: int) -> dict[str, int]:
    """Return the tile shapes and launch options for a shape: the largest that spill nothing.

    Args:
        head_dim: Elements of a head.
        group: Query heads per KV head.
        q_itemsize: Bytes of an element in the products.
        capability: Compute capability times 10. Hopper (90) keeps operands of products in shared memory, others in registers.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    wide = q_itemsize == 4 or block_d > 128
    huge = block_d * q_itemsize >= 2048  # the smallest tiles have 32 KiB: of keys and of values one at a time fits a DGX Spark
    rows = 16 if huge else 32 if wide else 128 if capability // 10 == 9 else 64
    block_m = max(rows, triton.next_power_of_2(group))
    return {
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": max(16, 2048 // block_d) if wide else 64,
        "STAGES": 2 if huge else 3,
        "num_warps": 8,
    }


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    causal: bool = True,
) -> Any:
    """Attend from the newest tokens of every row to its cached keys. Arguments are checked by the caller (`dispatch`).

    Args:
        q: Queries of all rows one after the other [total_q, num_q_heads, head_dim]; query j of a row with n sits at seqlen - n + j.
        k_cache: As in `decode`; it already holds the chunk's own keys.
        v_cache: As `k_cache`.
        block_table: Blocks of each row [batch, max_blocks], int32.
        cu_seqlens_q: Where each row's queries begin [batch + 1], int32.
        cache_seqlens: Keys of each row, the chunk included [batch], int32.
        softmax_scale: Factor of the scores; None is head_dim ** -0.5.
        out: Where the result goes; None makes a new tensor like `q`.
        return_lse: Whether to return the log-sum-exp too.
        k_scale: What a stored key is multiplied by (fp8).
        v_scale: What a stored value is multiplied by (fp8).
        window_size: (left, right) as FlashAttention; right is 0 if causal.
        softcap: Scores become softcap * tanh(score / softcap); 0 leaves them.
        sinks: One extra logit per query head [num_q_heads].
        kv_layout: "NHD" or "HND".
        causal: Whether a query sees nothing to its right.

    Returns:
        out [total_q, num_q_heads, head_dim], or (out, lse [total_q, num_q_heads] fp32, natural log).
    """
    k_view, v_view = nhd(k_cache, kv_layout), nhd(v_cache, kv_layout)
    total, num_heads, head_dim = q.shape
    tensors = {"block_table": block_table, "cu_seqlens_q": cu_seqlens_q, "cache_seqlens": cache_seqlens, "sinks": sinks, "out": out}
    check_rows(q=q, k_cache=k_view, v_cache=v_view, **tensors)
    block_size, num_kv_heads = k_view.shape[1:3]
    group = num_heads // num_kv_heads
    compute = compute_dtype(q.dtype, k_cache.dtype)
    options = prefill_options(head_dim, group, 4 if compute == tl.float32 else 2, _capability(q.device))
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(total, num_heads, dtype=torch.float32, device=q.device) if return_lse else None
    num_seqs = cache_seqlens.shape[0]
    tiles = total // (options["BLOCK_M"] // group) + num_seqs
    if total and num_seqs:
        prefill_kernel[(tiles, num_kv_heads)](
            q,
            k_view,
            v_view,
            block_table,
            cu_seqlens_q,
            cache_seqlens,
            sinks,
            out,
            lse,
            (head_dim**-0.5 if softmax_scale is None else softmax_scale) * k_scale,
            v_scale,
            softcap,
            window_size[0],
            0 if causal else window_size[1],
            num_seqs,
            *q.stride()[:2],
            *k_view.stride()[:3],
            *v_view.stride()[:3],
            block_table.stride(0),
            *out.stride()[:2],
            num_heads,
            HEAD_DIM=head_dim,
            GROUP=group,
            BLOCK_SIZE=block_size,
            COMPUTE=compute,
            HAS_SOFTCAP=softcap > 0.0,
            HAS_SINKS=sinks is not None,
            HAS_LSE=return_lse,
            **options,
        )
    return (out, lse) if return_lse else out
