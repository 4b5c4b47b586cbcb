"""Radix-cached KV memory of a running batch: block tables by row, over one tree and its free list."""

from collections import Counter
from collections.abc import Hashable

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.decode_run import ONE_STEP, DecodeRun, growth
from pagedkv.errors import IntegrityError
from pagedkv.radix_cache import RadixCache
from pagedkv.radix_node import PrefixMatch, TreeNode
from pagedkv.scheduling.sglang_retraction import fits_after_eviction
from pagedkv.step_batch import StepBatch

NOTHING: Int32Array = np.empty(0, np.int32)


class RadixRows:
    """What `allocators.radix` is request by request, for a whole batch: a row is a place in it.

    The tree owns the blocks that a row shares, `tables[row, :shared]`, and the row locks them; the rest is the row's alone. It has
    the figures of a `StepAllocator`, but a scheduler of SGLang's kind locks prefixes before it takes slots, so it is driven by
    `admit`, `grow`, `store`, `finish` and `retract`.
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
        self.eviction = settings.eviction
        self.enable_caching = settings.enable_prefix_caching
        self.usable_slots = settings.num_slots - self.unit_slots
        self.max_model_len = settings.max_model_len
        self.lookahead_slots = settings.lookahead_slots
        self.state_units = -(-settings.state_slots // self.unit_slots)
        rows = settings.max_num_seqs
        self.units_held: Int32Array = np.zeros(rows, np.int32)
        self.tables: Int32Array = np.zeros((rows, -(-settings.max_model_len // self.unit_slots)), np.int32)
        """Block tables, int32 [max_num_seqs, max_blocks]."""
        self.num_shared: Int64Array = np.zeros(rows, np.int64)
        """By row: leading tokens that lie in the tree's slots."""
        self._num_counted: Int64Array = np.zeros(rows, np.int64)  # leading tokens whose nodes counted this row as a hit
        self._nodes: list[TreeNode | None] = [None] * rows  # where the shared part ends; locked once for the row
        self._states: list[Int32Array] = [NOTHING] * rows

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if even the empty pool is too small. The last output token needs no slot, drafts do."""
        most = min(prompt_tokens + output_tokens - 1 + self.lookahead_slots, self.max_model_len)
        blocks = -(-most // self.unit_slots) + self.state_units
        return 0 if blocks * self.unit_slots <= self.usable_slots else None

    def admit(self, row: int, hit: PrefixMatch) -> None:
        """Let an empty `row` begin with `hit`, whose lock it takes over, and take the slots of its state."""
        blocks = self._blocks(hit.slots)
        self.tables[row, : blocks.size] = blocks
        self.units_held[row], self.num_shared[row], self._nodes[row] = blocks.size, hit.slots.size, hit.node
        if self.state_units:
            self._states[row] = self.cache.take(self.state_units * self.unit_slots)

    def room(self, row: int) -> int:
        """Return how many tokens `row` could have if nobody else took slots."""
        return int(self.units_held[row]) * self.unit_slots + self.free_slots

    def grow(self, rows: Int32Array, num_tokens: Int64Array, *, wanted_slots: int) -> bool:
        """Give each of `rows` blocks for its `num_tokens`; False, and nothing given, if they are short.

        Before that, what the free list is short of `wanted_slots` is evicted: SGLang reckons with a new block for every row.
        O(rows + blocks taken), and what is evicted.
        """
        needed = -(-num_tokens // self.unit_slots)
        held = self.units_held[rows].astype(np.int64)
        new = np.maximum(needed - held, 0)
        total = int(new.sum())
        if total * self.unit_slots > self.free_slots:
            return False
        fits_after_eviction(self.cache, max(wanted_slots, total * self.unit_slots))
        if total:
            taken = self.cache.slots.alloc(total * self.unit_slots)
            assert taken is not None
            nth = np.arange(total) - np.repeat(np.cumsum(new) - new, new)
            self.tables[np.repeat(rows, new), np.repeat(held, new) + nth] = self._blocks(taken)
            self.units_held[rows] += new.astype(np.int32)
        return True

    def decode_run(self, batch: StepBatch, num_steps: int) -> DecodeRun:
        """Return how many steps, of `num_steps`, the rows of `batch` get through before the free list is too short."""
        room = self.units_held[batch["row"]] * self.unit_slots - batch["num_slots_needed"]
        spare = self.cache.slots.num_ready_slots - (batch.size * self.unit_slots if self.unit_slots > 1 else 0)
        return DecodeRun(num_steps, 1, spare) if spare >= 0 and (room < self.unit_slots).all() else ONE_STEP

    def grow_in_turn(self, batch: StepBatch, num_steps: int) -> None:
        """Take the blocks of `num_steps` more steps of a decode run, after that of `batch`."""
        held = self.units_held[batch["row"]].astype(np.int64)
        _, entries = growth(batch, held * self.unit_slots, self.unit_slots, num_steps)
        taken = self.cache.slots.alloc(entries.size * self.unit_slots)
        assert taken is not None  # the run has no more steps than the free list has blocks for
        order = np.argsort(entries, kind="stable")
        new = np.bincount(entries, minlength=batch.size)
        nth = np.arange(entries.size) - np.repeat(np.cumsum(new) - new, new)
        entries = entries[order]
        self.tables[batch["row"][entries], held[entries] + nth] = self._blocks(taken)[order]
        self.units_held[batch["row"]] += new.astype(np.int32)

    def shrink(self, row: int, num_tokens: int) -> None:
        """Give back the blocks of `row` behind its first `num_tokens`: they were for drafts that were not accepted."""
        kept, held = -(-num_tokens // self.unit_slots), int(self.units_held[row])
        if kept < held:
            self.cache.slots.free_segment(self._slots(row, kept * self.unit_slots, held * self.unit_slots))
            self.units_held[row] = kept

    def store(self, row: int, tokens: Int32Array, *, namespace: Hashable = None, priority: int = 0) -> None:
        """Put what `row` has computed, `tokens`, into the tree in whole blocks; where another was first, hold the tree's blocks."""
        if not self.enable_caching:
            return
        end = self._insert(row, tokens, namespace, priority)
        hit = self.cache.tree.match_prefix(tokens[:end], extra_key=namespace)
        self.tables[row, : end // self.unit_slots] = self._blocks(hit.slots)
        self.cache.tree.inc_lock_ref(hit.node)
        self._unlock(row)
        self._nodes[row], self.num_shared[row] = hit.node, end

    def finish(self, row: int, tokens: Int32Array, *, namespace: Hashable = None, priority: int = 0) -> None:
        """Put all that `row` has computed into the tree and give back the rest."""
        self._release(row, self._insert(row, tokens, namespace, priority) if self.enable_caching else 0)

    def retract(self, row: int) -> None:
        """Give back what `row` has alone, without storing it."""
        self._release(row, int(self.num_shared[row]))

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
        for row, node in enumerate(self._nodes):
            if node is None:
                if self.units_held[row] or self.num_shared[row] or self._states[row].size:
                    raise IntegrityError(f"row {row} holds {self.units_held[row]} blocks but nobody has it")
                continue
            top, *path = node.path()
            shared, first = np.concatenate([NO_SLOTS, *(above.slots for above in path)]), int(self.num_shared[row])
            if top != self.cache.tree.root or not np.array_equal(shared, self._slots(row, 0, first)):
                raise IntegrityError(f"row {row} does not hold the prefix of {first} tokens that it locks: {path}")
            locks.update(path)
            alone += [self._slots(row, first, int(self.units_held[row]) * self.unit_slots), self._states[row]]
        self.cache.check_integrity(alone)
        if wrong := [node for node in self.cache.tree.root.below() if node.lock_ref != locks[node]]:
            raise IntegrityError(f"locks that no row explains: {wrong}")

    def _insert(self, row: int, tokens: Int32Array, namespace: Hashable, priority: int) -> int:
        """Insert `tokens` in whole blocks, give duplicates back, return how many were inserted."""
        held = int(self.num_shared[row])
        end = max(tokens.size // self.unit_slots * self.unit_slots, held)
        inserted = self.cache.tree.insert(
            tokens[:end],
            self._slots(row, 0, end),
            extra_key=namespace,
            held=held,
            hits_beyond=int(self._num_counted[row]),
            priority=priority,
        )
        for duplicates in inserted.duplicates:
            self.cache.slots.free_segment(duplicates)
        self._num_counted[row] = end
        return end

    def _release(self, row: int, first: int) -> None:
        """Give back the state of `row` and its slots from `first` on, and unlock its prefix."""
        self.cache.slots.free_segment(self._slots(row, first, int(self.units_held[row]) * self.unit_slots))
        self.cache.slots.free_segment(self._states[row])
        self._unlock(row)
        self.units_held[row] = self.num_shared[row] = self._num_counted[row] = 0
        self._nodes[row], self._states[row] = None, NOTHING

    def _unlock(self, row: int) -> None:
        node = self._nodes[row]
        assert node is not None
        self.cache.tree.dec_lock_ref(node)

    def _slots(self, row: int, first: int, last: int) -> Int32Array:
        """Return the slots of tokens `first` to `last`, block boundaries both, of `row`."""
        blocks = self.tables[row, first // self.unit_slots : last // self.unit_slots]
        slots: Int32Array = np.add.outer(blocks * self.unit_slots, np.arange(self.unit_slots, dtype=np.int32)).ravel()
        return slots

    def _blocks(self, slots: Int32Array) -> Int32Array:
        return slots[:: self.unit_slots] // self.unit_slots
