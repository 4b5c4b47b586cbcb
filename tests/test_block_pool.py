"""The block pool against a list: the free queue in vLLM's order, reference counts, and calls that must change nothing."""

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagedkv.block_pool import NULL_BLOCK, BlockPool
from pagedkv.errors import ConfigError


def state(pool: BlockPool) -> list[list[int]]:
    return [column.tolist() for column in pool.arrays]


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables take blocks, share blocks of other tables, and give them back."""

    @initialize(num_blocks=st.integers(2, 20))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks)
        self.queue = list(range(1, num_blocks))
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 8))
    def take(self, count: int) -> None:
        before = state(self.pool)
        blocks = self.pool.get_new_blocks(count)
        if count > len(self.queue):
            assert blocks is None
            assert state(self.pool) == before
        else:
            assert blocks is not None
            assert blocks.tolist() == self.queue[:count]
            self.tables.append(self.queue[:count])
            del self.queue[:count]

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """What a prefix hit will do: another table holds the same blocks."""
        table = data.draw(st.sampled_from([[], *self.tables]))
        prefix = table[: data.draw(st.integers(0, len(table)))]
        self.pool.arrays.ref_cnt[prefix] += 1
        self.tables.append(list(prefix))

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))) if self.tables else []
        self.pool.free_blocks(table)
        held = {block for other in self.tables for block in other}
        self.queue = [block for block in reversed(table) if block not in held] + self.queue

    @rule(blocks=st.lists(st.integers(-1, 21), max_size=4))
    def free_what_is_not_held(self, blocks: list[int]) -> None:
        held = Counter(block for table in self.tables for block in table)
        if Counter(blocks) - held:
            before = state(self.pool)
            with pytest.raises(ConfigError):
                self.pool.free_blocks(blocks)
            assert state(self.pool) == before

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free_queue().tolist() == self.queue
        assert self.pool.num_free_blocks == len(self.queue)
        held = Counter(block for table in self.tables for block in table)
        assert self.pool.arrays.ref_cnt.tolist() == [held[block] for block in range(self.pool.num_blocks)]


TestBlockPool = BlockPoolMachine.TestCase


def test_the_tail_of_a_freed_table_is_handed_out_first() -> None:
    pool = BlockPool(num_blocks=8)
    first, second = pool.get_new_blocks(2), pool.get_new_blocks(3)
    assert first is not None
    assert second is not None
    pool.free_blocks(first)
    pool.free_blocks(second)
    assert pool.free_queue().tolist() == [5, 4, 3, 2, 1, 6, 7]


def test_the_null_block_is_never_handed_out_nor_taken_back() -> None:
    pool = BlockPool(num_blocks=3)
    blocks = pool.get_new_blocks(2)
    assert blocks is not None
    assert NULL_BLOCK not in blocks
    assert pool.get_new_blocks(1) is None
    with pytest.raises(ConfigError, match="hands out 1 to 2"):
        pool.free_blocks([NULL_BLOCK])


def test_a_double_free_names_the_block() -> None:
    pool = BlockPool(num_blocks=4)
    pool.get_new_blocks(2)
    with pytest.raises(ConfigError, match="double free of block 2: it is held 1 times"):
        pool.free_blocks([1, 2, 2])
    pool.free_blocks([1, 2])
    with pytest.raises(ConfigError, match="double free of block 1"):
        pool.free_blocks([1])


def test_the_number_of_blocks_must_make_sense() -> None:
    for num_blocks in (-1, 0, 1, 2**31):
        with pytest.raises(ConfigError, match=f"a pool of {num_blocks} blocks"):
            BlockPool(num_blocks=num_blocks)
    with pytest.raises(ConfigError, match="cannot take -1"):
        BlockPool(num_blocks=4).get_new_blocks(-1)
