"""Which blocks hold the tokens of each row of the running batch."""

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array


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
