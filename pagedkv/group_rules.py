"""What layers of one kind keep: the blocks a request still needs, those that make a prefix hit, and the most it can hold.

All follows from one question, which tokens the next query will never read. A prefix of L tokens is a hit for a group exactly if the
blocks that a request with L computed tokens still needs are cached: all of them (full attention), the last window, the current
chunk, or the last state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from pagedkv.arrays import NO_BLOCKS, Int32Array
from pagedkv.block_hash import BlockKeys
from pagedkv.block_pool import BlockPool
from pagedkv.block_table import BlockTables
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.free_queue import NULL_BLOCK
from pagedkv.kv_request import KVRequest
from pagedkv.kv_spec import LAYER_KINDS, LayerKind

_STATES_AT_ONCE = 2
"""A step reads the state of the last block boundary and writes the next one."""
_NO_SALT: BlockKeys = np.zeros(2, np.uint64)
"""The first group's: a model of one group has the keys that requests come with."""


def key_salt(group: int) -> BlockKeys:
    """Return what is added bit by bit to keys in the group with this index, uint64 [2]: it keeps groups apart.

    vLLM appends the group to the key; a constant does it as well where keys are random.
    """
    return np.frombuffer(blake2b(b"group %d" % group, digest_size=16).digest(), "<u8") if group else _NO_SALT


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRule:
    """One block table per request, for layers of one kind. Blocks that it no longer needs are null in the table.

    Example:
        >>> window = GroupRule(kind="sliding_window", block_size=4, window=6)
        >>> window.num_skipped_tokens(13), window.first_block(13), window.num_blocks(13)
        (8, 2, 4)
    """

    kind: LayerKind
    """As in `LayerGroup`; `mla` keeps what `full` keeps. `state`: a block holds the state behind its last computed token."""
    block_size: int
    """Tokens per block. State layers that keep one state per request, and none for reuse, have blocks of max_model_len."""
    window: int | None = None
    """Tokens of a window, the query's own included, or of a chunk; None for other kinds."""

    def __post_init__(self) -> None:
        if self.kind not in LAYER_KINDS:
            raise unknown_name("layer kind", self.kind, LAYER_KINDS)
        if self.block_size < 1:
            raise ConfigError(f"block size {self.block_size} of a layer group: needs 1 or more")
        if (self.kind in ("sliding_window", "chunked")) != ((self.window or 0) >= 1):
            raise ConfigError(
                f"window {self.window} of kind {self.kind!r}: needs 1 or more if sliding_window or chunked, else None"
            )

    def num_blocks(self, num_tokens: int) -> int:
        """Return the length of a table for `num_tokens`, null blocks included."""
        return -(-num_tokens // self.block_size)

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Return how many leading tokens no query after `num_computed_tokens` reads. Never falls as that rises."""
        if self.kind == "state":
            return max(0, num_computed_tokens - 1)
        if self.window is None:
            return 0
        if self.kind == "chunked":
            return num_computed_tokens // self.window * self.window
        return max(0, num_computed_tokens - self.window + 1)

    def first_block(self, num_computed_tokens: int) -> int:
        """Return the first block still needed when `num_computed_tokens` are computed: whole skipped blocks come before it."""
        return self.num_skipped_tokens(num_computed_tokens) // self.block_size

    def first_new_block(self, num_held: int, num_needed: int) -> int:
        """Return from where on a table that grows from `num_held` to `num_needed` takes blocks; up to there it has null blocks.

        A token needs its slot even if a later one of the same step no longer reads it; but of states only the last is written.
        """
        return max(num_held, num_needed - 1) if self.kind == "state" else num_held

    def peak_blocks(self, num_tokens: int, max_new_tokens: int) -> int:
        """Return the most blocks that a request of up to `num_tokens` holds at once if no step computes more than `max_new_tokens`.

        Source: vLLM, max_admission_blocks_per_request of its window and chunked specs; one block more where chunks and blocks
        are not aligned.
        """
        most = self.num_blocks(num_tokens)
        if self.kind == "state":
            return min(most, _STATES_AT_ONCE)
        if self.window is None:
            return most
        if self.kind == "chunked":
            return min(most, self.num_blocks(self.window + max_new_tokens) + (self.window % self.block_size > 0))
        return min(most, self.num_blocks(self.window - 1 + max_new_tokens) + 1)

    def longest_hit(self, num_tokens: int, alignment: int, find_run: Callable[[int, int], Int32Array]) -> tuple[int, Int32Array]:
        """Return the longest hit of at most `num_tokens`, a multiple of `alignment`, and its blocks from the first needed one on.

        Searched from right to left. Where a block is missing, every hit that contains it is out, so the next candidate ends
        before it: O(num_tokens / block_size) look-ups altogether.

        Args:
            num_tokens: Where to start.
            alignment: A multiple of the block size: all groups can end there.
            find_run: Returns the cached blocks of the longest run from the first block given, up to the second (exclusive).
        """
        length = num_tokens // alignment * alignment
        while length:
            first, last = self.first_block(length), length // self.block_size
            blocks = find_run(first, last)
            if blocks.size == last - first:
                return length, blocks
            length = (first + blocks.size) * self.block_size // alignment * alignment
        return 0, NO_BLOCKS


class GroupTables:
    """The block tables of one group of layers, over a pool that it shares with others."""

    def __init__(
        self, rule: GroupRule, pool: BlockPool, *, group: int, max_num_seqs: int, max_model_len: int, key_block_size: int
    ) -> None:
        self.rule = rule
        self.tables = BlockTables(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=rule.block_size)
        self._pool = pool
        self._stride = rule.block_size // key_block_size
        self._salt = key_salt(group)
        self._num_given_back = [0] * max_num_seqs
        """By row: leading entries that are null for good. Lists: these are read one by one, in Python."""
        self._num_registered = [0] * max_num_seqs
        """By row: leading entries that carry their key, or will never get one."""

    def keys(self, request: KVRequest, first: int, last: int) -> BlockKeys:
        """Return the keys of blocks `first` to `last` (exclusive): a block's last key covers it, and each group has its own."""
        keys: BlockKeys = request.block_keys[(first + 1) * self._stride - 1 : last * self._stride : self._stride] ^ self._salt
        return keys

    def find_run(self, request: KVRequest, first: int, last: int) -> Int32Array:
        """Return the cached blocks of the longest run from block `first`, up to `last` (exclusive)."""
        return self._pool.cache.lookup(self.keys(request, first, last))

    def lacks(self, row: int, num_computed: int, num_slots: int) -> bool:
        """Return whether tokens up to `num_slots` cannot follow `num_computed` ones: what they read is not there any more."""
        first = self.rule.first_block(num_computed)
        if first < self._num_given_back[row]:
            return True
        if self.rule.kind != "state":
            return False
        table, written = self.tables.of(row), (num_slots - 1) // self.rule.block_size
        states = [first, written] if num_computed else [written]
        return any(block < table.size and table[block] == NULL_BLOCK for block in states)

    def span(self, row: int) -> tuple[int, int]:
        """Return where the first block that was not given back begins, and where the last one ends, in tokens. O(1)."""
        size = self.rule.block_size
        return self._num_given_back[row] * size, int(self.tables.num_blocks[row]) * size

    def give_back(self, row: int, num_computed: int) -> int:
        """Give back what no query after `num_computed` tokens reads, and return how many blocks that was. O(blocks)."""
        first, last = self._num_given_back[row], self.rule.first_block(num_computed)
        if last <= first:
            return 0
        skipped = self.tables.blocks[row, first:last]
        blocks = skipped[skipped != NULL_BLOCK]
        self._pool.free_blocks(blocks)
        skipped[:] = NULL_BLOCK
        self._num_given_back[row] = last
        return int(blocks.size)

    def place_hits(self, row: int, hits: Int32Array) -> None:
        """Begin a table with `hits`, null blocks included, which carry their keys."""
        self.tables.blocks[row, : hits.size] = hits
        self.tables.num_blocks[row] = self._num_registered[row] = int(hits.size)
        self._num_given_back[row] = self.rule.first_block(hits.size * self.rule.block_size)

    def grow(self, row: int, num_needed: int, blocks: Int32Array) -> None:
        """Let a table end with the new `blocks` at length `num_needed`, null blocks before them."""
        held = int(self.tables.num_blocks[row])
        if held == num_needed:
            return
        self.tables.blocks[row, held : num_needed - blocks.size] = NULL_BLOCK
        self.tables.blocks[row, num_needed - blocks.size : num_needed] = blocks
        self.tables.num_blocks[row] = num_needed

    def register(self, request: KVRequest, row: int, num_slots: int, alignment: int) -> None:
        """Let blocks be found that `num_slots` slots fill with known tokens, as far as a hit can reach, a multiple of `alignment`.

        Of states only one that a step leaves exactly there is kept: one that a step passes is overwritten before anyone sees it.
        """
        first = self._num_registered[row]
        last = min(num_slots, request.num_tokens) // alignment * (alignment // self.rule.block_size)
        if self.rule.kind == "state":
            first = max(first, last - 1) if last * self.rule.block_size == num_slots else last
        if last > first:
            blocks = self.tables.blocks[row, first:last]
            self._pool.cache_full_blocks(blocks[blocks != NULL_BLOCK], self.keys(request, first, last)[blocks != NULL_BLOCK])
            self._num_registered[row] = last

    def release(self, row: int) -> None:
        """Give back all of a table."""
        table = self.tables.of(row)
        self._pool.free_blocks(table[table != NULL_BLOCK])
        self.tables.num_blocks[row] = self._num_registered[row] = self._num_given_back[row] = 0

    def fault(self, request: KVRequest, row: int) -> str:
        """Return what is wrong with a table beyond its blocks' reference counts, empty if nothing is. O(table)."""
        table, given_back, registered = self.tables.of(row), self._num_given_back[row], self._num_registered[row]
        if table[:given_back].any() or max(given_back, registered) > table.size:
            return f"{given_back} blocks given back, {registered} registered, of {table.tolist()}"
        if self.rule.kind != "state" and not table[given_back:].all():
            return f"null blocks behind the first {given_back} of {table.tolist()}"
        if not self._pool.enable_caching or self.rule.kind == "state":
            return ""
        keyed = table[given_back:registered]
        missing = (
            np.setdiff1d(keyed, self._pool.cache.blocks()).size or self.find_run(request, given_back, registered).size < keyed.size
        )
        return f"blocks {keyed.tolist()} do not carry its keys" if missing else ""
