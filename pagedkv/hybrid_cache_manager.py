"""Block tables of requests whose layers cache differently, over one pool: vLLM's cache manager for several groups of layers."""

import math
from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_BLOCKS, Int32Array
from pagedkv.block_pool import BlockPool
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.free_queue import NULL_BLOCK
from pagedkv.group_lookup import GroupLookup
from pagedkv.group_rules import GroupRule, GroupTables
from pagedkv.kv_request import KVRequest
from pagedkv.request_rows import RequestRows


class HybridCacheManager:
    """Gives a request blocks for each group of layers, takes back those that its windows have left behind, and shares prefixes.

    One table per group; a null block in it is one that the group does not need (any more). Either all groups get their blocks or
    none does.
    With one group of full attention it does exactly what `KVCacheManager` does (look-ahead aside).

    As there, `None` is "does not fit now". What has left a window is given back before that is known, and stays so: a refusal
    changes nothing else.

    Example:
        >>> settings = KVPoolSettings(num_blocks=9, block_size=2, max_model_len=16)
        >>> rules = (GroupRule(kind="full", block_size=2), GroupRule(kind="sliding_window", block_size=2, window=3))
        >>> manager, request = HybridCacheManager(settings, rules, enable_caching=False), KVRequest(request_id=0, num_tokens=6)
        >>> [blocks.tolist() for blocks in manager.allocate_slots(request, 6)]
        [[1, 2, 3], [4, 5, 6]]
        >>> request.num_tokens, request.num_computed_tokens = 7, 6
        >>> [blocks.tolist() for blocks in manager.allocate_slots(request, 1)]
        [[5], [4]]
        >>> [manager.block_table(request, group).tolist() for group in range(2)]
        [[1, 2, 3, 5], [0, 0, 6, 4]]
    """

    def __init__(
        self,
        settings: KVPoolSettings,
        rules: Sequence[GroupRule],
        *,
        enable_caching: bool = True,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        """Make the manager of groups with `rules`.

        Args:
            settings: The pool. Its block size is the one that the requests' keys are made with.
            rules: What each group keeps. With caching, their block sizes are multiples of that of the keys.
            enable_caching: Share prefixes.
            max_num_batched_tokens: Most tokens that one call asks slots for, which bounds what windows hold; None: no bound.
        """
        self.rules = tuple(rules)
        sizes = [rule.block_size for rule in self.rules]
        uneven = [size for size in sizes if enable_caching and size < settings.max_model_len and size % settings.block_size]
        if not sizes or uneven:
            raise ConfigError(f"groups with blocks of {sizes} tokens: needs one or more, and multiples of {settings.block_size}")
        if max_num_batched_tokens is not None and max_num_batched_tokens < 1:
            raise ConfigError(f"max-num-batched-tokens is {max_num_batched_tokens}: needs 1 or more")
        self.max_model_len = settings.max_model_len
        self.max_num_seqs = settings.max_num_seqs
        self.max_new_tokens = max_num_batched_tokens or settings.max_model_len
        self.alignment = math.lcm(*sizes)
        """Tokens of which every hit is a multiple."""
        self.pool = BlockPool(num_blocks=settings.num_blocks, enable_caching=enable_caching)
        self.groups = tuple(
            GroupTables(
                rule,
                self.pool,
                group=group,
                max_num_seqs=settings.max_num_seqs,
                max_model_len=settings.max_model_len,
                key_block_size=settings.block_size,
            )
            for group, rule in enumerate(self.rules)
        )
        self._num_held = [0] * self.max_num_seqs
        """By row: blocks in all its tables, null ones not included."""
        self._requests = RequestRows(self.max_num_seqs)
        self._rows = self._requests.of
        self._lookup = GroupLookup(
            self.pool,
            self.groups,
            alignment=self.alignment,
            key_block_size=settings.block_size,
            max_model_len=settings.max_model_len,
        )
        self._watermark_blocks = int(settings.watermark * settings.num_blocks)
        self._reserve_full_isl = settings.reserve_full_isl

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the free queue, cached ones included."""
        return self.pool.num_free_blocks

    def free_queue(self) -> Int32Array:
        """Return the free blocks, the next to be handed out first. O(num_blocks)."""
        return self.pool.free_queue()

    def block_table(self, request: KVRequest, group: int = 0) -> Int32Array:
        """Return the table of `request` in a group, null blocks included, a view; empty if it holds nothing. O(1)."""
        row = self._rows.get(request)
        return NO_BLOCKS if row is None else self.groups[group].tables.of(row)

    def span(self, request: KVRequest, group: int) -> tuple[int, int]:
        """Return the first token of `request` whose block in a group was not given back, and the end of its last block. O(1)."""
        row = self._rows.get(request)
        return (0, 0) if row is None else self.groups[group].span(row)

    def num_blocks_held(self, request: KVRequest) -> int:
        """Return the blocks in all its tables, null ones not included. O(1)."""
        row = self._rows.get(request)
        return 0 if row is None else self._num_held[row]

    def live_requests(self) -> tuple[KVRequest, ...]:
        """Return the requests that hold blocks, in order of admission. O(requests)."""
        return tuple(self._rows)

    def peak_blocks(self, num_tokens: int) -> int:
        """Return the most blocks that a request of up to `num_tokens` holds at once, in all groups. O(groups)."""
        return sum(rule.peak_blocks(num_tokens, self.max_new_tokens) for rule in self.rules)

    def get_computed_blocks(self, request: KVRequest) -> tuple[tuple[Int32Array, ...], int]:
        """Return, by group, the cached blocks of its longest known prefix, null where none is needed, and the prefix's tokens.

        That is the longest on which all groups agree. It ends at a multiple of all block sizes, and before the last token, which is
        always computed. Changes nothing. O(groups * hits) expected.

        Raises:
            ConfigError: If the request has too few keys.
        """
        return self._lookup.blocks(request)

    def allocate_slots(
        self,
        request: KVRequest,
        num_new_tokens: int,
        computed_blocks: Sequence[Int32Array] = (),
        *,
        has_scheduled_reqs: bool = False,
        full_sequence_must_fit: bool | None = None,
    ) -> tuple[Int32Array, ...] | None:
        """Give `request` slots in every group for `num_new_tokens` beyond its computed ones and its hits, or in none.

        An admission must find room for what all its known tokens will hold at once: of windows only the peak, which
        `max_num_batched_tokens` bounds. O(groups + hits + blocks taken, filled and given back).

        Args:
            request: The request. Its `num_computed_tokens` is left to its owner, who adds hits and new tokens.
            num_new_tokens: Tokens to compute now, drafts included.
            computed_blocks: Its hits, as `get_computed_blocks` returned them. Only for a request that holds nothing yet.
            has_scheduled_reqs: Something runs, so an admission must leave the watermark free.
            full_sequence_must_fit: Whether an admission must find room for all known tokens; by default as in the settings.

        Returns:
            The blocks taken newly, by group, hits not included; None if they do not fit now.

        Raises:
            ConfigError: If the numbers cannot be, or a hit is stale; nothing has changed then.
        """
        row = self._rows.get(request)
        self._lookup.check_known(request)
        hits, num_hit_tokens = self._lookup.by_group(request, computed_blocks) if computed_blocks else ((), 0)
        if num_hit_tokens:
            if row is not None:
                raise request.error(f"hits of {num_hit_tokens} tokens, but it holds blocks already: only an admission takes hits")
            self._lookup.check(request, hits, num_hit_tokens)
        num_slots = request.num_computed_tokens + num_hit_tokens + num_new_tokens
        self._check_slots(request, row, num_new_tokens, num_slots)
        if row is not None:
            self._num_held[row] -= sum([group.give_back(row, request.num_computed_tokens) for group in self.groups])
        gate = row is None and (self._reserve_full_isl if full_sequence_must_fit is None else full_sequence_must_fit)
        needs, counts, num_gated = self._needs(request, row, num_slots, num_hit_tokens, gate=gate)
        revived = sum(int(np.count_nonzero(self.pool.ref_cnt[hit[hit != NULL_BLOCK]] == 0)) for hit in hits)
        kept_free = self._watermark_blocks if row is None and has_scheduled_reqs else 0
        if num_gated + revived + kept_free > self.num_free_blocks:
            return None
        if row is None:
            row = self._admit(request, hits)
        return self._grow(request, row, num_slots, needs, counts)

    def free(self, request: KVRequest) -> None:
        """Take back all that a finished request holds, group by group: blocks without a key to the front of the queue.

        O(groups + blocks).

        Raises:
            ConfigError: If it holds nothing: it was never allocated, or freed before.
        """
        row = self._requests.expect(request)
        for group in self.groups:
            group.release(row)
        self._num_held[row] = 0
        self._requests.close(request)

    def preempt(self, request: KVRequest) -> None:
        """Free a request that will come back: nothing of it counts as computed any more, but its keys live on until reuse.

        O(groups + blocks).

        Raises:
            ConfigError: If it holds nothing.
        """
        self.free(request)
        request.num_computed_tokens = 0

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes and return True, if no request holds a block; else change nothing and return False.

        O(num_blocks), and of a False O(1).
        """
        return self.pool.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Raise IntegrityError unless reference counts, tables, rows and keys fit together. O(num_blocks + table entries)."""
        self.pool.check_integrity()
        tables = {request: np.concatenate([group.tables.of(row) for group in self.groups]) for request, row in self._rows.items()}
        held = {request: table[table != NULL_BLOCK] for request, table in tables.items()}
        self._requests.check_held(self.pool, held)
        for request, row in self._rows.items():
            faults = [fault for group in self.groups if (fault := group.fault(request, row))]
            if faults or held[request].size != self._num_held[row]:
                raise IntegrityError(
                    f"request {request.request_id!r}, counted {self._num_held[row]} blocks: {faults}, {tables[request].tolist()}"
                )

    def _needs(
        self, request: KVRequest, row: int | None, num_slots: int, num_hit_tokens: int, *, gate: bool
    ) -> tuple[list[int], list[int], int]:
        """Return, by group, the length of its table and the new blocks in it; and for how many blocks there must be room in all.

        With a `gate` that is for what all known tokens will hold.
        """
        needs, counts, num_gated = [], [], 0
        for group in self.groups:
            rule = group.rule
            held = num_hit_tokens // rule.block_size if row is None else int(group.tables.num_blocks[row])
            needs.append(max(rule.num_blocks(num_slots), held))
            counts.append(needs[-1] - rule.first_new_block(held, needs[-1]))
            beyond = 0
            if gate:
                peak = rule.peak_blocks(request.num_tokens, self.max_new_tokens) - (held - rule.first_block(num_hit_tokens))
                beyond = min(rule.num_blocks(request.num_tokens) - held, peak)
            num_gated += max(counts[-1], beyond)
        return needs, counts, num_gated

    def _admit(self, request: KVRequest, hits: Sequence[Int32Array]) -> int:
        """Hold the hits of a new request in a row of its own."""
        row = self._requests.open(request)
        for group, hit in zip(self.groups, hits, strict=bool(hits)):
            real = hit[hit != NULL_BLOCK]
            self.pool.touch(real, group.keys(request, hit.size - real.size, hit.size))
            group.place_hits(row, hit)
            self._num_held[row] += real.size
        return row

    def _grow(
        self, request: KVRequest, row: int, num_slots: int, needs: Sequence[int], counts: Sequence[int]
    ) -> tuple[Int32Array, ...]:
        """Take counts[i] blocks for group i, whose table then has needs[i]; they are there."""
        num_new, offset, taken = sum(counts), 0, []
        blocks = self.pool.get_new_blocks(num_new) if num_new else NO_BLOCKS
        assert blocks is not None
        self._num_held[row] += num_new
        for group, need, count in zip(self.groups, needs, counts, strict=True):
            taken.append(blocks[offset : offset + count])
            offset += count
            group.grow(row, need, taken[-1])
            if self.pool.enable_caching:
                group.register(request, row, num_slots, self.alignment)
        return tuple(taken)

    def _check_slots(self, request: KVRequest, row: int | None, num_new_tokens: int, num_slots: int) -> None:
        room = 0
        if row is not None:
            room = min([int(group.tables.num_blocks[row]) * group.rule.block_size for group in self.groups])
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=room)
        if num_new_tokens > self.max_new_tokens:
            raise request.error(f"{num_new_tokens} new tokens: a step computes {self.max_new_tokens} at most, split them")
        request.check_length(num_slots, self.max_model_len)
        if row is None:
            request.check_place(len(self._rows), self.max_num_seqs)
        elif any(group.lacks(row, request.num_computed_tokens, num_slots) for group in self.groups):
            raise request.error(
                f"{request.num_computed_tokens} computed tokens, but what the next one reads was given back when it had more: "
                "preempt it"
            )
