"""One pool for layers that cache differently, for a whole step at once, in compiled code."""

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.free_queue import NULL_BLOCK, NUM_SHARES
from pagedkv.hybrid_arrays import HybridArrays, HybridRules, groups_of
from pagedkv.hybrid_layout import hybrid_layout
from pagedkv.jit import lean_jit
from pagedkv.pooled_memory import PooledMemory
from pagedkv.scheduling.hybrid_grants import admit_row, grow_row
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import each_admission_slots


@lean_jit
def _allocate_slots(memory: HybridArrays, rules: HybridRules, batch: StepBatch, first: int, last: int, num_running: int) -> int:
    for i in range(first, last):
        row, slots = batch["row"][i], batch["num_slots_needed"][i]
        if i < num_running:
            fits = grow_row(memory, rules, row, slots - batch["num_scheduled_tokens"][i], slots)
        else:
            fits = admit_row(memory, rules, row, batch["num_known_tokens"][i], 0, slots, i > 0)
        if not fits:
            return i
    return last


class HybridStepAllocator(PooledMemory):
    """What `HybridAllocator` does request by request, row by row and compiled.

    Prefixes are looked up by a compiled scheduler (`pagedkv.scheduling.hybrid_grants`), not by the calls of this class. Layers with
    a state of fixed size take blocks for it at admission, as in `PagedStepAllocator`, and then nothing is cached.
    """

    name = "hybrid"
    placement = "block"

    def __init__(self, settings: KVPoolSettings) -> None:
        """Make an empty pool.

        Raises:
            ConfigError: If there are no layer groups, or both they and `state_slots` tell of state.
        """
        layout = hybrid_layout(settings)
        rules, rows = layout.token_rules, settings.max_num_seqs
        if not rules or any(rule.kind == "state" for rule in rules):
            raise ConfigError(
                "hybrid, step by step, keeps a state per request: needs layers with keys, and with states enable_prefix_caching off"
            )
        super().__init__(settings, unit_slots=layout.unit_slots, num_groups=len(rules), state_units=layout.num_state_blocks)
        self.layout, self.num_groups = layout, len(rules)
        width = -(-settings.max_model_len // min(rule.block_size for rule in rules))
        lengths = np.zeros((3, len(rules), rows), np.int32)
        self.arrays = HybridArrays(
            self.pool.blocks,
            self.pool.queue,
            self.pool.cache.index,
            self.pool.cache.buckets,
            groups_of(rules, settings.block_size),
            np.zeros((len(rules), rows, width), np.int32),
            lengths[0],
            lengths[1],
            lengths[2],
            np.zeros(rows, np.int32),
            np.zeros((rows, self.state_units), np.int32),
            np.zeros((len(rules), width), np.int32),
            np.zeros(len(rules), np.int64),
            self.forks,
            self.copy_room,
        )
        self.rules = HybridRules(
            self.unit_slots,
            settings.block_size,
            layout.alignment,
            settings.max_num_batched_tokens or settings.max_model_len,
            self.watermark_blocks,
            bool(settings.reserve_full_isl),
            bool(settings.enable_prefix_caching),
            bool(settings.freed_to_front),
        )
        self.units_held: Int32Array = self.arrays.held

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if the empty pool is too small for what the request holds at its peak, or it is too long."""
        if prompt_tokens + output_tokens - 1 > self.max_model_len:
            return None
        most = min(prompt_tokens + output_tokens - 1 + self.lookahead_slots, self.max_model_len)
        return 0 if self.layout.peak_blocks(most, self.rules.max_new_tokens) * self.unit_slots <= self.usable_slots else None

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        return each_admission_slots(self.admission_slots, prompt_tokens, output_tokens)

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Grant blocks in order until one entry does not fit; return its index. O(entries * groups + blocks taken)."""
        return int(_allocate_slots(self.arrays, self.rules, batch, first, last, num_running))

    def tokens_within(self) -> Int64Array:
        """Return, by row, up to which token its tables reach in all groups."""
        sizes = self.arrays.groups["block_size"]
        reach: Int64Array = (self.arrays.num_blocks * sizes[:, None]).min(0)
        return reach

    @property
    def group_tables(self) -> Int32Array:
        """Block tables, int32 [groups, max_num_seqs, max_blocks]: null where a window has left a block behind. A view."""
        tables: Int32Array = self.arrays.tables
        return tables

    @property
    def group_lengths(self) -> Int32Array:
        """Blocks in each table, null ones included, int32 [groups, max_num_seqs]. A view."""
        lengths: Int32Array = self.arrays.num_blocks
        return lengths

    def most_tokens(self, num_blocks: int) -> int:
        """Return the longest request that `num_blocks` blocks hold, in tokens that have a slot."""
        return self.layout.most_tokens(num_blocks, self.rules.max_new_tokens, self.max_model_len)

    def _share(self, group: int, row: int, child_row: int, num_tokens: int) -> None:
        arrays, size = self.arrays, int(self.arrays.groups["block_size"][group])
        number, first, shares = -(-num_tokens // size), int(arrays.num_given_back[group, row]), self.pool.queue[NUM_SHARES]
        table = arrays.tables[group, row, :number]
        self.pool.share(table[first:])
        arrays.tables[group, child_row, :number] = table
        arrays.num_blocks[group, child_row], arrays.num_given_back[group, child_row] = number, first
        arrays.num_registered[group, child_row] = min(arrays.num_registered[group, row], num_tokens // size)
        arrays.held[child_row] += number - first
        arrays.shares[group] += self.pool.queue[NUM_SHARES] - shares

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every block's reference count is the number of tables that hold it."""
        self.pool.check_integrity()
        arrays = self.arrays
        holding = np.flatnonzero(arrays.num_blocks[0]).tolist()
        tables = {row: [self.block_table(row, group) for group in range(self.num_groups)] for row in holding}
        real = {row: np.concatenate([table[table != NULL_BLOCK] for table in each]) for row, each in tables.items()}
        held = np.concatenate([*real.values(), arrays.states[holding].reshape(-1), np.zeros(0, np.int32)])
        counted = np.bincount(held, minlength=self.pool.num_blocks)
        sizes = {row: real[row].size if row in real else 0 for row in range(arrays.held.size)}
        if not np.array_equal(counted, self.pool.ref_cnt) or arrays.held.tolist() != list(sizes.values()):
            raise IntegrityError(f"reference counts {self.pool.ref_cnt.tolist()}, rows of {arrays.held.tolist()} blocks: {tables}")
        shares = int((self.pool.ref_cnt[self.pool.ref_cnt > 1] - 1).sum())
        if arrays.shares.sum() != shares:
            raise IntegrityError(f"groups share {arrays.shares.tolist()} blocks, {shares} references are beyond the first")
        for row, each in tables.items():
            for group, table in enumerate(each):
                given_back, registered = int(arrays.num_given_back[group, row]), int(arrays.num_registered[group, row])
                if table[:given_back].any() or not table[given_back:].all() or max(given_back, registered) > table.size:
                    raise IntegrityError(f"{given_back} blocks given back, {registered} registered, of {table.tolist()}")
                keyed = table[given_back:registered]
                if self.rules.caches and not self.pool.blocks["next_same"][keyed].all():
                    raise IntegrityError(f"row {row}, group {group}: blocks {keyed.tolist()} should carry their key")
