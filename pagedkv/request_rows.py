"""Which row of the block tables each request has, and what it holds there."""

from collections.abc import Mapping

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_BLOCKS, Int32Array
from pagedkv.block_pool import BlockPool
from pagedkv.block_table import BlockTables
from pagedkv.errors import IntegrityError
from pagedkv.free_queue import NULL_BLOCK
from pagedkv.kv_request import KVRequest


class RequestRows:
    """Rows, each of one request that holds blocks or of none.

    Example:
        >>> rows, request = RequestRows(2), KVRequest(request_id="a", num_tokens=1)
        >>> rows.open(request), rows.expect(request), rows.close(request), rows.free
        (0, 0, 0, [1, 0])
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.of: dict[KVRequest, int] = {}
        """By request that holds blocks, in order of admission: its row."""
        self.free = list(range(num_rows))[::-1]
        """Rows of nobody, the next one to be given last."""

    def expect(self, request: KVRequest) -> int:
        """Return the row of `request`; raise ConfigError if it holds nothing. O(1)."""
        row = self.of.get(request)
        if row is None:
            raise request.holds_nothing()
        return row

    def open(self, request: KVRequest) -> int:
        """Give `request` a row, of which there must be a free one, and return it. O(1)."""
        self.of[request] = row = self.free.pop()
        return row

    def close(self, request: KVRequest) -> int:
        """Take the row of `request` back and return it. O(1)."""
        row = self.of.pop(request)
        self.free.append(row)
        return row

    def check_held(self, pool: BlockPool, held: Mapping[KVRequest, Int32Array]) -> None:
        """Raise IntegrityError unless `pool` counts what each request holds, and rows are in order. O(num_blocks + blocks held)."""
        blocks = np.concatenate([NO_BLOCKS, *held.values()])
        inside = ((blocks > NULL_BLOCK) & (blocks < pool.num_blocks)).all()
        if not inside or not np.array_equal(np.bincount(blocks, minlength=pool.num_blocks), pool.ref_cnt):
            tables = [(request.request_id, table.tolist()) for request, table in held.items()]
            raise IntegrityError(f"reference counts {pool.ref_cnt.tolist()} do not match the tables {tables}")
        if sorted([*self.of.values(), *self.free]) != list(range(self.num_rows)):
            raise IntegrityError(f"rows {sorted(self.of.values())} in use, {sorted(self.free)} free: not each once")


class TableRows(RequestRows):
    """Rows with a block table each, and blocks for a state."""

    def __init__(self, settings: KVPoolSettings) -> None:
        rows, size = settings.max_num_seqs, settings.block_size
        super().__init__(rows)
        self.tables = BlockTables(max_num_seqs=rows, max_model_len=settings.max_model_len, block_size=size)
        self.states: Int32Array = np.zeros((rows, -(-settings.state_slots // size)), np.int32)
        """By row: blocks for a state of fixed size."""
        self.num_registered: Int32Array = np.zeros(rows, np.int32)
        """By row: leading blocks that carry their key."""

    def fork(self, row: int, child: KVRequest) -> int:
        """Give `child` a row, of which there must be a free one, with the table of `row`. Return it. O(blocks)."""
        table, place = self.tables.of(row), self.open(child)
        self.tables.blocks[place, : table.size] = table
        self.tables.num_blocks[place], self.num_registered[place] = table.size, self.num_registered[row]
        return place

    def close(self, request: KVRequest) -> int:
        """Take the row of `request` back, its table empty, and return it. O(1)."""
        row = super().close(request)
        self.tables.num_blocks[row] = self.num_registered[row] = 0
        return row

    def check_integrity(self, pool: BlockPool) -> None:
        """Raise IntegrityError unless `pool` counts these tables, and rows and keys are in order. O(num_blocks + blocks held)."""
        self.check_held(
            pool, {request: np.concatenate((self.tables.of(row), self.states[row])) for request, row in self.of.items()}
        )
        for request, row in self.of.items():
            registered = self.tables.of(row)[: self.num_registered[row]]
            if pool.enable_caching and not pool.cache.carry(registered, request.block_keys):
                raise IntegrityError(f"blocks {registered.tolist()} of request {request.request_id!r} do not carry its keys")
