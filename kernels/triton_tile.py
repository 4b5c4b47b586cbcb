"""What the Triton kernels share: reading rows through the block table, and one step of the online softmax.

Everything is in base 2 inside (`exp2` is what the hardware has); the natural log comes back when an LSE is stored. Accumulators are
fp32.
"""
# ruff: noqa: N803  names and `if`s of compile-time constants are as usual in Triton
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl

from pagedkv.kernels.contract import KernelError, need

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True under TRITON_INTERPRET=1: kernels run as Python, on CPU tensors."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FP8 = torch.float8_e4m3fn


def compute_dtype(q: torch.dtype, kv: torch.dtype) -> tl.dtype:
    """Return the type that the matrix units multiply in: the wider of the two, q's where the cache is fp8.

    The interpreter multiplies the raw bits of bf16 in `tl.dot`, so everything is fp32 there.

    Raises:
        KernelError: For a type that the kernels do not read, such as fp8 that is kept as uint8.
    """
    if q not in _DTYPES or not (kv in _DTYPES or kv == FP8):
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*_DTYPES, FP8))
        raise KernelError(f"queries of {q}, caches of {kv}: needs {kinds}, the last in caches only")
    if INTERPRETED:
        return tl.float32
    return _DTYPES[q if kv == FP8 else torch.promote_types(q, kv)]


def check_rows(**tensors: torch.Tensor | None) -> None:
    """Raise KernelError unless the elements of each tensor's last axis lie side by side: the kernels take that for granted."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and tensor.shape[-1] > 1:
            need(tensor.stride(-1) == 1, f"{name} has strides {tensor.stride()}: needs its last axis contiguous")


@triton.jit
def load_rows(
    cache, table_row, positions, present, columns, stride_block, stride_slot, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Load the K or V vectors [BLOCK_N, BLOCK_D] of one KV head at `positions`, 0 where not `present`.

    An entry of the table that is not present is never used, so padding (-1) and NaN in unused slots do no harm. Offsets are int64:
    a cache of more than 2**31 elements is ordinary.
    """
    block = tl.load(table_row + positions // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
    row = block * stride_block + (positions % BLOCK_SIZE).to(tl.int64) * stride_slot
    mask = present[:, None]
    if columns.shape[0] != HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(cache + row[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def softmax_step(
    q, k, v, visible, row_max, row_sum, acc, scale, softcap, COMPUTE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, USE_DOT: tl.constexpr
):
    """Attend to one tile of keys and return the new (row_max, row_sum, acc).

    Args:
        q: Queries [BLOCK_M, BLOCK_D] in COMPUTE.
        k: Keys [BLOCK_N, BLOCK_D] as stored.
        v: Values [BLOCK_N, BLOCK_D] as stored.
        visible: Which query sees which key, broadcastable to [BLOCK_M, BLOCK_N].
        row_max: Largest score so far [BLOCK_M], base 2; -inf before the first visible key.
        row_sum: Sum of 2**(score - row_max) so far [BLOCK_M].
        acc: Sum of values so weighted [BLOCK_M, BLOCK_D].
        scale: Softmax scale times the keys' scale.
        softcap: Scores become softcap * tanh(score / softcap) if HAS_SOFTCAP.
        COMPUTE: The type of the products' operands.
        HAS_SOFTCAP: Whether to cap.
        USE_DOT: Whether rows are many enough for the matrix units; else plain multiplications, exact in fp32.
    """
    if USE_DOT:
        scores = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision="ieee") * scale
    else:
        scores = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], axis=2) * scale
    if HAS_SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores / softcap * (2.0 * LOG2E)) + 1.0))
    scores = tl.where(visible, scores * LOG2E, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf minus -inf would be NaN
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(row_max - reference)
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    if USE_DOT:
        acc = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), acc, input_precision="ieee")
    else:
        acc += tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], axis=1)
    return new_max, row_sum, acc
