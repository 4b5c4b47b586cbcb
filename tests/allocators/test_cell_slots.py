"""llama.cpp's server slots, and Ollama's: which one a request gets, and what it finds there."""

from typing import Any

import numpy as np
import pytest
from cell_requests import EVERY, admit, allocator_of, grow, remembered, request_of, run, slot_of

from pagedkv.allocation import Grant


@EVERY
def test_new_requests_take_the_last_of_the_slots_that_never_ran(name: str) -> None:
    allocator = allocator_of(name, 64, seqs=4)
    requests = [request_of([i, i + 1], str(i)) for i in range(0, 40, 10)]
    for request in requests:
        admit(allocator, request)
    assert [slot_of(allocator, request) for request in requests] == [3, 2, 1, 0]


@EVERY
def test_slot_that_ended_longest_ago_goes_to_a_request_that_is_like_none(name: str) -> None:
    allocator = allocator_of(name, 48, seqs=3)
    a, b, c = (request_of([i] * 3, str(i)) for i in (10, 20, 30))
    for request in (a, b, c):
        admit(allocator, request)
    ended = [(slot_of(allocator, request), allocator.free(request))[0] for request in (b, c, a)]
    assert [run(allocator, request_of([i, i], str(i))) for i in (40, 50, 60)] == ended


@EVERY
def test_slot_with_more_than_a_tenth_of_the_prompt_comes_before_the_oldest(name: str) -> None:
    allocator = allocator_of(name, 80, seqs=4, longest=20)
    run(allocator, request_of([9, 9, 9]))  # the oldest that remembers something
    home = run(allocator, request_of([1, 2, 3]))
    tenth = request_of([1, *range(100, 109)], "a tenth: not enough")
    assert admit(allocator, tenth, 1) is not None
    assert slot_of(allocator, tenth) not in (home, 3)
    eleventh = request_of([1, *range(100, 108)], "more than a tenth")
    assert admit(allocator, eleventh, 1) == Grant(num_cached_tokens=1)
    assert slot_of(allocator, eleventh) == home


@EVERY
def test_slot_with_the_longest_common_prefix_wins_and_the_first_of_equal_ones(name: str) -> None:
    allocator = allocator_of(name, 64, seqs=4)
    requests = [request_of(tokens) for tokens in ([1, 2, 5], [1, 2, 3, 5], [1, 2, 3, 6], [1, 7])]
    for request in requests:
        admit(allocator, request)  # in slots 3, 2, 1, 0
    for request in requests:
        allocator.free(request)
    wanted = request_of([1, 2, 3, 4])
    assert allocator.get_computed_tokens(wanted) == 3
    assert run(allocator, wanted) == 1


@EVERY
def test_oldest_slot_keeps_even_a_short_common_prefix(name: str) -> None:
    allocator = allocator_of(name, 24, seqs=1, longest=24)
    run(allocator, request_of([1, 2, 3]))
    assert allocator.get_computed_tokens(request_of([1, *range(50, 70)])) == 1  # a 21st


@EVERY
def test_reused_slot_is_cut_to_the_common_prefix_and_its_cells_stay_in_place(name: str) -> None:
    allocator = allocator_of(name, 32)
    first = request_of([1, 2, 3, 4, 5, 6])
    admit(allocator, first)
    cells = allocator.slots_held(first)[:6].tolist()
    allocator.free(first)
    assert sorted(allocator.cached_slots().tolist()) == cells
    again = request_of([1, 2, 3, 9])
    assert admit(allocator, again) == Grant(num_cached_tokens=3)
    assert allocator.slots_held(again)[:3].tolist() == cells[:3]
    assert allocator.cached_slots().size == 0  # the rest of the old prompt is gone
    assert allocator.get_computed_tokens(first) == 0


@EVERY
def test_last_token_is_always_computed(name: str) -> None:
    allocator = allocator_of(name, 32)
    run(allocator, request_of([1, 2, 3]))
    assert allocator.get_computed_tokens(request_of([1, 2, 3])) == 2
    assert allocator.get_computed_tokens(request_of([1, 2])) == 1
    run(allocator, request_of([1, 2, 3], "again"))
    assert [1, 2, 3] in remembered(allocator)


@EVERY
def test_outputs_stay_as_well_but_nothing_that_was_not_computed(name: str) -> None:
    allocator = allocator_of(name, 32)
    request = request_of([1, 2, 3])
    admit(allocator, request)
    request.token_ids, request.num_tokens = np.array([1, 2, 3, 4, 5], np.int32), 5
    grow(allocator, request, 1)
    assert allocator.allocate_slots(request, 1) is not None  # granted, and the step never ran
    request.num_computed_tokens += 1
    allocator.free(request)
    assert [1, 2, 3, 4] in remembered(allocator)
    assert allocator.cached_slots().size == 4


@EVERY
def test_tokens_written_anew_count_only_once_they_are_computed(name: str) -> None:
    allocator = allocator_of(name, 32)
    request = request_of([1, 2, 3, 4])
    admit(allocator, request)
    request.num_computed_tokens = 2  # the last two are to be computed again
    assert allocator.allocate_slots(request, 2) is not None
    request.num_computed_tokens = 4
    allocator.free(request)
    assert [1, 2] in remembered(allocator)


@EVERY
def test_what_a_slot_remembers_is_its_own_copy(name: str) -> None:
    allocator = allocator_of(name, 32)
    request = request_of([1, 2, 3])
    run(allocator, request)
    request.token_ids[:] = 7
    assert [1, 2, 3] in remembered(allocator)


@EVERY
def test_prompts_are_not_shared_between_slots_at_work(name: str) -> None:
    allocator = allocator_of(name, 32)
    first, second = request_of([1, 2, 3, 4], "first"), request_of([1, 2, 3, 4], "second")
    admit(allocator, first)
    assert admit(allocator, second) == Grant()
    assert not set(allocator.slots_held(first)) & set(allocator.slots_held(second))


@EVERY
@pytest.mark.parametrize(
    ("caching", "fields", "hit"),
    [(True, {}, 2), (False, {}, 0), (True, {"namespace": "adapter"}, 0), (True, {"token_ids": np.empty(0, np.int32)}, 0)],
)
def test_only_the_same_namespace_shares_and_only_with_caching(name: str, caching: bool, fields: dict[str, Any], hit: int) -> None:
    allocator = allocator_of(name, 32, caching=caching)
    first, second = request_of([1, 2, 3]), request_of([1, 2, 3])
    for field, value in fields.items():
        setattr(first, field, value)
    run(allocator, first)
    assert allocator.get_computed_tokens(second) == hit
    assert allocator.cached_slots().size == (0 if not caching or not first.token_ids.size else 3)
    assert allocator.free_slots == allocator.usable_slots
