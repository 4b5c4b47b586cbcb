"""Which blocks hold the tokens of each row of the running batch."""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array


def block_slots(blocks: Sequence[int] | Int32Array | Int64Array, size: int, first: int = 0, last: int | None = None) -> Int64Array:
    """Return the slots of `blocks`, block after block; slot = block * size + offset. O(slots).

    Args:
        blocks: Block ids.
        size: Slots in a block.
        first: First offset wanted of each.
        last: One past the last offset wanted; None: to the end of the block.

    Example:
        >>> block_slots([2, 0], 4).tolist(), block_slots([2, 0], 4, 1, 3).tolist()
        ([8, 9, 10, 11, 0, 1, 2, 3], [9, 10, 1, 2])
    """
    starts, offsets = np.asarray(blocks, np.int64) * size, np.arange(first, size if last is None else last)
    slots: Int64Array = (starts[:, None] + offsets).reshape(-1)
    return slots


class BlockTables:
    """One block table per row: token t of row r lies in block `blocks[r, t // block_size]`, at offset t % block_size.

    The array `blocks`, int32 [max_num_seqs, max_blocks_per_row], is the one that attention kernels read. Entries at and beyond
    `num_blocks[r]` are stale: never read them.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: Int32Array = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_blocks: Int32Array = np.zeros(max_num_seqs, np.int32)

    def of(self, row: int) -> Int32Array:
        """Return the block table of `row`, a view."""
        return self.blocks[row, : self.num_blocks[row]]

    def slot_mapping(self, row: int, first: int, last: int) -> Int64Array:
        """Return the slots of tokens `first` to `last` (exclusive) of `row`: block * block_size + offset."""
        tokens = np.arange(first, last)
        blocks: Int64Array = self.blocks[row, tokens // self.block_size].astype(np.int64)
        return blocks * self.block_size + tokens % self.block_size
