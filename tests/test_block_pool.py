"""The block pool against a list: the free queue in vLLM's order, reference counts, keys, and calls that must change nothing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagedkv.block_hash import BlockKeys
from pagedkv.block_moves import release_behind
from pagedkv.block_pool import BlockPool
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.free_queue import NULL_BLOCK, NUM_KEYED, NUM_SHARES, new_queue
from pagedkv.prefix_cache import PrefixCache


def state(pool: BlockPool) -> list[list[int]]:
    return [column.tolist() for column in (pool.blocks, pool.queue, pool.cache.index, pool.cache.buckets)]


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables take blocks, share blocks of other tables, let some be found by a key, and give them back."""

    @initialize(num_blocks=st.integers(2, 20), freed_to_front=st.booleans())
    def start(self, num_blocks: int, freed_to_front: bool) -> None:
        self.pool = BlockPool(num_blocks=num_blocks, enable_caching=True)
        self.freed_to_front = freed_to_front
        self.queue = list(range(1, num_blocks))
        self.tables: list[list[int]] = []
        self.keyed: set[int] = set()
        self.num_keys = 0

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
            self.keyed -= set(self.queue[:count])
            del self.queue[:count]

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """What a prefix hit will do: another table holds the same blocks."""
        table = data.draw(st.sampled_from([[], *self.tables]))
        prefix = table[: data.draw(st.integers(0, len(table)))]
        self.pool.share(prefix)
        self.tables.append(list(prefix))

    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        plain = sorted({block for table in self.tables for block in table} - self.keyed)
        chosen = data.draw(st.lists(st.sampled_from(plain), unique=True)) if plain else []
        self.pool.cache_full_blocks(chosen, keys_of(*range(self.num_keys, self.num_keys + len(chosen))))
        self.num_keys += len(chosen)
        self.keyed |= set(chosen)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))) if self.tables else []
        held = {block for other in self.tables for block in other}
        freed = [block for block in reversed(table) if block not in held]
        if self.freed_to_front:
            self.pool.free_blocks(table)
            with_key = [block for block in freed if block in self.keyed]
            self.queue = [block for block in freed if block not in self.keyed] + self.queue + with_key
        else:
            release_behind(self.pool.blocks, self.pool.queue, np.array(table, np.int32), len(table))
            self.queue += freed

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
        assert set(self.pool.cache.blocks().tolist()) == self.keyed
        assert self.pool.queue[NUM_KEYED] == len(self.keyed & set(self.queue))
        held = Counter(block for table in self.tables for block in table)
        assert self.pool.ref_cnt.tolist() == [held[block] for block in range(self.pool.num_blocks)]
        assert self.pool.queue[NUM_SHARES] == sum(count - 1 for count in held.values())


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


def keys_of(*numbers: int) -> BlockKeys:
    return np.frombuffer(b"".join(number.to_bytes(16, "little") for number in numbers), np.uint64).reshape(-1, 2)


def caching_pool(num_blocks: int = 8) -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(num_blocks=num_blocks, enable_caching=True)
    assert pool.cache is not None
    return pool, pool.cache


def test_freed_blocks_with_a_key_wait_at_the_back_and_can_be_revived_from_the_middle() -> None:
    pool, cache = caching_pool()
    pool.get_new_blocks(4)
    pool.cache_full_blocks([1, 2, 3], keys_of(11, 12, 13))
    pool.free_blocks([1, 2, 3, 4])
    assert pool.free_queue().tolist() == [4, 5, 6, 7, 3, 2, 1]
    assert pool.hold_prefix(keys_of(12, 99)).tolist() == [2]
    assert pool.free_queue().tolist() == [4, 5, 6, 7, 3, 1]
    pool.get_new_blocks(5)
    assert cache.blocks().tolist() == [1, 2]  # 3 was handed out again
    assert cache.lookup(keys_of(11, 12, 13)).tolist() == [1, 2]
    pool.check_integrity()


def test_all_free_blocks_may_carry_a_key() -> None:
    pool, _ = caching_pool(4)
    pool.get_new_blocks(3)
    pool.cache_full_blocks([1, 3], keys_of(11, 13))
    pool.free_blocks([1, 2, 3])
    assert pool.free_queue().tolist() == [2, 3, 1]
    pool.check_integrity()


def test_the_cache_is_reset_only_when_no_block_is_held() -> None:
    pool, cache = caching_pool(4)
    pool.get_new_blocks(2)
    pool.cache_full_blocks([1], keys_of(11))
    assert not pool.reset_prefix_cache()
    assert cache.blocks().tolist() == [1]
    pool.free_blocks([1, 2])
    queue = pool.free_queue().tolist()
    assert pool.reset_prefix_cache()
    assert cache.blocks().size == 0
    assert pool.free_queue().tolist() == queue
    assert BlockPool(num_blocks=4).reset_prefix_cache()


def test_keys_are_for_blocks_that_are_held_and_have_none() -> None:
    pool, _ = caching_pool()
    pool.get_new_blocks(2)
    pool.cache_full_blocks([1], keys_of(11))
    before = state(pool)
    for blocks in ([1], [3], [0], [9], [2, 2]):
        with pytest.raises(ConfigError, match="cannot cache"):
            pool.cache_full_blocks(blocks, keys_of(*range(len(blocks))))
    for blocks in ([2], [1], [9], [0]):
        with pytest.raises(ConfigError, match="cannot hold"):
            pool.touch(blocks, keys_of(12))
    with pytest.raises(ConfigError, match="a pool with caching"):
        BlockPool(num_blocks=4).cache_full_blocks([1], keys_of(1))
    assert state(pool) == before
    pool.check_integrity()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), max_size=60), st.sampled_from([0, 40, 64, 126]))
def test_the_first_registered_of_those_left_is_found(changes: list[tuple[int, int]], first_bit: int) -> None:
    """Blocks come and go under three keys, which from bit 40 on share a bucket."""
    cache, carriers = PrefixCache(new_queue(10)[0]), dict[int, list[int]]()
    for block, number in changes:
        for others in carriers.values():
            if block in others:
                cache.remove(block)
                others.remove(block)
                break
        else:
            cache.insert(block, keys_of(number << first_bit), 0)
            carriers.setdefault(number, []).append(block)
        cache.check_integrity()
        for each in (1, 2, 3):
            assert cache.lookup(keys_of(each << first_bit)).tolist() == carriers.get(each, [])[:1]


@pytest.mark.parametrize("bit", range(128))
def test_every_bit_of_a_key_is_compared(bit: int) -> None:
    cache, key = PrefixCache(new_queue(4)[0]), 0x0123_4567_89AB_CDEF_0123_4567_89AB_CDEF
    other = key ^ (1 << bit)
    cache.insert(1, keys_of(key), 0)
    assert cache.lookup(keys_of(key)).tolist() == [1]
    assert cache.lookup(keys_of(other)).tolist() == []
    cache.insert(2, keys_of(other), 0)
    assert cache.lookup(keys_of(key, other)).tolist() == [1, 2]
    cache.remove(1)
    assert cache.lookup(keys_of(key)).tolist() == []


@pytest.mark.parametrize(
    ("column", "at", "value"),
    [
        ("key_a", 1, 77),
        ("next_same", 1, 0),
        ("next_same", 3, 3),
        ("prev_same", 1, 1),
        ("buckets", 1, 0),
        ("next_same", 1, 9),
    ],
)
def test_corruption_of_the_cache_is_noticed(column: str, at: int, value: int) -> None:
    pool, cache = caching_pool()
    pool.get_new_blocks(3)
    pool.cache_full_blocks([1, 2], keys_of(1, 1))
    columns = {"buckets": cache.buckets, "key_a": cache.index["key_a"]}
    columns |= {name: pool.blocks[name] for name in ("next_same", "prev_same")}
    columns[column][at] = value
    with pytest.raises(IntegrityError):
        pool.check_integrity()


@pytest.mark.parametrize("num_blocks", [2, 5, 1000, 1025, 4096])
def test_state_stays_within_64_bytes_per_block(num_blocks: int) -> None:
    """48 for the block, its two places in the ring and its key; buckets of 4 bytes are a power of two, so 4 to 8 per block."""
    pool, cache = caching_pool(num_blocks)
    queue_header = 32
    num_bytes = sum(array.nbytes for array in (pool.blocks, pool.queue, cache.index, cache.buckets))
    assert num_bytes == 48 * num_blocks + 4 * cache.buckets.size + queue_header
    assert num_blocks <= cache.buckets.size < 2 * num_blocks
    assert num_bytes <= 64 * num_blocks + queue_header
    assert pool.num_bytes == num_bytes
