"""What one forward pass writes and reads: made once, used by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagedkv.arrays import BoolArray, Int32Array, Int64Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardPlan:
    """Tensors on the device of the cache. A column is a place in the padded input, a token what is not padding."""

    first_column: int
    """Columns that were there before."""
    last_column: int
    """Columns after it, exclusive."""
    tokens: torch.Tensor | None
    """Which of the [batch * columns] new places hold a token, row by row; None: all."""
    slot_mapping: tuple[torch.Tensor, ...]
    """By group of layers: the slot of each token."""
    block_tables: tuple[torch.Tensor, ...]
    """By group: blocks of each sequence [batch, max_blocks], int32, padded with -1."""
    cache_seqlens: torch.Tensor
    """Tokens of each sequence, the new ones included [batch], int32."""
    cu_seqlens_q: torch.Tensor | None
    """Sequence i has tokens cu_seqlens_q[i] to cu_seqlens_q[i + 1] of the new ones; None: each has one."""


def plan_forward(
    real: BoolArray,
    *,
    first_column: int,
    seqlens: Sequence[int],
    tables: Sequence[Sequence[Int32Array]],
    block_sizes: Sequence[int],
    device: torch.device,
) -> ForwardPlan:
    """Return the plan of a forward pass over columns of which `real` [batch, columns] hold tokens. O(tokens + blocks).

    Args:
        real: Which of the new places hold a token.
        first_column: Columns before.
        seqlens: By sequence: its tokens, the new ones included.
        tables: By group and sequence: its blocks, which have room for them.
        block_sizes: By group: tokens per block.
        device: Where the tensors go.
    """
    batch, columns = real.shape
    padded = []
    for group in tables:
        table = np.full((batch, max(1, *(blocks.size for blocks in group))), -1, np.int32)
        for row, blocks in zip(table, group, strict=True):
            row[: blocks.size] = blocks
        padded.append(table)
    return plan_tokens(
        real.sum(1),
        np.asarray(seqlens),
        tables=padded,
        block_sizes=block_sizes,
        device=device,
        first_column=first_column,
        last_column=first_column + columns,
        tokens=None if real.all() else np.flatnonzero(real),
    )


def plan_tokens(
    counts: Int64Array,
    seqlens: Int64Array,
    *,
    tables: Sequence[Int32Array],
    block_sizes: Sequence[int],
    device: torch.device,
    first_column: int = 0,
    last_column: int | None = None,
    tokens: Int64Array | None = None,
) -> ForwardPlan:
    """Return the plan of a forward pass over the last counts[i] tokens of each sequence i. O(tokens + blocks).

    Args:
        counts: By sequence: its new tokens.
        seqlens: By sequence: its tokens, the new ones included.
        tables: By group: blocks of each sequence [batch, max_blocks], which have room for them, -1 behind these.
        block_sizes: By group: tokens per block.
        device: Where the tensors go.
        first_column: Columns before; 0 where all new tokens stand in one row, sequence after sequence.
        last_column: Columns after, exclusive; None: one for each new token.
        tokens: Which of the new places hold a token; None: all.
    """
    ends = seqlens.astype(np.int32)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    sequences = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(starts[-1]) - starts[sequences] + (ends - counts)[sequences]
    slots = [
        table[sequences, positions // size].astype(np.int64) * size + positions % size
        for table, size in zip(tables, block_sizes, strict=True)
    ]
    return ForwardPlan(
        first_column=first_column,
        last_column=int(starts[-1]) if last_column is None else last_column,
        tokens=None if tokens is None else torch.from_numpy(tokens).to(device),
        slot_mapping=tuple(torch.from_numpy(group).to(device) for group in slots),
        block_tables=tuple(torch.from_numpy(table).to(device) for table in tables),
        cache_seqlens=torch.from_numpy(ends).to(device),
        cu_seqlens_q=None if (counts == 1).all() else torch.from_numpy(starts).to(device),
    )
