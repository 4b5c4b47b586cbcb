"""What memory of a running batch has in common if each of its blocks comes from one pool: gauges, block tables, and forks."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_pool import BlockPool
from pagedkv.errors import ConfigError
from pagedkv.free_queue import NUM_KEYED, NUM_SHARES
from pagedkv.shared_tails import NUM_COPIES, NUM_FORKS
from pagedkv.step_memory import free_row


class PooledMemory(ABC):
    """Block tables by row, one for each group of layers, over one pool. Rows can share blocks until one of them writes there."""

    name: str
    rounding_slots = 0
    arrays: Any
    """What compiled code works on."""
    rules: Any
    """How it is given, as plain numbers."""

    def __init__(self, settings: KVPoolSettings, *, unit_slots: int, num_groups: int, state_units: int) -> None:
        """Make an empty pool of blocks of `unit_slots`, of which each running row takes `state_units` for its state."""
        self.pool = BlockPool(num_blocks=settings.num_blocks, enable_caching=settings.enable_prefix_caching)
        self.unit_slots, self.hash_block_size, self.state_units = unit_slots, settings.block_size, state_units
        self.usable_slots = (settings.num_blocks - 1) * unit_slots
        self.max_model_len, self.lookahead_slots = settings.max_model_len, settings.lookahead_slots
        self.watermark_blocks = int(settings.watermark * settings.num_blocks)
        """Blocks that an admission must leave free while something runs."""
        self.forks: Int64Array = np.zeros(2, np.int64)
        """See `pagedkv.shared_tails.ForkedMemory`, as of this."""
        self.copy_room: Int32Array = np.zeros((settings.max_num_seqs * num_groups, 2), np.int32)
        """`copies` of that: a row writes to one block in each group."""

    @property
    @abstractmethod
    def group_tables(self) -> Int32Array:
        """Block tables, int32 [groups, max_num_seqs, max_blocks]: null where a window has left a block behind. A view."""

    @property
    @abstractmethod
    def group_lengths(self) -> Int32Array:
        """Blocks in each table, null ones included, int32 [groups, max_num_seqs]. A view."""

    def free(self, row: int) -> None:
        """Give all blocks of `row` back. O(groups + blocks)."""
        free_row(self.arrays, self.rules, row)

    @property
    def cached_slots(self) -> int:
        """Slots in free blocks that keep a prefix for reuse."""
        return int(self.pool.queue[NUM_KEYED]) * self.unit_slots

    @property
    def shared_slots(self) -> int:
        """Slots in blocks that are held more than once, each counted as often as it is held beyond the first time."""
        return int(self.pool.queue[NUM_SHARES]) * self.unit_slots

    @property
    def free_slots(self) -> int:
        """Slots in free blocks."""
        return self.pool.num_free_blocks * self.unit_slots

    @property
    def copies(self) -> Int32Array:
        """Blocks to copy, in this order, before the step decided last computes anything [copies, 2]: source, destination. A view.

        Who writes first into a block that he shares with a fork gets one of his own.
        """
        return self.copy_room[: self.forks[NUM_COPIES]]

    def block_table(self, row: int, group: int = 0) -> Int32Array:
        """Return the table of `row` in a group of layers, null blocks included, a view."""
        table: Int32Array = self.group_tables[group, row, : self.group_lengths[group, row]]
        return table

    def padded_tables(self, rows: Int32Array) -> list[Int32Array]:
        """Return by group of layers the tables of `rows` [rows, longest table], -1 behind the blocks that each has."""
        padded = []
        for tables, lengths in zip(self.group_tables, self.group_lengths, strict=True):
            held = lengths[rows]
            table: Int32Array = tables[rows, : held.max()]
            table[np.arange(table.shape[1]) >= held[:, None]] = -1
            padded.append(table)
        return padded

    @abstractmethod
    def most_tokens(self, num_blocks: int) -> int:
        """Return the longest request that `num_blocks` blocks hold, in tokens that have a slot."""

    def fork(self, row: int, child_row: int, num_tokens: int) -> None:
        """Let `child_row`, which holds nothing, hold the blocks of the first `num_tokens` of `row` too. O(blocks).

        Raises:
            ConfigError: If rows have a state of fixed size, which nobody can share.
        """
        if self.state_units:
            raise ConfigError("a state of fixed size (linear attention, Mamba) cannot be shared: requests cannot be forked")
        for group in range(len(self.group_tables)):
            self._share(group, row, child_row, num_tokens)
        self.forks[NUM_FORKS] += 1

    @abstractmethod
    def _share(self, group: int, row: int, child_row: int, num_tokens: int) -> None:
        """Let a table of `child_row` be that of `row`, as far as `num_tokens`."""
