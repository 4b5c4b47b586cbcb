"""A block pool in plain Python, one object per block and a doubly linked free list: what the benchmark measures ours against.

Same semantics as `pagedkv.block_pool.BlockPool`, written as such pools usually are.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Block:
    """One block. Free blocks are linked."""

    block_id: int
    ref_cnt: int = 0
    key: bytes | None = None
    before: "Block | None" = None
    after: "Block | None" = None


class PythonBlockPool:
    """`num_blocks` blocks, block 0 never handed out."""

    def __init__(self, *, num_blocks: int, enable_caching: bool = False) -> None:
        self.enable_caching = enable_caching
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.num_free = num_blocks - 1
        self._head = self._tail = Block(-1)
        self._tail = Block(-2)
        self._head.after, self._tail.before = self._tail, self._head
        for block in self.blocks[1:]:
            self._link(self._tail.before, block)
        self._cached: dict[bytes, dict[int, Block]] = {}

    def get_new_blocks(self, num_blocks: int) -> list[Block] | None:
        """Take blocks from the front; None if there are not so many."""
        if num_blocks > self.num_free:
            return None
        taken = []
        for _ in range(num_blocks):
            block = self._head.after
            assert block is not None
            self._unlink(block)
            if self.enable_caching and block.key is not None:
                self._forget(block)
            block.ref_cnt = 1
            taken.append(block)
        self.num_free -= num_blocks
        return taken

    def free_blocks(self, table: Sequence[Block]) -> None:
        """Drop a reference to each, tail first: blocks without a key to the front, the others to the back."""
        before = self._head
        for block in reversed(table):
            if block.ref_cnt == 0:
                raise ValueError(f"double free of block {block.block_id}")
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self.num_free += 1
                if block.key is None:
                    self._link(before, block)
                    before = block
                else:
                    self._link(self._tail.before, block)

    def cache_full_blocks(self, table: Sequence[Block], keys: Sequence[bytes]) -> None:
        """Let each block be found under its key."""
        for block, key in zip(table, keys, strict=True):
            block.key = key
            self._cached.setdefault(key, {})[block.block_id] = block

    def hold_prefix(self, keys: Sequence[bytes]) -> list[Block]:
        """Look up the longest run of `keys` and hold its blocks once more."""
        hits = []
        for key in keys:
            found = self._cached.get(key)
            if not found:
                break
            hits.append(next(iter(found.values())))
        for block in hits:
            if block.ref_cnt == 0:
                self._unlink(block)
                self.num_free -= 1
            block.ref_cnt += 1
        return hits

    def _forget(self, block: Block) -> None:
        assert block.key is not None
        carriers = self._cached[block.key]
        del carriers[block.block_id]
        if not carriers:
            del self._cached[block.key]
        block.key = None

    @staticmethod
    def _link(before: "Block | None", block: Block) -> None:
        assert before is not None
        after = before.after
        assert after is not None
        before.after, block.before, block.after, after.before = block, before, after, block

    @staticmethod
    def _unlink(block: Block) -> None:
        assert block.before is not None
        assert block.after is not None
        block.before.after, block.after.before = block.after, block.before
        block.before = block.after = None
