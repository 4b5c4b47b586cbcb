"""Radix-cached KV memory of a running batch: block tables by row, over one tree and its free list."""

from collections import Counter

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.radix_cache import RadixCache
from pagedkv.radix_node import TreeNode, slots_of_blocks
from pagedkv.scheduling.radix_grants import NOBODY, RowArrays, RowRules
from pagedkv.step_memory import NEVER


class RadixRows:
    """What `allocators.radix` is request by request, for a whole batch: a row is a place in it.

    The tree owns the blocks that a row shares, `tables[row, :shared]`, and the row locks them; the rest is the row's alone. It has
    the figures of a `StepAllocator`, but a scheduler of SGLang's kind locks prefixes before it takes slots, so compiled code drives
    its `arrays` by `pagedkv.scheduling.radix_grants`.
    """

    name = "radix"
    placement = "block"
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings) -> None:
        """Make an empty pool.

        Raises:
            ConfigError: If there is no block besides the padding, or no such eviction policy.
        """
        self.unit_slots = settings.block_size
        self.cache = RadixCache(num_blocks=settings.num_blocks - 1, block_size=self.unit_slots, eviction=settings.eviction)
        self.enable_caching = settings.enable_prefix_caching
        self.usable_slots = settings.num_slots - self.unit_slots
        self.max_model_len = settings.max_model_len
        self.lookahead_slots = settings.lookahead_slots
        self.state_units = -(-settings.state_slots // self.unit_slots)
        rows = settings.max_num_seqs
        self.arrays = RowArrays(
            self.cache.arrays,
            np.zeros((rows, -(-settings.max_model_len // self.unit_slots)), np.int32),
            np.zeros(rows, np.int32),
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
            np.full(rows, NOBODY, np.int64),
            np.zeros((rows, self.state_units), np.int32),
        )
        self.rules = RowRules(self.cache.rules, bool(self.enable_caching), self.enable_caching and settings.eviction == "lru")
        self.tables, self.units_held, self.num_shared = self.arrays.tables, self.arrays.units_held, self.arrays.num_shared

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if even the empty pool is too small. The last output token needs no slot, drafts do."""
        slots = int(self.all_admission_slots(np.array([prompt_tokens]), np.array([output_tokens]))[0])
        return None if slots == NEVER else slots

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        most = np.minimum(prompt_tokens + output_tokens - 1 + self.lookahead_slots, self.max_model_len)
        blocks = -(-most // self.unit_slots) + self.state_units
        slots: Int64Array = np.where(blocks * self.unit_slots <= self.usable_slots, 0, NEVER)
        return slots

    @property
    def free_slots(self) -> int:
        """Slots in the free list and in nodes that nobody locks."""
        return self.cache.free_slots

    @property
    def cached_slots(self) -> int:
        """Those of them that keep a prefix."""
        return self.cache.tree.evictable_size

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return int(self.num_shared.sum()) - self.cache.tree.protected_size

    def check_integrity(self) -> None:
        """Raise IntegrityError unless free list, tree and rows share out all slots, and each row locks its prefix once."""
        locks, alone = Counter[TreeNode](), list[Int32Array]()
        for row, end in enumerate(self.arrays.ends.tolist()):
            if end == NOBODY:
                if self.units_held[row] or self.num_shared[row]:
                    raise IntegrityError(f"row {row} holds {self.units_held[row]} blocks but nobody has it")
                continue
            top, *path = TreeNode(self.cache.tree, end).path()
            shared, first = np.concatenate([NO_SLOTS, *(above.slots for above in path)]), int(self.num_shared[row])
            if top != self.cache.tree.root or not np.array_equal(shared, self._slots(row, 0, first)):
                raise IntegrityError(f"row {row} does not hold the prefix of {first} tokens that it locks: {path}")
            locks.update(path)
            alone.append(self._slots(row, first, int(self.units_held[row]) * self.unit_slots))
            alone.append(slots_of_blocks(self.arrays.states[row], self.unit_slots))
        self.cache.check_integrity(alone)
        if wrong := [node for node in self.cache.tree.root.below() if node.lock_ref != locks[node]]:
            raise IntegrityError(f"locks that no row explains: {wrong}")

    def _slots(self, row: int, first: int, last: int) -> Int32Array:
        """Return the slots of tokens `first` to `last`, block boundaries both, of `row`."""
        return slots_of_blocks(self.tables[row, first // self.unit_slots : last // self.unit_slots], self.unit_slots)
