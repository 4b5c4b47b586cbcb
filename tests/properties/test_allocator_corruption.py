"""A look at an allocator notices what is wrong in its memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from step_allocators import POOL, admitted

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import IntegrityError
from pagedkv.free_queue import FIRST, HEAD, NUM_FREE, SPAN
from pagedkv.kv_request import KVRequest
from pagedkv.step_allocation import RequestByRequest


def request_by_request(name: str, pool: KVPoolSettings) -> RequestByRequest:
    return RequestByRequest(ALLOCATORS.load(name)(pool))


def put(array: Any, at: Any, value: int) -> None:
    array[at] = value


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a: put(a.pool.ref_cnt, 1, 2), id="one reference too many"),
        pytest.param(lambda a: put(a.pool.ref_cnt, 1, 0), id="held block without a reference"),
        pytest.param(lambda a: put(a.pool.ref_cnt, 7, 1), id="free block with a reference"),
        pytest.param(lambda a: put(a.pool.ref_cnt, 7, -1), id="negative reference count"),
        pytest.param(lambda a: put(a.pool.queue, FIRST + 5, 7), id="block twice in the queue"),
        pytest.param(lambda a: put(a.pool.queue, FIRST + 5, 1), id="held block in the queue"),
        pytest.param(lambda a: put(a.pool.blocks["place"], 7, 5), id="wrong place"),
        pytest.param(lambda a: put(a.pool.queue, NUM_FREE, 1), id="too few counted"),
        pytest.param(lambda a: put(a.pool.queue, NUM_FREE, 3), id="too many counted"),
        pytest.param(lambda a: put(a.tables.blocks, (0, 1), 3), id="another row's block in a table"),
        pytest.param(lambda a: put(a.tables.blocks, (0, 1), 6), id="free block in a table"),
        pytest.param(lambda a: put(a.tables.blocks, (0, 1), 99), id="unknown block in a table"),
        pytest.param(lambda a: put(a.tables.num_blocks, 0, 1), id="table too short"),
        pytest.param(lambda a: put(a.tables.num_blocks, 1, 4), id="table too long"),
        pytest.param(lambda a: put(a.tables.num_blocks, 0, 5), id="table beyond its row"),
        pytest.param(lambda a: put(a.tables.blocks, (0, 1), -1), id="negative block in a table"),
        pytest.param(lambda a: put(a.pool.queue, HEAD, 99), id="head out of the ring"),
        pytest.param(lambda a: put(a.pool.queue, SPAN, -1), id="negative count"),
    ],
)
def test_paged_notices_corruption(corrupt: Callable[[Any], None]) -> None:
    allocator = admitted("paged", 16, 4)  # tables [1, 2, 3, 4] and [5], queue [6, 7]
    corrupt(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


@pytest.mark.parametrize("block", [0, 2, 7, 99, -1])
def test_paged_notices_a_state_block_that_is_not_its_own(block: int) -> None:
    allocator = admitted("paged", 8, pool=replace(POOL, state_slots=4))  # table [1, 2], state [3]
    put(allocator.state_tables, (0, 0), block)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a, r: put(a.allocator._addresses, r[1], 2), id="two requests overlap"),
        pytest.param(lambda a, r: a.allocator._addresses.pop(r[1]), id="address lost"),
        pytest.param(lambda a, r: put(a.allocator._addresses, KVRequest(request_id="x", num_tokens=1), 20), id="held by nobody"),
        pytest.param(lambda a, r: setattr(r[1], "admission_slots", 2), id="wrong size, rounded otherwise"),
        pytest.param(lambda a, r: setattr(r[1], "admission_slots", 4), id="wrong size, rounded alike"),
        pytest.param(lambda a, r: put(a.units_held, 1, 2), id="row with a wrong size"),
        pytest.param(lambda a, r: setattr(a.allocator, "rounding_slots", 0), id="wrong count of rounding"),
        pytest.param(lambda a, r: a.allocator.heap.reserve(1), id="reservation that no request has"),
        pytest.param(lambda a, r: put(a.allocator._addresses, r[1], 16), id="address in a free extent"),
        pytest.param(lambda a, r: put(a.allocator._addresses, r[1], 999), id="address out of the heap"),
    ],
)
def test_contiguous_request_by_request_notices_corruption(corrupt: Callable[[Any, Any], None]) -> None:
    allocator = admitted("contiguous-oracle", 4, 3, new=request_by_request)  # 4 slots at 0, 3 (as 4) at 4
    corrupt(allocator, allocator.allocator.live_requests())
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a: put(a.arrays.addresses, 1, 2), id="two rows overlap"),
        pytest.param(lambda a: put(a.arrays.held, 1, 0), id="interval of nobody"),
        pytest.param(lambda a: put(a.arrays.held, 2, 1), id="row without an interval"),
        pytest.param(lambda a: put(a.arrays.held, 1, 2), id="wrong size, rounded otherwise"),
        pytest.param(lambda a: put(a.arrays.held, 1, 4), id="wrong size, rounded alike"),
        pytest.param(lambda a: put(a.arrays.rounding, 0, 0), id="wrong count of rounding"),
        pytest.param(lambda a: a.heap.reserve(1), id="reservation that no row has"),
        pytest.param(lambda a: put(a.arrays.addresses, 1, 16), id="address in a free extent"),
        pytest.param(lambda a: put(a.arrays.addresses, 1, 999), id="address out of the heap"),
    ],
)
def test_contiguous_notices_corruption(corrupt: Callable[[Any], None]) -> None:
    allocator = admitted("contiguous-oracle", 4, 3)  # 4 slots at 0, 3 (as 4) at 4
    corrupt(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a: put(a.arrays.places, 1, 0), id="two rows in one place"),
        pytest.param(lambda a: put(a.arrays.places, 1, 2), id="place that is idle"),
        pytest.param(lambda a: put(a.arrays.held, 1, 0), id="pages of nobody"),
        pytest.param(lambda a: put(a.arrays.held, 1, 2), id="more pages than it needs"),
        pytest.param(lambda a: put(a.pages.arrays.table, (0, 1), 0), id="page twice"),
    ],
)
def test_virtual_memory_notices_corruption(corrupt: Callable[[Any], None]) -> None:
    allocator = admitted("vattention", 8, 3, pool=replace(POOL, page_tokens=4))
    corrupt(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()
