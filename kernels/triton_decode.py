"""Decode attention in Triton: one query per sequence, keys and values through the block table.

One program serves the query heads of one KV head, so K and V are read once for all of them, for one piece of one sequence. With
several pieces the partial results are merged by their log-sum-exp in a second, small kernel.
"""
# ruff: noqa: N803, SIM102  names and `if`s of compile-time constants are as usual in Triton
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from pagedkv.kernels.contract import nhd
from pagedkv.kernels.split_heuristic import MAX_SPLITS, num_splits_for
from pagedkv.kernels.triton_tile import LN2, LOG2E, check_rows, compute_dtype, load_rows, softmax_step

TILE_BYTES = 8192
"""Bytes of one tile of K or V. Two of each are in shared memory: two thread blocks fit a DGX Spark's multiprocessor (100 KB)."""

MERGE_ROWS = 16
"""Partial results that the merge reads at once."""

VARYING = ("window_left", "tokens_per_split", "stride_table_row", "stride_lse_row", "stride_lse_head", "num_splits")
"""What changes from step to step, or from layer to layer: the compiler must not make a version of the kernel for each that is 1, or
a multiple of 16. Nothing is read 16 bytes at a time by these."""


@triton.jit(do_not_specialize=VARYING)
def decode_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    cache_seqlens,
    sinks,
    out,
    lse,
    scale,
    v_scale,
    softcap,
    window_left,
    tokens_per_split,
    num_kv_heads,
    stride_q_row,
    stride_q_head,
    stride_k_block,
    stride_k_slot,
    stride_k_head,
    stride_v_block,
    stride_v_slot,
    stride_v_head,
    stride_table_row,
    stride_out_row,
    stride_out_head,
    stride_out_split,
    stride_lse_row,
    stride_lse_head,
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
    """Attend from the GROUP query heads of one KV head to one piece of one row's keys. Grid: (rows * num_kv_heads, num_splits)."""
    row = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)

    # This program's keys. Pieces of the size that the host asks for take the same time, however long rows are; a row that is too
    # long for them has larger ones.
    seqlen = tl.load(cache_seqlens + row)
    first = tl.where(window_left >= 0, tl.maximum(seqlen - 1 - window_left, 0), 0)
    piece = tl.maximum(tokens_per_split, tl.cdiv(tl.cdiv(seqlen - first, tl.num_programs(1)), BLOCK_N) * BLOCK_N)
    begin = first + split * piece
    end = tl.minimum(begin + piece, seqlen)

    columns = tl.arange(0, BLOCK_D)
    members = tl.arange(0, BLOCK_M)  # query heads of this KV head, padded to what the matrix units take
    heads = kv_head * GROUP + members
    real = members < GROUP
    q_mask = real[:, None] & (columns < HEAD_DIM)[None, :]
    queries = tl.load(q + row * stride_q_row + heads[:, None] * stride_q_head + columns[None, :], mask=q_mask, other=0.0).to(
        COMPUTE
    )

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a sink is a key without a value: the first piece counts it
        if split == 0:
            row_max = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * LOG2E
            row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table_row = block_table + row * stride_table_row
    k_head = k_cache + kv_head.to(tl.int64) * stride_k_head
    v_head = v_cache + kv_head.to(tl.int64) * stride_v_head
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_N)
        present = positions < end
        k = load_rows(k_head, table_row, positions, present, columns, stride_k_block, stride_k_slot, BLOCK_SIZE, HEAD_DIM)
        v = load_rows(v_head, table_row, positions, present, columns, stride_v_block, stride_v_slot, BLOCK_SIZE, HEAD_DIM)
        row_max, row_sum, acc = softmax_step(
            queries, k, v, present[None, :], row_max, row_sum, acc, scale, softcap, COMPUTE, HAS_SOFTCAP, BLOCK_M >= 16
        )

    result = acc * (v_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    out_rows = out + row * stride_out_row + heads[:, None].to(tl.int64) * stride_out_head + split * stride_out_split
    tl.store(out_rows + columns[None, :], result.to(out.dtype.element_ty), mask=q_mask)
    if HAS_LSE:
        tl.store(lse + row * stride_lse_row + heads * stride_lse_head + split, (row_max + tl.log2(row_sum)) * LN2, mask=real)


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    partial,
    partial_lse,
    out,
    lse,
    num_heads,
    num_splits,
    stride_out_row,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Merge the partial results [row, head, split, dim] of one row's head. Grid: (rows * num_heads,)."""
    pair = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_S)
    logs = tl.load(partial_lse + pair * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
    highest = tl.max(logs, axis=0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2((logs - reference) * LOG2E), axis=0)
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, ROWS):
        rows = start + tl.arange(0, ROWS)
        log = tl.load(partial_lse + pair * num_splits + rows, mask=rows < num_splits, other=float("-inf"))
        used = (log > float("-inf"))[:, None] & (columns < HEAD_DIM)[None, :]
        values = tl.load(partial + (pair * num_splits + rows[:, None]) * HEAD_DIM + columns[None, :], mask=used, other=0.0)
        acc += tl.sum(values * tl.exp2((log - reference) * LOG2E)[:, None], axis=0)
    acc /= tl.where(total == 0.0, 1.0, total)
    where = out + (pair // num_heads) * stride_out_row + (pair % num_heads) * stride_out_head
    tl.store(where + columns, acc.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
    if HAS_LSE:
        tl.store(lse + pair, reference + tl.log2(total) * LN2)


def decode_options(head_dim: int, group: int, kv_itemsize: int) -> dict[str, int]:
    """Return the tile shapes and launch options for a shape: what the ahead-of-time check compiles and the launch uses.

    Args:
        head_dim: Elements of a head.
        group: Query heads per KV head.
        kv_itemsize: Bytes of a cache element.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))  # fewer columns the matrix units do not take
    block_m = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    block_n = min(128, max(16, TILE_BYTES // (block_d * kv_itemsize)))
    # The compiler counts the load of a block-table entry and the load of the tile behind it as two stages each.
    stages, num_warps = 3 if block_m == 1 else 5, 4
    if block_n * block_d * kv_itemsize > 2 * TILE_BYTES:  # the smallest tile is that large: one at a time fits a DGX Spark
        stages = 2
    if block_m * block_d * kv_itemsize >= 1 << 16:  # so are the queries
        stages, num_warps = 1, 8
    return {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_warps": num_warps}


@cache
def _num_slots(device: torch.device) -> int:
    """Return how many thread blocks of the decode kernel run at once, two per multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    max_seqlen: int | None = None,
) -> Any:
    """Attend from one query per row to that row's cached keys. Arguments are checked by the caller (`dispatch`), not here.

    Args:
        q: Queries [batch, num_q_heads, head_dim]; fp32, fp16 or bf16.
        k_cache: Keys [num_blocks, block_size, num_kv_heads, head_dim], or HND; any strides, elements of a head contiguous.
        v_cache: Values, as `k_cache`.
        block_table: Blocks of each row [batch, max_blocks], int32.
        cache_seqlens: Keys of each row [batch], int32; 0 gives output 0 and LSE -inf.
        softmax_scale: Factor of the scores; None is head_dim ** -0.5.
        out: Where the result goes; None makes a new tensor like `q`.
        num_splits: Pieces that a row's keys are split into; 0 lets the heuristic choose.
        return_lse: Whether to return the log-sum-exp too.
        k_scale: What a stored key is multiplied by (fp8).
        v_scale: What a stored value is multiplied by (fp8).
        window_size: (left, right) as FlashAttention; left tokens before the query are visible, -1 is all.
        softcap: Scores become softcap * tanh(score / softcap); 0 leaves them.
        sinks: One extra logit per query head [num_q_heads] that takes softmax mass and gives no value.
        kv_layout: "NHD" or "HND".
        max_seqlen: Longest row, if the caller knows it: then pieces have one size for all rows. Else the table's width counts, that
            may be far more, and each row is split into as many pieces. It only guides the splitting.

    Returns:
        out [batch, num_q_heads, head_dim], or (out, lse [batch, num_q_heads] fp32, natural log).
    """
    k_view, v_view = nhd(k_cache, kv_layout), nhd(v_cache, kv_layout)
    batch, num_heads, head_dim = q.shape
    tensors = {"block_table": block_table, "cache_seqlens": cache_seqlens, "sinks": sinks, "out": out}
    check_rows(q=q, k_cache=k_view, v_cache=v_view, **tensors)
    block_size, num_kv_heads = k_view.shape[1:3]
    group = num_heads // num_kv_heads
    options = decode_options(head_dim, group, k_cache.element_size())
    block_n = options["BLOCK_N"]
    longest = block_table.shape[1] * block_size if max_seqlen is None else max_seqlen
    if window_size[0] >= 0:
        longest = min(longest, window_size[0] + 1)
    tiles = -(-longest // block_n)
    splits = min(num_splits, MAX_SPLITS) or num_splits_for(batch * num_kv_heads, tiles, _num_slots(q.device))
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(batch, num_heads, dtype=torch.float32, device=q.device) if return_lse else None
    if batch:
        whole = splits == 1
        part = out if whole else torch.empty(batch, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        part_lse = lse if whole else torch.empty(batch, num_heads, splits, dtype=torch.float32, device=q.device)
        decode_kernel[(batch * num_kv_heads, splits)](
            q,
            k_view,
            v_view,
            block_table,
            cache_seqlens,
            sinks,
            part,
            part_lse,
            (head_dim**-0.5 if softmax_scale is None else softmax_scale) * k_scale,
            v_scale,
            softcap,
            window_size[0],
            block_n if max_seqlen is None else -(-tiles // splits) * block_n,
            num_kv_heads,
            *q.stride()[:2],
            *k_view.stride()[:3],
            *v_view.stride()[:3],
            block_table.stride(0),
            *part.stride()[:2],
            0 if whole else head_dim,
            num_heads * splits,
            splits,
            HEAD_DIM=head_dim,
            GROUP=group,
            BLOCK_SIZE=block_size,
            COMPUTE=compute_dtype(q.dtype, k_cache.dtype),
            HAS_SOFTCAP=softcap > 0.0,
            HAS_SINKS=sinks is not None,
            HAS_LSE=part_lse is not None,
            **options,
        )
        if not whole:
            merge_kernel[(batch * num_heads,)](
                part,
                part_lse,
                out,
                lse,
                num_heads,
                splits,
                *out.stride()[:2],
                HEAD_DIM=head_dim,
                BLOCK_D=options["BLOCK_D"],
                BLOCK_S=MAX_SPLITS,
                ROWS=MERGE_ROWS,
                HAS_LSE=return_lse,
                num_warps=4,
            )
    return (out, lse) if return_lse else out
