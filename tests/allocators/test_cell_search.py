"""llama.cpp's cells: where the search finds room, against a plain model, and what attention reads."""

import numpy as np
import pytest
from cell_requests import SPLIT, UNIFIED, admit, allocator_of, request_of, run
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.arrays import Int32Array
from pagedkv.cell_cache import CellCache, carry_cells, place_cells


def place(cache: CellCache, count: int) -> Int32Array:
    found = np.zeros(count, np.int32)
    place_cells(cache.arrays, found)
    return found


def give_back(cache: CellCache, cells: list[int] | Int32Array) -> None:
    """Let the running sequence that `cells` carry be idle, then gone."""
    which = np.array(cells, np.int32)
    carry_cells(cache.arrays, which, 0, -1)
    carry_cells(cache.arrays, which, -1, 0)


class PlainCells:
    """The search of llama.cpp as its rule reads: a set of sequence numbers per cell."""

    def __init__(self, size: int) -> None:
        self.cells: list[set[int]] = [set() for _ in range(size)]
        self.head = 0

    def place(self, sequence: int, count: int) -> list[int] | None:
        size, used = len(self.cells), sum(map(bool, self.cells))
        start = 0 if self.head > used + 2 * count else self.head
        tried = [(start + i) % size for i in range(size)]
        found = [cell for cell in tried if not self.cells[cell]][:count]
        if len(found) < count:
            return None
        for cell in found:
            self.cells[cell].add(sequence)
        self.head = found[-1] + 1
        return found

    def remove(self, sequence: int, cells: list[int]) -> None:
        for cell in cells:
            self.cells[cell].discard(sequence)
        emptied = [cell for cell in cells if not self.cells[cell]]
        self.head = min([self.head, *emptied])


@given(
    st.integers(1, 24),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from("place cut share end".split()), st.integers(0, 9)), max_size=40),
)
def test_search_and_head_agree_with_a_plain_model(size: int, operations: list[tuple[int, str, int]]) -> None:
    cache, model = CellCache(size), PlainCells(size)
    sequences: list[list[int]] = [[] for _ in range(5)]
    for sequence, operation, count in operations:
        held = sequences[sequence]
        if operation == "place" and count:
            assert (cache.num_empty >= count) == (sum(not cell for cell in model.cells) >= count)
            if cache.num_empty >= count:
                found = model.place(sequence, count)
                assert place(cache, count).tolist() == found
                held += found or []
        elif operation == "share" and not sequences[count % 5]:
            sequences[count % 5] = list(held)
            carry_cells(cache.arrays, np.array(held, np.int32), 1, 1)
            for cell in held:
                model.cells[cell].add(count % 5)
        elif operation in ("cut", "end"):
            dropped = held[count:] if operation == "cut" else list(held)
            give_back(cache, dropped)
            model.remove(sequence, dropped)
            del held[len(held) - len(dropped) :]
        cache.check_integrity([np.array(s, np.int32) for s in sequences], [])
        assert cache.arrays.counters[0] % size == model.head % size
        assert cache.arrays.num_seqs.tolist() == [len(cell) for cell in model.cells]
        assert cache.num_held == cache.size - cache.num_empty == sum(map(bool, model.cells))


def test_cells_need_not_be_adjacent_so_holes_are_as_good_as_any_room() -> None:
    allocator = allocator_of(UNIFIED, 8, seqs=4, caching=False)
    requests = [request_of([i, i], str(i)) for i in range(4)]
    for request in requests:
        assert admit(allocator, request) is not None
    allocator.free(requests[0])
    allocator.free(requests[2])
    long = request_of(range(4))
    assert admit(allocator, long) is not None
    assert allocator.slots_held(long).tolist() == [0, 1, 4, 5]


def test_search_goes_on_behind_the_last_cell_taken_and_wraps() -> None:
    cache = CellCache(8)
    first = place(cache, 6)
    give_back(cache, first[1:3])
    assert place(cache, 1).tolist() == [1]  # emptied cells pull the head down
    assert place(cache, 2).tolist() == [2, 6]
    give_back(cache, first[:1])
    cache.arrays.counters[0] = 7
    assert place(cache, 2).tolist() == [7, 0]


@pytest.mark.parametrize(("count", "cell"), [(3, 10), (2, 0)])
def test_search_starts_over_if_the_head_is_more_than_twice_the_request_above_the_used_cells(count: int, cell: int) -> None:
    cache = CellCache(20)
    place(cache, 5)
    cache.arrays.counters[0] = 10  # 5 used: 10 > 5 + 2 * 2, but not 10 > 5 + 2 * 3
    assert place(cache, count)[0] == (cell or 5)


def test_attention_reads_up_to_the_highest_used_cell_padded_to_256() -> None:
    allocator = allocator_of(UNIFIED, 1000, longest=600)
    assert allocator.n_kv == 0
    low, high = request_of(range(255), "low"), request_of(range(1000, 1002), "high")
    admit(allocator, low)
    assert allocator.n_kv == 256
    admit(allocator, high)
    assert allocator.n_kv == 512
    low.token_ids = low.token_ids[:0]
    allocator.free(low)
    assert allocator.n_kv == 512  # 2 tokens in use, at the top
    allocator.free(high)
    assert allocator.n_kv == 512  # what an idle slot remembers counts too
    assert admit(allocator, request_of(range(2000, 2600))) is not None
    assert allocator.n_kv == 768
    assert admit(allocator, request_of(range(1000, 1300), "again")) is not None
    assert allocator.n_kv == 1000  # no more than there is


def test_split_attention_reads_the_longest_running_stream() -> None:
    allocator = allocator_of(SPLIT, 1200, longest=600)
    run(allocator, request_of(range(500)))
    assert allocator.n_kv == 0
    first, second = request_of(range(900, 910)), request_of(range(2000, 2257))
    admit(allocator, first)
    assert allocator.n_kv == 256
    admit(allocator, second)
    assert allocator.n_kv == 512
