"""Which row of the block tables each request has, and what it holds there."""

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int32Array
from pagedkv.block_pool import BlockPool
from pagedkv.block_table import BlockTables
from pagedkv.errors import IntegrityError
from pagedkv.free_queue import NULL_BLOCK
from pagedkv.kv_request import KVRequest


class RequestRows:
    """Rows of block tables, each of one request that holds blocks or of none."""

    def __init__(self, settings: KVPoolSettings) -> None:
        rows, size = settings.max_num_seqs, settings.block_size
        self.tables = BlockTables(max_num_seqs=rows, max_model_len=settings.max_model_len, block_size=size)
        self.states: Int32Array = np.zeros((rows, -(-settings.state_slots // size)), np.int32)
        """By row: blocks for a state of fixed size."""
        self.num_registered: Int32Array = np.zeros(rows, np.int32)
        """By row: leading blocks that carry their key."""
        self.of: dict[KVRequest, int] = {}
        """By request that holds blocks, in order of admission: its row."""
        self.free = list(range(rows))[::-1]
        """Rows of nobody, the next one to be given last."""

    def expect(self, request: KVRequest) -> int:
        """Return the row of `request`; raise ConfigError if it holds nothing."""
        row = self.of.get(request)
        if row is None:
            raise request.holds_nothing()
        return row

    def open(self, request: KVRequest) -> int:
        """Give `request` a row, of which there must be a free one."""
        self.of[request] = row = self.free.pop()
        return row

    def fork(self, row: int, child: KVRequest) -> int:
        """Give `child` a row, of which there must be a free one, with the table of `row`. Return it."""
        table, place = self.tables.of(row), self.open(child)
        self.tables.blocks[place, : table.size] = table
        self.tables.num_blocks[place], self.num_registered[place] = table.size, self.num_registered[row]
        return place

    def close(self, request: KVRequest) -> None:
        """Take the row of `request` back."""
        row = self.of.pop(request)
        self.tables.num_blocks[row] = self.num_registered[row] = 0
        self.free.append(row)

    def check_integrity(self, pool: BlockPool) -> None:
        """Raise IntegrityError unless `pool` counts these tables, and rows and keys are in order. O(num_blocks + blocks held)."""
        tables = {
            request.request_id: [*self.tables.of(row).tolist(), *self.states[row].tolist()] for request, row in self.of.items()
        }
        held = np.array([block for table in tables.values() for block in table], np.int64)
        inside = ((held > NULL_BLOCK) & (held < pool.num_blocks)).all() and len(tables) == len(self.of)
        if not inside or not np.array_equal(np.bincount(held, minlength=pool.num_blocks), pool.ref_cnt):
            raise IntegrityError(f"reference counts {pool.ref_cnt.tolist()} do not match the tables {tables}")
        if sorted([*self.of.values(), *self.free]) != list(range(len(self.tables.num_blocks))):
            raise IntegrityError(f"rows {sorted(self.of.values())} in use, {sorted(self.free)} free: not each once")
        for request, row in self.of.items():
            registered = self.tables.of(row)[: self.num_registered[row]]
            if pool.enable_caching and not pool.cache.carry(registered, request.block_keys):
                raise IntegrityError(f"blocks {registered.tolist()} of request {request.request_id!r} do not carry its keys")
