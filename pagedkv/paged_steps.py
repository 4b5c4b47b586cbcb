"""The paged allocator for a whole step at once, in compiled code."""

from typing import Any

import numpy as np

import pagedkv.scheduling.paged_grants  # noqa: F401 - what compiled code does with this kind of memory
from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.block_moves import take_blocks
from pagedkv.block_table import BlockTables
from pagedkv.errors import IntegrityError
from pagedkv.free_queue import NULL_BLOCK, NUM_FREE, Blocks, FreeQueue
from pagedkv.jit import lean_jit
from pagedkv.paged_arrays import PagedArrays, PagedRules
from pagedkv.pooled_memory import PooledMemory
from pagedkv.prefix_cache import Buckets, KeyIndex
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import NEVER


@lean_jit
def _append_slots(
    blocks: Blocks,
    queue: FreeQueue,
    index: KeyIndex,
    buckets: Buckets,
    tables: Int32Array,
    num_blocks: Int32Array,
    block_size: int,
    batch: StepBatch,
    num_entries: int,
) -> int:
    rows, needed = batch["row"], batch["num_slots_needed"]
    for i in range(num_entries):
        row = rows[i]
        held = num_blocks[row]
        if needed[i] >= held * block_size:
            if not take_blocks(blocks, queue, index, buckets, 1, tables[row], held):
                return i
            num_blocks[row] = held + 1
        needed[i] += 1
    return num_entries


@lean_jit
def _allocate_slots(
    blocks: Blocks,
    queue: FreeQueue,
    index: KeyIndex,
    buckets: Buckets,
    tables: Int32Array,
    num_blocks: Int32Array,
    states: Int32Array,
    block_size: int,
    batch: StepBatch,
    first: int,
    last: int,
    num_running: int,
    watermark_blocks: int,
    reserve_full_isl: bool,  # noqa: FBT001
) -> int:
    for i in range(first, last):
        row = batch["row"][i]
        free = queue[NUM_FREE]
        if i >= num_running:
            free -= watermark_blocks if i > 0 else 0  # nothing runs before entry 0: then the watermark is waived
            free -= states.shape[1]
            if reserve_full_isl and -(-batch["num_known_tokens"][i] // block_size) > free:
                return i
        held = num_blocks[row]
        need = -(-batch["num_slots_needed"][i] // block_size) - held
        if need > free:
            return i
        if need > 0:
            take_blocks(blocks, queue, index, buckets, need, tables[row], held)
            num_blocks[row] = held + need
        if i >= num_running:
            take_blocks(blocks, queue, index, buckets, states.shape[1], states[row], 0)
    return last


class PagedStepAllocator(PooledMemory):
    """Blocks of `block_size` tokens, taken as tokens come and given back tail first.

    Prefixes are looked up by a compiled scheduler (`pagedkv.scheduling.vllm_step`), not by the calls of this class.
    """

    name = "paged"
    placement = "block"

    def __init__(self, settings: KVPoolSettings) -> None:
        super().__init__(
            settings, unit_slots=settings.block_size, num_groups=1, state_units=-(-settings.state_slots // settings.block_size)
        )
        self.tables = BlockTables(
            max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len, block_size=settings.block_size
        )
        self.state_tables: Int32Array = np.zeros((settings.max_num_seqs, self.state_units), np.int32)
        """By row: the blocks that hold a running request's state."""
        self.units_held = self.tables.num_blocks
        self.paged_rules = PagedRules(
            int(settings.block_size),
            self.watermark_blocks,
            bool(settings.reserve_full_isl),
            bool(settings.enable_prefix_caching),
            bool(settings.freed_to_front),
        )
        self.paged_arrays = PagedArrays(
            self.pool.blocks,
            self.pool.queue,
            self.pool.cache.index,
            self.pool.cache.buckets,
            self.tables.blocks,
            self.tables.num_blocks,
            np.zeros(settings.max_num_seqs, np.int32),
            self.state_tables,
            np.zeros(self.tables.blocks.shape[1], np.int32),
            self.forks,
            self.copy_room,
        )
        self.arrays: Any = self.paged_arrays
        self.rules: Any = self.paged_rules

    @property
    def group_tables(self) -> Int32Array:
        """Block tables, int32 [1, max_num_seqs, max_blocks]. A view."""
        return self.tables.blocks[None]

    @property
    def group_lengths(self) -> Int32Array:
        """Blocks in each table, int32 [1, max_num_seqs]. A view."""
        return self.tables.num_blocks[None]

    def most_tokens(self, num_blocks: int) -> int:
        """Return the longest request that `num_blocks` blocks hold, in tokens that have a slot."""
        return (num_blocks - self.state_units) * self.unit_slots

    def _share(self, group: int, row: int, child_row: int, num_tokens: int) -> None:
        number, tables = -(-num_tokens // self.unit_slots), self.tables
        self.pool.share(tables.blocks[row, :number])
        tables.blocks[child_row, :number] = tables.blocks[row, :number]
        tables.num_blocks[child_row] = number
        registered = self.paged_arrays.num_registered
        registered[child_row] = min(registered[row], num_tokens // self.unit_slots)

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if even the empty pool is too small (the last output token never needs a slot, drafts do)."""
        most = min(prompt_tokens + output_tokens - 1 + self.lookahead_slots, self.max_model_len)
        blocks = -(-most // self.unit_slots) + self.state_units
        return 0 if blocks * self.unit_slots <= self.usable_slots else None

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        most = np.minimum(prompt_tokens + output_tokens - 1 + self.lookahead_slots, self.max_model_len)
        blocks = -(-most // self.unit_slots) + self.state_units
        return np.where(blocks * self.unit_slots <= self.usable_slots, 0, NEVER)

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Grant blocks in order until one entry does not fit; return its index. O(entries + blocks taken)."""
        return int(
            _allocate_slots(
                self.pool.blocks,
                self.pool.queue,
                self.pool.cache.index,
                self.pool.cache.buckets,
                self.tables.blocks,
                self.tables.num_blocks,
                self.state_tables,
                self.unit_slots,
                batch,
                first,
                last,
                num_running,
                self.paged_rules.watermark_blocks,
                self.paged_rules.reserve_full_isl,
            )
        )

    def append_slots(self, batch: StepBatch, num_entries: int) -> int:
        """Let each of the first entries, which run, need one slot more, and grant it; stop at the first that does not fit.

        What a step of pure decoding asks for, without the caller's counting. O(entries).

        Returns:
            The index of the first entry not served: it and those behind it are as they were.
        """
        pool = self.pool
        cache = pool.cache
        return int(
            _append_slots(
                pool.blocks,
                pool.queue,
                cache.index,
                cache.buckets,
                self.tables.blocks,
                self.units_held,
                self.unit_slots,
                batch,
                num_entries,
            )
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every block's reference count is the number of tables that hold it."""
        self.pool.check_integrity()
        lengths, width = self.tables.num_blocks, self.tables.blocks.shape[1]
        tables = {row: self.tables.of(row).tolist() for row in np.flatnonzero(lengths).tolist()}
        states = self.state_tables[list(tables)].reshape(-1)
        held = np.array([*(block for table in tables.values() for block in table), *states], np.int64)
        inside = ((lengths >= 0) & (lengths <= width)).all() and ((held > NULL_BLOCK) & (held < self.pool.num_blocks)).all()
        registered = self.paged_arrays.num_registered
        unkeyed = [row for row, table in tables.items() if not self.pool.blocks["next_same"][table[: registered[row]]].all()]
        if (registered > lengths).any() or unkeyed:
            raise IntegrityError(f"{registered.tolist()} blocks should carry their key, in tables {tables}; rows {unkeyed} do not")
        if not inside or not np.array_equal(np.bincount(held, minlength=self.pool.num_blocks), self.pool.ref_cnt):
            raise IntegrityError(f"reference counts {self.pool.ref_cnt.tolist()} do not match the tables {tables}")
