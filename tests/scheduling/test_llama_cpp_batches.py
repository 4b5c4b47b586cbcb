"""llama.cpp's server: what is in a batch, and what happens when cells run out."""

import pytest
from llama_cpp_scheduling import chat, finish, server
from steps import add, advance, entries

from pagedkv.errors import ConfigError
from pagedkv.scheduling.step import Blocker


def test_a_batch_has_a_token_of_each_that_generates_then_prompts_up_to_n_batch() -> None:
    """n_batch bounds a batch; a prompt that does not get in whole goes on in the next one. Slots are in order of their numbers.

    The last of the slots that nobody has used is given first, so request 0 runs in slot 2.
    """
    one = server(cells=100, slots=3, n_batch=8)
    add(one, (5, 3), (9, 2), (4, 2))
    assert [advance(one) for _ in range(4)] == [
        [(0, 5), (1, 3)],
        [(0, 1), (1, 6), (2, 1)],
        [(1, 1), (0, 1), (2, 3)],
        [(2, 1)],
    ]


def test_without_continuous_batching_prompts_wait_for_an_empty_batch() -> None:
    one = server(cells=100, cont_batching=False)
    add(one, (5, 2))
    advance(one)
    add(one, (4, 1))
    assert finish(one) == [[(0, 1)], [(1, 4)]]


def test_requests_wait_only_for_a_free_slot_and_in_order() -> None:
    """ "Requests wait only for a free *slot*"; "waiting order on failure: slot queue"."""
    one = server(cells=1000, slots=2)
    add(one, (4, 3), (4, 1), (4, 1), (400, 1), (4, 1))
    step = one.schedule()
    assert (entries(step), step.blocker, one.allocator.free_slots) == ([(0, 4), (1, 4)], Blocker.MAX_NUM_SEQS, 992)
    one.complete()
    assert finish(one) == [[(0, 1), (2, 4)], [(0, 1), (3, 400)], [(4, 4)]]


# --- exhaustion


def test_when_cells_run_out_all_processing_slots_end_with_an_error() -> None:
    """ "all processing slots are errored and cleared (no preemption, no queueing by memory)"."""
    one = server(cells=16, slots=3)
    add(one, (7, 9), (7, 9))
    assert advance(one) == [(0, 7), (1, 7)]
    assert advance(one) == [(1, 1), (0, 1)]  # 16 cells are in use
    add(one, (3, 1))  # it gets the third slot, and is errored with the others
    add(one, (2, 1))  # it waits for a slot, and is spared
    step = one.schedule()
    assert (step.num_entries, step.num_preempted, step.blocker) == (0, 0, Blocker.KV_MEMORY)
    assert sorted(one.failed.tolist()) == [0, 1, 2]
    assert (one.num_running, one.waiting().tolist(), one.allocator.free_slots) == (0, [3], 16)
    one.complete()
    assert (one.sampled.size, one.finished.size) == (0, 0)
    one.check_integrity()
    assert finish(one) == [[(3, 2)]]
    assert one.failed.size == 0


def test_an_error_forgets_what_the_slots_computed() -> None:
    """ "errored and cleared": a retry finds nothing."""
    one = server(cells=16, slots=2)
    chat(one, 1, 7, 9)
    chat(one, 2, 7, 9)
    while not one.failed.size:
        advance(one)
    chat(one, 1, 7, 9)
    assert advance(one) == [(2, 7)]
    assert one.requests.arrays["num_cached_tokens"][2] == 0


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    """ "halve n_batch and retry down to 1": what fits is computed, a step each, then the rest is tried again."""
    one = server(cells=16, slots=2)
    add(one, (3, 9))
    advance(one)
    add(one, (14, 1))
    step = one.schedule()  # 1 + 14 tokens, 13 cells are empty: 2048 ... 16 do not fit, 8 do
    assert (entries(step), step.blocker) == ([(0, 1), (1, 7)], Blocker.NONE)
    one.complete()
    assert one.sampled.tolist() == [0]
    assert advance(one) == [(1, 4)]  # of the 7 that are left 5 would fit: halving finds 4
    assert advance(one) == [(1, 1)]
    assert one.sampled.size == 0  # request 0, which has a token to compute, is no part of this batch
    add(one, (1, 1))
    one.schedule()
    assert (sorted(one.failed.tolist()), one.waiting().tolist()) == ([0, 1], [2])


def test_cells_that_a_prompt_finds_cannot_be_purged_for_it() -> None:
    """A part of a batch fits only beside what its slots keep."""
    one = server(cells=16, slots=2)
    chat(one, 1, 8, 1)
    finish(one)
    add(one, (5, 9))
    advance(one)
    chat(one, 1, 13, 1)
    assert advance(one) == [(1, 1), (2, 1)]  # 11 cells are not in use; 8 are kept, so of 1 + 5 tokens 2 fit, and 4 do not


def test_who_finds_more_than_the_batch_was_made_for_computes_no_more_than_it_knows() -> None:
    """Request 1 ends within a batch that was cut, and leaves its slot to request 2, which is cut again."""
    one = server(cells=20, slots=3)
    add(one, (6, 2))
    advance(one)
    chat(one, 1, 7, 1)
    chat(one, 1, 14, 3)
    assert finish(one) == [[(0, 1), (1, 7)], [(2, 7)], [(2, 1)], [(2, 1)]]  # 14 tokens were due, 7 are found


def test_what_is_found_takes_no_place_in_a_batch() -> None:
    one = server(cells=100, n_batch=8)
    chat(one, 1, 12, 1)
    finish(one)
    chat(one, 1, 14, 1)
    add(one, (5, 1))
    assert advance(one) == [(1, 2), (2, 5)]


def test_a_slot_that_ends_within_a_batch_gives_its_cells_to_the_rest_of_it() -> None:
    """Halving can save a batch: request 0 ends in its first part, and then its slot is idle and can be purged."""
    one = server(cells=16, slots=2)
    add(one, (8, 2))
    advance(one)
    add(one, (9, 1))
    assert finish(one) == [[(0, 1), (1, 7)], [(1, 2)]]


def test_idle_slots_are_purged_one_by_one_before_anything_is_halved() -> None:
    """ "if unified, purge one idle slot's cached prompt (first found, no LRU), else halve n_batch"."""
    one = server(cells=30, slots=3)
    for stream in (1, 2, 3):
        chat(one, stream, 6, 1)
    assert len(finish(one)) == 1
    remembered = one.cached_slots
    assert (remembered, one._memory.slots.num_kept.tolist()) == (18, [6, 6, 6])
    chat(one, 2, 20, 1)
    assert advance(one) == [(3, 14)]  # 12 empty cells: the first idle slot goes, and that is enough
    assert one._memory.slots.num_kept.tolist() == [0, 20, 6]


def test_split_slots_never_run_out() -> None:
    """ "cannot occur (slot-bound)": what fits into a slot runs to its end, what does not is refused."""
    one = server(cells=32, slots=2, allocator="llama-cpp-split")
    assert add(one, (7, 9), (7, 9), (9, 9)) == [0, 1, None]
    assert len(finish(one)) == 9


def test_bad_settings_are_refused() -> None:
    for wrong in ({"n_batch": 0}, {"n_ubatch": 0}, {"max_queue": -1}, {"n_batch": 1}):
        with pytest.raises(ConfigError):
            server(cells=8, slots=2, **wrong)
    with pytest.raises(ConfigError):
        server(cells=8).add(prompt_tokens=1, output_tokens=1, priority=1)
