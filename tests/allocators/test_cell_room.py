"""llama.cpp's cells, unified and split, and Ollama's: who has how much room, and what is purged for it."""

import numpy as np
import pytest
from cell_requests import OLLAMA, SPLIT, UNIFIED, admit, allocator_of, grow, remembered, request_of, run

from pagedkv.allocation import Forkable, Grant
from pagedkv.errors import ConfigError
from pagedkv.shadow_memory import check_unchanged, state_of


def test_unified_purges_idle_slots_by_number_and_only_as_far_as_needed() -> None:
    allocator = allocator_of(UNIFIED, 12, seqs=4)
    requests = [request_of([i] * 3, str(i)) for i in range(4)]
    for request in requests[:3]:
        admit(allocator, request)
    for request in requests[:3]:
        allocator.free(request)  # slot 3 is the oldest, slot 1 the youngest
    grower = request_of([7] * 3)
    admit(allocator, grower, 3)  # in slot 0; no empty cell is left
    grower.num_tokens, grower.token_ids = 8, np.full(8, 7, np.int32)
    assert grow(allocator, grower, 1) is not None
    assert remembered(allocator) == [[], [], [1] * 3, [0] * 3]
    assert grow(allocator, grower, 4) is not None  # 2 are empty: the next slot goes too
    assert remembered(allocator) == [[], [], [], [0] * 3]


def test_unified_purges_nothing_if_that_would_not_make_the_batch_fit() -> None:
    allocator = allocator_of(UNIFIED, 12, seqs=3)
    run(allocator, request_of([1] * 4))
    first, second = request_of([2] * 5), request_of([3] * 8)
    admit(allocator, first)
    assert grow(allocator, second, 8) is None  # `grow` compares the state
    assert sorted(remembered(allocator)) == [[], [], [1] * 4]
    assert grow(allocator, second, 7) is not None
    assert remembered(allocator) == [[], [], []]


def test_unified_keeps_the_common_prefix_of_the_slot_it_admits_to() -> None:
    allocator = allocator_of(UNIFIED, 10, seqs=2)
    run(allocator, request_of([1, 2, 3, 4]))
    run(allocator, request_of([5, 6, 7, 8]))
    long = request_of([1, 2, 3, *range(20, 27)])
    assert admit(allocator, long) == Grant(num_cached_tokens=3)  # all 10 cells, the other slot purged
    assert allocator.free_slots == 0


def test_unified_slot_may_use_the_whole_stream_and_a_split_one_its_part() -> None:
    assert allocator_of(UNIFIED, 32, seqs=4, longest=100).admission_slots(30, 3) == 0
    assert allocator_of(UNIFIED, 32, seqs=4, longest=100).admission_slots(30, 4) is None
    split = allocator_of(SPLIT, 34, seqs=4, longest=100)
    assert (split.stream_cells, split.usable_slots) == (8, 32)
    assert (split.admission_slots(5, 4), split.admission_slots(5, 5)) == (8, None)
    assert allocator_of(SPLIT, 64, seqs=2, longest=10).admission_slots(8, 4) is None  # max_model_len binds


def test_split_request_takes_its_whole_stream_and_never_its_neighbours() -> None:
    allocator = allocator_of(SPLIT, 16, seqs=2)
    request = request_of([1, 2])
    admit(allocator, request)
    assert allocator.slots_held(request).tolist() == list(range(8, 16))
    assert allocator.free_slots == 8
    request.num_computed_tokens = 8
    before = state_of(allocator)
    with pytest.raises(ConfigError, match="a server slot has 8 cells"):
        allocator.allocate_slots(request, 1)
    check_unchanged(before, state_of(allocator))


def test_split_purges_nothing() -> None:
    allocator = allocator_of(SPLIT, 16, seqs=2)
    run(allocator, request_of([1] * 8))
    assert admit(allocator, request_of([2] * 8)) is not None
    assert [1] * 8 in remembered(allocator)


@pytest.mark.parametrize(("slots", "seqs", "server_slots"), [(64, 2, 2), (64, 8, 4), (63, 8, 3), (15, 8, 0)])
def test_ollama_reserves_the_context_for_every_slot_at_load(slots: int, seqs: int, server_slots: int) -> None:
    allocator = allocator_of(OLLAMA, slots, seqs=seqs)
    assert len(allocator.server_slots.slots) == server_slots
    assert allocator.usable_slots == allocator.free_slots == server_slots * 16
    assert allocator.admission_slots(10, 7) == (16 if server_slots else None)
    assert allocator.admission_slots(10, 8) is None
    requests = [request_of([i], str(i)) for i in range(server_slots + 1)]
    for request in requests[:server_slots]:
        assert admit(allocator, request) is not None
    assert allocator.free_slots == 0
    if server_slots < seqs:
        assert grow(allocator, requests[-1], 1) is None  # it waits for a server slot
    assert not isinstance(allocator, Forkable)


@pytest.mark.parametrize(("name", "usable"), [(UNIFIED, 40), (SPLIT, 40), (OLLAMA, 38)])
def test_state_is_set_aside_at_load_for_every_server_slot(name: str, usable: int) -> None:
    allocator = allocator_of(name, 40, seqs=2, state_slots=3)
    assert allocator.usable_slots == allocator.free_slots == usable
    request = request_of([1])
    admit(allocator, request)
    assert allocator.free_slots == usable - 3 - allocator.num_slots_held(request)
    assert allocator.slots_held(request).max() < 40 - 2 * 3
    assert len(allocator_of(OLLAMA, 37, seqs=2, state_slots=3).server_slots.slots) == 1


@pytest.mark.parametrize("name", [UNIFIED, SPLIT])
def test_pool_that_the_state_fills_admits_nobody(name: str) -> None:
    allocator = allocator_of(name, 40, seqs=2, state_slots=20)
    assert allocator.usable_slots == 0
    assert allocator.admission_slots(1, 1) is None
