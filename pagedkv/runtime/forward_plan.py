"""What one forward pass writes and reads: made once, used by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagedkv.arrays import BoolArray, Int32Array


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
    counts = real.sum(1)
    ends = np.asarray(seqlens, np.int32)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    sequences = np.repeat(np.arange(batch), counts)
    positions = np.arange(starts[-1]) - starts[sequences] + (ends - counts)[sequences]
    padded, slots = [], []
    for group, size in zip(tables, block_sizes, strict=True):
        table = np.full((batch, max(1, *(blocks.size for blocks in group))), -1, np.int32)
        for row, blocks in zip(table, group, strict=True):
            row[: blocks.size] = blocks
        padded.append(table)
        slots.append(table[sequences, positions // size].astype(np.int64) * size + positions % size)
    return ForwardPlan(
        first_column=first_column,
        last_column=first_column + columns,
        tokens=None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device),
        slot_mapping=tuple(torch.from_numpy(group).to(device) for group in slots),
        block_tables=tuple(torch.from_numpy(table).to(device) for table in padded),
        cache_seqlens=torch.from_numpy(ends).to(device),
        cu_seqlens_q=None if (counts == 1).all() else torch.from_numpy(starts).to(device),
    )
