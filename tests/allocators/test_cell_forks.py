"""Forks over llama.cpp's cells, drafts that are rejected, and who comes again after a preemption."""

import numpy as np
import pytest
from cell_requests import EVERY, SPLIT, UNIFIED, admit, allocator_of, forked, grow, remembered, request_of, run, slot_of

from pagedkv.allocation import Grant


def test_unified_fork_shares_cells_and_both_write_on_into_their_own() -> None:
    allocator = allocator_of(UNIFIED, 16, seqs=3)
    parent, child = forked(allocator)
    assert allocator.slots_held(child).tolist() == allocator.slots_held(parent).tolist() == [0, 1, 2, 3]
    assert allocator.free_slots == 12
    assert grow(allocator, parent, 1) == grow(allocator, child, 1) == Grant()
    assert allocator.slots_held(parent).tolist() == [0, 1, 2, 3, 4]
    assert allocator.slots_held(child).tolist() == [0, 1, 2, 3, 5]
    allocator.free(parent)
    assert allocator.free_slots == 11
    assert allocator.cached_slots().size == 0  # the child still holds all that the parent's token_ids tell of
    allocator.free(child)
    assert allocator.cached_slots().tolist() == [0, 1, 2, 3]


def test_purging_an_idle_slot_gives_no_room_while_a_fork_runs_on_its_cells() -> None:
    allocator = allocator_of(UNIFIED, 8, seqs=3)
    parent, child = forked(allocator)
    allocator.free(parent)
    other = request_of([9] * 5)
    assert grow(allocator, other, 5) is None
    assert grow(allocator, other, 4) is not None
    assert allocator.slots_held(child).tolist() == [0, 1, 2, 3]


def test_common_prefix_that_a_fork_holds_takes_no_room() -> None:
    allocator = allocator_of(UNIFIED, 8, seqs=3)
    run(allocator, request_of([9] * 4))
    parent, _ = forked(allocator)
    allocator.free(parent)
    assert admit(allocator, request_of([1, 2, 3, 4, 5, 5, 5, 5])) == Grant(num_cached_tokens=4)  # 4 cells after a purge
    assert remembered(allocator) == [[], [], []]


def test_giving_back_cells_that_a_fork_holds_makes_no_room() -> None:
    allocator = allocator_of(UNIFIED, 8, seqs=3)
    _, child = forked(allocator)
    child.num_computed_tokens = 2
    assert grow(allocator, child, 5) is None
    assert grow(allocator, child, 4) is not None


def test_unified_fork_that_recomputes_leaves_the_shared_cell_alone() -> None:
    allocator = allocator_of(UNIFIED, 16, seqs=3)
    parent, child = forked(allocator)
    child.num_computed_tokens = 3
    assert grow(allocator, child, 1) is not None
    assert allocator.slots_held(child).tolist() == [0, 1, 2, 4]
    assert allocator.slots_held(parent).tolist() == [0, 1, 2, 3]


def test_split_fork_reads_in_place_and_is_copied_when_it_writes() -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    parent, child = forked(allocator)
    assert (slot_of(allocator, parent), slot_of(allocator, child)) == (2, 0)
    assert allocator.slots_held(child)[:4].tolist() == allocator.slots_held(parent)[:4].tolist() == [16, 17, 18, 19]
    assert sorted({*allocator.slots_held(child).tolist()} - {16, 17, 18, 19}) == list(range(8))
    assert allocator.free_slots == 8
    grant = grow(allocator, child, 1)
    assert grant is not None
    assert grant.copies.tolist() == [[16, 0], [17, 1], [18, 2], [19, 3]]
    assert allocator.slots_held(child).tolist() == list(range(8))
    again = grow(allocator, child, 1)
    assert again is not None
    assert again.copies.size == 0


def test_split_fork_of_a_fork_copies_from_where_the_tokens_are() -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    _, child = forked(allocator)
    grandchild = request_of([1, 2, 3, 4], "grandchild")
    allocator.fork(child, grandchild)
    grandchild.num_computed_tokens = 4
    grant = grow(allocator, grandchild, 1)
    assert grant is not None
    assert grant.copies.tolist() == [[16, 8], [17, 9], [18, 10], [19, 11]]


def test_split_parent_that_rewrites_shared_tokens_has_its_forks_copied_first() -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    parent, child = forked(allocator)
    parent.num_computed_tokens = 3
    grant = grow(allocator, parent, 1)
    assert grant is not None
    assert grant.copies.tolist() == [[16, 0], [17, 1], [18, 2], [19, 3]]
    assert allocator.slots_held(child)[:4].tolist() == [0, 1, 2, 3]


def test_split_fork_inherits_the_stream_of_a_parent_that_ends_before_the_copy() -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    parent, child = forked(allocator)
    allocator.free(parent)
    allocator.check_integrity()
    assert allocator.slots_held(child).tolist() == list(range(16, 24))
    assert allocator.free_slots == 16
    assert allocator.cached_slots().size == 0
    grant = grow(allocator, child, 1)
    assert grant is not None
    assert grant.copies.size == 0


def test_split_fork_with_the_inherited_stream_writes_only_after_longer_forks_are_copied() -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    parent, child = forked(allocator)  # slots 2 and 0
    parent.token_ids, parent.num_tokens = np.array([1, 2, 3, 4, 5, 6], np.int32), 6
    grow(allocator, parent, 2)
    other = request_of(range(6), "other")
    allocator.fork(parent, other)  # slot 1, reads 6 tokens
    other.num_computed_tokens = 6
    allocator.free(parent)
    grant = grow(allocator, child, 1)  # would write into cell 4 of the stream
    assert grant is not None
    assert grant.copies.tolist() == [[16 + i, 8 + i] for i in range(6)]
    assert allocator.slots_held(other).tolist() == list(range(8, 16))


def test_split_fork_that_ends_before_the_copy_leaves_nothing() -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    _, child = forked(allocator)
    allocator.note_computed(child)
    allocator.free(child)
    allocator.check_integrity()
    assert allocator.cached_slots().size == 0


@pytest.mark.parametrize("name", [UNIFIED, SPLIT])
def test_fork_takes_the_first_idle_slot_and_what_it_remembered_is_gone(name: str) -> None:
    allocator = allocator_of(name, 24, seqs=2, longest=12)
    run(allocator, request_of([7, 7], "in slot 1"))
    run(allocator, request_of([8, 8], "in slot 0"))
    _, child = forked(allocator)
    assert slot_of(allocator, child) == 0
    assert allocator.cached_slots().size == 0


@EVERY
def test_rejected_drafts_give_their_cells_back_with_the_next_step(name: str) -> None:
    allocator = allocator_of(name, 32)
    request = request_of([1, 2, 3])
    admit(allocator, request)
    grow(allocator, request, 4)
    request.num_computed_tokens = 4
    assert grow(allocator, request, 2) is not None
    assert allocator.slots_held(request)[:6].tolist() == sorted(allocator.slots_held(request)[:6])
    if name == UNIFIED:
        assert allocator.num_slots_held(request) == 6
    allocator.free(request)
    assert [1, 2, 3] in remembered(allocator)


def test_cells_of_rejected_drafts_count_as_room_for_the_step_that_gives_them_back() -> None:
    allocator = allocator_of(UNIFIED, 6)
    request = request_of([1, 2, 3])
    admit(allocator, request)
    grow(allocator, request, 3)
    request.num_computed_tokens = 3
    assert grow(allocator, request, 4) is None
    assert grow(allocator, request, 3) is not None


@EVERY
def test_preempted_request_finds_what_it_computed(name: str) -> None:
    allocator = allocator_of(name, 32)
    request = request_of([1, 2, 3, 4])
    admit(allocator, request, 3)
    allocator.preempt(request)
    assert request.num_computed_tokens == 0
    assert admit(allocator, request) == Grant(num_cached_tokens=3)
