"""TensorRT-LLM's memory, row by row: block tables over a pool whose blocks keep their content, and what is found of a request."""

import itertools
from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import NO_COPIES, KVPoolSettings
from pagedkv.arrays import Int64Array
from pagedkv.block_table import block_slots
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.jit import fixed_types
from pagedkv.kv_request import KVRequest
from pagedkv.reuse_moves import NUM_COPIES, UNSAID
from pagedkv.reuse_nodes import NO_NODE
from pagedkv.reuse_pool import ReusePool
from pagedkv.reuse_rows import (
    NOTHING_FOUND,
    NUM_HITS,
    ReuseArrays,
    ReuseRules,
    admit_row,
    find_prefix,
    grow_row,
    note_row,
    release_row,
    store_row,
)
from pagedkv.token_source import GivenTokens


class ReuseMemory:
    """Rows that hold blocks of `block_size` slots; slot = block * block_size + offset. There is no null block.

    Whoever calls knows which row belongs to whom: `find` looks up what a request begins with, `admit` gives that to its row, and
    whatever becomes of it, `forget_found` follows. Compiled schedulers do the same with `arrays` and `rules`.
    """

    def __init__(self, settings: KVPoolSettings) -> None:
        """Make a pool in which nothing is stored.

        Raises:
            ConfigError: If blocks are no power of two, with what would work.
        """
        size = settings.block_size
        if size < 2 or size & (size - 1):
            near = sorted({max(1 << size.bit_length() - 1, 2), 1 << size.bit_length()})
            raise ConfigError(
                f"block size {size}: tensorrt-llm needs a power of two, 2 or more; {' or '.join(map(str, near))} would work"
            )
        self.unit_slots = size
        num_state_blocks = -(-settings.state_slots // size)
        self.state_slots = num_state_blocks * size
        self.rules = ReuseRules(
            size,
            int(settings.watermark * settings.num_blocks),
            bool(settings.reserve_full_isl),
            bool(settings.enable_prefix_caching),
        )
        max_blocks = min(-(-settings.max_model_len // size), settings.num_blocks)
        self.pool = ReusePool(
            num_blocks=settings.num_blocks,
            host_blocks=settings.offload_blocks,
            block_size=size,
            max_path=-(-settings.max_model_len // size),
            max_copies=2 * (max_blocks + num_state_blocks) + 1,
        )
        self.arrays = ReuseArrays.empty(
            self.pool.arrays, max_num_seqs=settings.max_num_seqs, max_blocks=max_blocks, num_state_blocks=num_state_blocks
        )
        # Their arguments have the same types in every call.
        self._find, self._admit, self._grow = fixed_types(find_prefix), fixed_types(admit_row), fixed_types(grow_row)
        self._note, self._store, self._release = fixed_types(note_row), fixed_types(store_row), fixed_types(release_row)

    @property
    def free_slots(self) -> int:
        """Slots of the blocks on the GPU that nobody holds."""
        return self.pool.num_free * self.unit_slots

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return len(self.pool.gpu) * self.unit_slots

    def cached_slots(self) -> Int64Array:
        """Return the slots of the stored blocks on the GPU that nobody holds, whole blocks. O(blocks log blocks)."""
        return block_slots(self.pool.cached_blocks(), self.unit_slots)

    def taken_slots(self) -> Int64Array:
        """Return the slots of blocks that somebody holds, be it for state."""
        return block_slots(np.flatnonzero(self.pool.arrays.ref_cnt), self.unit_slots)

    def slots_of_row(self, row: int) -> Int64Array:
        """Return the slots of the blocks in the table of `row`."""
        return block_slots(self.arrays.tables[row, : self.arrays.num_blocks[row]], self.unit_slots)

    def num_slots_of_row(self, row: int) -> int:
        """Return how many they are."""
        return int(self.arrays.num_blocks[row]) * self.unit_slots

    def shares(self, request: KVRequest) -> bool:
        """Return whether anything is stored of `request`, or looked up for it."""
        return self.rules.caches and bool(len(request.token_ids))

    def find(self, request: KVRequest) -> int:
        """Look up what `request` begins with, but for its last token; return how many tokens are found. O(num_tokens)."""
        if not self.shares(request):
            return 0
        root, source = self.pool.tree.find_root(request.namespace), _source(request)
        return int(self._find(self.arrays, self.rules, root, source, request.num_tokens))

    def forget_found(self) -> None:
        """Leave no trace of what was looked for: a call that fails changes nothing."""
        tree = self.pool.tree.arrays
        tree.path[: self.arrays.found[NUM_HITS]] = tree.key[:] = 0
        self.arrays.found[:] = NOTHING_FOUND

    def admit(self, row: int, num_new_tokens: int, num_tokens: int, kept_free: int) -> bool:
        """Give an empty row what `find` found, and blocks for new tokens behind it; return whether they fit: see `admit_row`."""
        return bool(self._admit(self.arrays, self.rules, row, num_new_tokens, num_tokens, kept_free))

    def grow(self, row: int, num_slots: int) -> bool:
        """Let `row` have blocks for `num_slots` tokens; return whether they are free. O(blocks taken * log blocks)."""
        return bool(self._grow(self.arrays, self.rules, row, num_slots))

    def note_computed(self, request: KVRequest, row: int, num_written: int) -> None:
        """Store the blocks of `request` that `num_written` tokens fill. O(tokens in those that are not stored yet)."""
        num_full = min(num_written, request.num_tokens - 1) // self.unit_slots
        if num_full > self.arrays.rows["num_stored"][row] and self.shares(request):
            root, source = self.pool.tree.root(request.namespace), _source(request)
            self._note(self.arrays, self.rules, root, source, row, num_written, request.num_tokens)
            self.forget_found()

    def store(self, request: KVRequest, row: int, num_written: int) -> None:
        """Store what is written of `request`, the last block as far as it is filled, but for the last token. O(tokens)."""
        if self.shares(request):
            root, source = self.pool.tree.root(request.namespace), _source(request)
            self._store(self.arrays, self.rules, root, source, row, min(num_written, request.num_tokens - 1))

    def release(self, row: int, said: Sequence[tuple[int, float]]) -> None:
        """Let go of the blocks of `row`, tail first. `said`: of each, its priority or UNSAID, and for how long; or nothing."""
        for i, priority_and_duration in enumerate(said):
            self.arrays.said[i] = priority_and_duration
        self._release(self.arrays, row)
        self.arrays.said[: len(said)] = UNSAID, 0.0
        self.forget_found()

    def copies(self) -> Int64Array:
        """Return what `admit` or `grow` wants copied, as `Grant.copies`; host slots are numbered from those of the GPU on."""
        pool, size = self.pool.arrays, self.unit_slots
        copies = pool.copies[: pool.counts[NUM_COPIES]].tolist()
        pairs = [np.array([[source * size, target * size]]) + np.arange(tokens)[:, None] for source, target, tokens in copies]
        return np.concatenate((NO_COPIES, *pairs)) if pairs else NO_COPIES

    def check_rows(self, rows: Sequence[int]) -> None:
        """Raise IntegrityError unless pool and tree fit together, and with what `rows`, and no others, hold. O(blocks + nodes)."""
        memory, nodes = self.arrays, self.pool.tree.arrays.nodes
        tables = [memory.tables[row, : memory.num_blocks[row]].tolist() for row in rows]
        self.pool.check_integrity([*itertools.chain(*tables), *memory.states[rows].ravel().tolist()])
        for row in rows:
            number, tail = memory.rows[["num_stored", "tail"]][row].item()
            there = tail != NO_NODE and nodes["stamp"][tail] == memory.rows["tail_stamp"][row]
            depth = len(self.pool.tree.tokens_up_to(tail)) if there else number * self.unit_slots
            if depth != number * self.unit_slots or number > memory.num_blocks[row]:
                raise IntegrityError(
                    f"row {row} has {number} stored blocks of {memory.num_blocks[row]}, its tail is at token {depth}"
                )
        others = np.delete(memory.num_blocks, rows)
        if others.any():
            raise IntegrityError(f"rows that nobody has hold blocks: {memory.num_blocks.tolist()}, held are {rows}")


def _source(request: KVRequest) -> GivenTokens:
    return GivenTokens(np.ascontiguousarray(request.token_ids))
