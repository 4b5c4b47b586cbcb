"""Writing to the cache in Triton: new keys and values into their slots, in one launch, without a look at the slots by the host."""
# ruff: noqa: N803  names of compile-time constants are as usual in Triton
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def write_kernel(
    key,
    value,
    k_cache,
    v_cache,
    slot_mapping,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_k_block,
    stride_k_slot,
    stride_k_head,
    stride_v_block,
    stride_v_slot,
    stride_v_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write one token's keys and values of all heads. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    elements = tl.arange(0, BLOCK)
    heads, columns, mask = elements // HEAD_DIM, elements % HEAD_DIM, elements < NUM_HEADS * HEAD_DIM
    keys = tl.load(key + token * stride_key_token + heads * stride_key_head + columns, mask=mask)
    values = tl.load(value + token * stride_value_token + heads * stride_value_head + columns, mask=mask)
    k_slot = k_cache + block * stride_k_block + offset * stride_k_slot
    v_slot = v_cache + block * stride_v_block + offset * stride_v_slot
    tl.store(k_slot + heads.to(tl.int64) * stride_k_head + columns, keys, mask=mask)
    tl.store(v_slot + heads.to(tl.int64) * stride_v_head + columns, values, mask=mask)


def write_slots(key: Any, value: Any, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write tokens [tokens, num_kv_heads, head_dim] to their slots, -1 skips. Shapes and types are checked by `cache_ops`.

    Args:
        key: Keys, of the caches' type.
        value: Values.
        k_cache: Keys' cache as NHD, any strides but for the last axis, whose elements lie side by side.
        v_cache: Values' cache.
        slots: By token [tokens], int64, on the GPU.
    """
    tokens, num_heads, head_dim = key.shape
    new = [part if part.stride(-1) == 1 else part.contiguous() for part in (key, value)]
    if tokens:
        write_kernel[(tokens,)](
            *new,
            k_cache,
            v_cache,
            slots,
            *new[0].stride()[:2],
            *new[1].stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK=triton.next_power_of_2(num_heads * head_dim),
            BLOCK_SIZE=k_cache.shape[1],
            num_warps=4,
        )
