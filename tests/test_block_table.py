"""Where the tokens of a row lie."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.block_table import BlockTables


@given(data=st.data(), block_size=st.integers(1, 9), num_blocks=st.integers(1, 6))
def test_slot_of_each_token_is_its_place_in_its_block(data: st.DataObject, block_size: int, num_blocks: int) -> None:
    tables = BlockTables(max_num_seqs=3, max_model_len=num_blocks * block_size, block_size=block_size)
    blocks = data.draw(st.lists(st.integers(1, 10**6), min_size=num_blocks, max_size=num_blocks, unique=True))
    tables.blocks[1] = blocks
    tables.num_blocks[1] = num_blocks
    slots = [block * block_size + offset for block in blocks for offset in range(block_size)]
    first = data.draw(st.integers(0, len(slots)))
    last = data.draw(st.integers(first, len(slots)))
    assert tables.slot_mapping(1, first, last).tolist() == slots[first:last]


def test_slots_do_not_overflow_the_type_of_block_ids() -> None:
    tables = BlockTables(max_num_seqs=1, max_model_len=16, block_size=16)
    tables.blocks[0, 0] = 2**31 - 1
    assert tables.slot_mapping(0, 15, 16).tolist() == [16 * (2**31 - 1) + 15]


def test_a_table_is_a_view_of_what_the_kernels_read() -> None:
    tables = BlockTables(max_num_seqs=2, max_model_len=10, block_size=4)
    assert tables.blocks.shape == (2, 3)  # a last block that is not full counts
    assert tables.blocks.dtype == np.int32
    assert tables.blocks.flags.c_contiguous
    tables.num_blocks[1] = 2
    tables.of(1)[:] = [7, 9]
    assert tables.blocks.tolist() == [[0, 0, 0], [7, 9, 0]]
    assert tables.of(0).size == 0
