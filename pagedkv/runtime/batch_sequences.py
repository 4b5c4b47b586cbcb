"""The sequences of a batch: which columns of the padded input they have tokens in, and which blocks those lie in."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pagedkv.allocators.hybrid import HybridAllocator
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.arrays import BoolArray, Int32Array
from pagedkv.errors import ConfigError
from pagedkv.kv_request import KVRequest
from pagedkv.runtime.forward_plan import ForwardPlan, plan_forward
from pagedkv.runtime.storage import PagedKVStorage


class BatchSequences:
    """Rows of a batch, each a request of an allocator whose blocks are those of `storage`.

    A column is a place in the padded input; where a row has padding there, it takes no slot.
    """

    def __init__(self, storage: PagedKVStorage, allocator: PagedAllocator | HybridAllocator) -> None:
        self.storage, self.allocator = storage, allocator
        self.requests: list[KVRequest] = []
        """By row: its sequence."""
        self.real: BoolArray = np.empty((0, 0), np.bool_)
        """By row and column: a token, not padding."""

    @property
    def num_columns(self) -> int:
        """Columns so far."""
        return int(self.real.shape[1])

    def open(self, batch: int) -> None:
        """Begin with `batch` rows, if there are none yet.

        Raises:
            ConfigError: If there are others.
        """
        if not self.requests:
            self.requests, self.real = (
                [KVRequest(request_id=row, num_tokens=1) for row in range(batch)],
                np.empty((batch, 0), np.bool_),
            )
        if batch != len(self.requests):
            raise ConfigError(f"a batch of {batch} for a cache of {len(self.requests)} sequences: needs as many, or reset()")

    def extend(self, real: BoolArray) -> ForwardPlan:
        """Give the tokens of new columns, `real` [batch, columns], slots, make the copies that this asks for, and return the plan.

        Raises:
            ConfigError: If the pool is too small. Blocks taken for these columns stay with their sequences, all else is as before:
                go on with fewer tokens, or `close()`.
        """
        counts = real.sum(1).tolist()
        for request, count in zip(self.requests, counts, strict=True):
            if count:
                self._allocate(request, count, counts)
        for request, count in zip(self.requests, counts, strict=True):
            if count:
                request.num_computed_tokens += count
                self.allocator.note_computed(request)
        first_column, layout = self.num_columns, self.storage.layout
        self.real = np.concatenate((self.real, real), axis=1)
        return plan_forward(
            real,
            first_column=first_column,
            seqlens=[request.num_computed_tokens for request in self.requests],
            tables=[[self.block_table(request, group) for request in self.requests] for group in range(layout.num_groups)],
            block_sizes=layout.block_sizes,
            device=self.storage.device,
        )

    def block_table(self, request: KVRequest, group: int = 0) -> Int32Array:
        """Return the blocks of one sequence in a group of layers, 0 for what has left the window."""
        if isinstance(self.allocator, HybridAllocator):
            return self.allocator.manager.block_table(request, group)
        return self.allocator.manager.block_table(request)

    def select(self, rows: Sequence[int]) -> None:
        """Let the batch be these rows, each any number of times. Nothing is copied before somebody writes.

        Raises:
            ConfigError: If a row is used twice and the allocator cannot share.
        """
        uses = Counter(rows)
        if max(uses.values(), default=0) > 1 and not isinstance(self.allocator, PagedAllocator):
            raise ConfigError(
                "the allocator 'hybrid' cannot share blocks between sequences: make PagedCache(..., allocator='paged')"
            )
        for row, request in enumerate(self.requests):
            if row not in uses and self.allocator.num_slots_held(request):
                self.allocator.free(request)
        kept, requests = set[int](), []
        for row in rows:
            requests.append(self._fork(self.requests[row]) if row in kept else self.requests[row])
            kept.add(row)
        self.requests, self.real = requests, self.real[list(rows)]

    def cut(self, num_columns: int) -> None:
        """Forget the last `num_columns` columns, and give back what only they held.

        Raises:
            ConfigError: If there are not as many, or the allocator cannot.
        """
        if not 0 <= num_columns <= self.num_columns or not isinstance(self.allocator, PagedAllocator):
            raise ConfigError(
                f"crop of {num_columns} of {self.num_columns} columns: needs 0 to -{self.num_columns}, and allocator='paged'"
            )
        for request, count in zip(self.requests, self.real[:, self.num_columns - num_columns :].sum(1).tolist(), strict=True):
            request.num_computed_tokens -= count
            if count and request.num_computed_tokens:
                self.allocator.manager.free_lookahead(request)
            elif count:
                self.allocator.free(request)
        self.real = self.real[:, : self.num_columns - num_columns]

    def close(self) -> None:
        """Give all blocks back."""
        for request in self.allocator.live_requests():
            self.allocator.free(request)
        self.requests, self.real = [], np.empty((0, 0), np.bool_)

    def _allocate(self, request: KVRequest, count: int, counts: Sequence[int]) -> None:
        request.num_tokens = request.num_computed_tokens + count
        beyond_pool = request.num_tokens > self.allocator.max_model_len >= self.allocator.usable_slots
        grant = None if beyond_pool else self.allocator.allocate_slots(request, count)
        if grant is None:
            seqlens = [request.num_computed_tokens + count for request, count in zip(self.requests, counts, strict=True)]
            needed = 1 + sum(self._peak_blocks(seqlen) for seqlen in seqlens)
            free, usable = self.allocator.manager.num_free_blocks, self.storage.num_blocks - 1
            raise ConfigError(
                f"{free} of {usable} blocks are free, too few for {count} more tokens of sequence {request.request_id}: "
                f"{len(seqlens)} sequences of up to {max(seqlens)} tokens fit in num_blocks={needed} "
                f"({needed * self.storage.block_bytes} bytes); or take fewer sequences, or shorter ones"
            )
        self.storage.apply_copies(grant.copies)

    def _peak_blocks(self, num_tokens: int) -> int:
        if isinstance(self.allocator, HybridAllocator):
            return self.allocator.manager.peak_blocks(num_tokens)
        return -(-num_tokens // self.allocator.unit_slots)

    def _fork(self, parent: KVRequest) -> KVRequest:
        child = KVRequest(request_id=parent.request_id, num_tokens=parent.num_tokens)
        if parent.num_computed_tokens and isinstance(self.allocator, PagedAllocator):
            self.allocator.fork(parent, child)
            child.num_computed_tokens = parent.num_computed_tokens
        return child
