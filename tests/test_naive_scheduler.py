"""The scheduler of naive serving, one rule at a time, in the words of ENGINES.md, section 10."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.scheduling.naive_scheduler import NaiveScheduler, NaiveSettings
from pagedkv.scheduling.naive_step import NUM_COLUMNS
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.sims.recording import FREE, INTERNAL, NUM_GAUGES, RESERVED, STATE, TOKENS, set_gauges
from pagedkv.step_allocation import step_allocator

DYNAMIC, STATIC = "contiguous-growing", "contiguous-max"


def naive(*, slots: int = 1000, seqs: int = 4, longest: int = 100, cache: str = DYNAMIC, **more: Any) -> NaiveScheduler:
    pool = KVPoolSettings(
        num_blocks=slots, block_size=1, max_num_seqs=seqs, max_model_len=longest, contiguous_heap="first-fit", **more
    )
    return NaiveScheduler(NaiveSettings(max_num_seqs=seqs, max_model_len=longest), step_allocator(cache, pool))


def add(to: NaiveScheduler, *lengths: tuple[int, int]) -> list[int | None]:
    return [to.add(prompt_tokens=prompt, output_tokens=output) for prompt, output in lengths]


class Seen(NamedTuple):
    """A step."""

    entries: list[tuple[int, int, int]]
    """(request, true tokens computed, true tokens with slots)."""
    passes: list[tuple[int, int]]
    """(tokens computed, slots needed) as the machine sees them."""
    held: list[int]
    """Slots of the entries' rows."""
    sampled: list[int]
    finished: list[int]


def advance(one: NaiveScheduler) -> Seen:
    step = one.schedule()
    one.check_integrity()
    batch = step.batch[: step.num_entries].copy()
    (padded,) = one.forward_passes()
    held = one.allocator.units_held[batch["row"]].tolist()
    one.complete()
    one.check_integrity()
    names = ("request", "num_scheduled_tokens", "num_slots_needed")
    return Seen(
        list(zip(*(batch[name].tolist() for name in names), strict=True)),
        list(zip(padded["num_scheduled_tokens"].tolist(), padded["num_slots_needed"].tolist(), strict=True)),
        held,
        one.sampled.tolist(),
        one.finished.tolist(),
    )


def serve(one: NaiveScheduler) -> Iterator[Seen]:
    """Yield the steps until nobody is there; nobody may fail."""
    while one.num_running or one.num_waiting:
        seen = advance(one)
        assert seen.entries
        yield seen


def gauges(one: NaiveScheduler, step: Step) -> dict[str, int]:
    """What the recorder would count."""
    counted, memory = np.zeros(NUM_GAUGES, np.int64), one.allocator
    set_gauges(
        counted,
        one.arrays,
        one.requests.arrays,
        step.batch,
        step.num_entries,
        memory.units_held,
        memory.unit_slots,
        memory.state_units,
        memory.free_slots,
        0,
        0,
    )
    kinds = {"tokens": TOKENS, "reserved": RESERVED, "internal": INTERNAL, "state": STATE, "free": FREE}
    return {name: int(counted[kind]) for name, kind in kinds.items()}


# --- one at a time


def test_one_request_at_a_time_in_order_of_arrival() -> None:
    """By default: "one request at a time"; its prompt is computed whole, then a token per step."""
    one = naive(seqs=NaiveSettings(max_model_len=100).max_num_seqs)
    add(one, (5, 2), (60, 3), (2, 1))
    assert [step.entries for step in serve(one)] == [
        [(0, 5, 5)],
        [(0, 1, 6)],
        [(1, 60, 60)],
        [(1, 1, 61)],
        [(1, 1, 62)],
        [(2, 2, 2)],
    ]


def test_alone_nothing_is_padded_and_every_token_comes_as_it_is_computed() -> None:
    one = naive(seqs=1)
    add(one, (5, 3))
    steps = list(serve(one))
    assert [step.passes for step in steps] == [[(5, 5)], [(1, 6)], [(1, 7)]]
    assert [step.held for step in steps] == [[5], [6], [7]]
    assert [(step.sampled, step.finished) for step in steps] == [([0], []), ([0], []), ([0], [0])]


# --- static batches


def test_a_batch_is_the_head_of_the_queue_and_nobody_joins_it() -> None:
    """ "a static batch ... held until its longest output ends": who comes later waits for its end."""
    one = naive(seqs=2)
    add(one, (3, 1), (3, 4), (3, 1))
    first = one.schedule()
    assert first.batch["request"][: first.num_entries].tolist() == [0, 1]
    assert (first.num_running_before, first.blocker) == (0, Blocker.MAX_NUM_SEQS)
    one.complete()
    for _ in range(3):
        step = one.schedule()
        assert step.batch["request"][: step.num_entries].tolist() == [0, 1]
        assert (step.num_running_before, step.blocker, one.num_waiting) == (2, Blocker.MAX_NUM_SEQS, 1)
        one.complete()
    assert [step.entries for step in serve(one)] == [[(2, 3, 3)]]


def test_a_batch_does_not_wait_to_be_full() -> None:
    one = naive(seqs=4)
    add(one, (3, 2))
    assert advance(one).entries == [(0, 3, 3)]
    add(one, (3, 1))
    assert [step.entries for step in serve(one)] == [[(0, 1, 4)], [(1, 3, 3)]]


def test_prompts_are_padded_to_the_longest_and_computed_whole() -> None:
    """ "a static batch padded to its longest prompt": every row computes, and in a dynamic cache holds, as much as the longest."""
    one = naive()
    add(one, (50, 3), (2, 3), (30, 3))
    step = advance(one)
    assert step.entries == [(0, 50, 50), (1, 2, 2), (2, 30, 30)]
    assert (step.passes, step.held) == ([(50, 50)] * 3, [50] * 3)
    step = advance(one)
    assert step.entries == [(0, 1, 51), (1, 1, 3), (2, 1, 31)]
    assert (step.passes, step.held) == ([(1, 51)] * 3, [51] * 3)


def test_a_row_whose_output_is_done_goes_on_as_padding() -> None:
    one = naive()
    add(one, (4, 1), (4, 3))
    advance(one)
    step = advance(one)
    assert step.entries == [(0, 0, 4), (1, 1, 5)]
    assert (step.passes, step.held) == ([(1, 5)] * 2, [5] * 2)


def test_the_last_token_of_each_comes_when_the_batch_returns() -> None:
    """Earlier tokens are streamed as they are computed; a request is answered when `generate` returns."""
    one = naive()
    add(one, (4, 1), (9, 2), (2, 4))
    steps = list(serve(one))
    assert [(step.sampled, step.finished) for step in steps] == [
        ([1, 2], []),
        ([2], []),
        ([2], []),
        ([0, 1, 2], [0, 1, 2]),
    ]


def test_a_static_cache_reserves_batch_times_max_length_until_the_batch_returns() -> None:
    """ "the static cache reserves batch × max length"."""
    one = naive(cache=STATIC, slots=450)
    add(one, (4, 1), (9, 3), (2, 2))
    steps = 0
    while one.num_running or one.num_waiting:
        one.schedule()
        assert one.allocator.free_slots == 450 - 300
        one.complete()
        steps += 1
    assert (steps, one.allocator.free_slots) == (3, 450)


def test_padding_is_counted_as_waste_and_not_as_tokens() -> None:
    one = naive(slots=100)
    add(one, (20, 2), (4, 3))
    assert gauges(one, one.schedule()) == {"tokens": 24, "reserved": 2, "internal": 14, "state": 0, "free": 60}  # 4 + 2 of 20 slots
    one.complete()
    one.schedule()
    one.complete()
    assert gauges(one, one.schedule()) == {"tokens": 27, "reserved": 0, "internal": 17, "state": 0, "free": 56}  # 21 + 6 of 44
    static = naive(cache=STATIC, slots=200)
    add(static, (20, 2), (4, 3))
    assert gauges(static, static.schedule()) == {"tokens": 24, "reserved": 3, "internal": 173, "state": 0, "free": 0}


def test_a_batch_is_cut_where_padding_would_make_it_longer_than_max_model_len() -> None:
    """Each request fits: 90 + 10 and 10 + 90 of 100. Padded together they would need 180."""
    one = naive(longest=100)
    add(one, (90, 10), (80, 5), (10, 90), (10, 5))
    assert advance(one).entries == [(0, 90, 90), (1, 80, 80)]
    later = [step.entries for step in serve(one)]
    assert later[9] == [(2, 10, 10), (3, 10, 10)]


def test_a_batch_is_cut_where_its_padded_prompts_are_more_than_a_step_computes() -> None:
    pool = KVPoolSettings(num_blocks=1000, block_size=1, max_num_seqs=4, max_model_len=100)
    settings = NaiveSettings(max_num_seqs=4, max_model_len=100, max_num_batched_tokens=60)
    one = NaiveScheduler(settings, step_allocator(DYNAMIC, pool))
    assert add(one, (20, 1), (30, 1), (25, 1), (61, 1), (60, 1)) == [0, 1, 2, None, 3]
    assert [[request for request, *_ in step.entries] for step in serve(one)] == [[0, 1], [2], [3]]


# --- exhaustion: "No sharing, no preemption: what does not fit fails."


@pytest.mark.parametrize("cache", [DYNAMIC, STATIC])
def test_a_batch_that_does_not_fit_fails_as_a_whole_and_the_queue_goes_on(cache: str) -> None:
    one = naive(cache=cache, slots=120, seqs=2, longest=100)
    add(one, (70, 1), (2, 1), (3, 1))
    step = one.schedule()
    assert (step.num_entries, step.num_running_before, step.num_preempted) == (0, 0, 0)
    assert (one.failed.tolist(), one.num_running, one.allocator.free_slots) == ([0, 1], 0, 120)
    one.check_integrity()
    one.complete()
    assert (one.sampled.size, one.finished.size) == (0, 0)
    assert [step.entries for step in serve(one)] == [[(2, 3, 3)]]


def test_a_batch_that_grows_out_of_memory_fails_in_the_middle() -> None:
    one = naive(slots=25, seqs=2)
    add(one, (10, 9), (10, 9), (10, 9))
    for rows in (10, 11, 12):
        assert advance(one).held == [rows, rows]
    step = one.schedule()  # the first row gets the last slot, the second none
    assert (step.num_entries, step.num_running_before, step.blocker) == (0, 0, Blocker.KV_MEMORY)
    assert (one.failed.tolist(), one.preempted.size, one.allocator.free_slots) == ([0, 1], 0, 25)
    assert next(one.forward_passes()).size == 0
    one.check_integrity()
    assert sum(len(step.sampled) for step in serve(one)) == 9


def test_who_could_never_run_alone_is_refused() -> None:
    one = naive(slots=50, longest=100)
    assert add(one, (45, 6), (45, 7), (90, 11)) == [0, None, None]
    assert len(list(serve(one))) == 6
    static = naive(slots=99, longest=100, cache=STATIC)
    assert add(static, (1, 1)) == [None]  # it would reserve 100


# --- what cannot be


def test_values_that_cannot_work_are_named() -> None:
    with pytest.raises(ConfigError, match="max-num-seqs is 0: needs 1 or more"):
        NaiveSettings(max_num_seqs=0, max_model_len=10)
    with pytest.raises(ConfigError, match="max-num-batched-tokens is 0: needs 1 or more"):
        NaiveSettings(max_model_len=10, max_num_batched_tokens=0)
    with pytest.raises(ConfigError, match="max-model-len is 101, the allocator was built for 100"):
        NaiveScheduler(NaiveSettings(max_model_len=101), naive().allocator)
    with pytest.raises(ConfigError, match="priority 1: batches are made in order of arrival"):
        naive().add(prompt_tokens=1, output_tokens=1, priority=1)


def test_a_broken_state_is_noticed() -> None:
    one = naive()
    add(one, (4, 3))
    advance(one)
    one._columns[NUM_COLUMNS] += 1
    with pytest.raises(IntegrityError, match="slots for 5 columns"):
        one.check_integrity()


# --- the oracle


class Fate(NamedTuple):
    """What becomes of one request, from rules alone."""

    tokens_at: tuple[int, ...]
    """Steps in which its tokens came, the first step of the run being 0."""
    failed: bool


class Oracle(NamedTuple):
    fates: list[Fate]
    padding: int
    """Positions computed for nobody."""
    held: list[list[int]]
    """By step: the slots of the rows."""


def expected(requests: list[tuple[int, int]], *, slots: int, seqs: int, longest: int, cache: str) -> Oracle:
    """Lay every batch out as a table of rows and columns, and read off what happens."""
    fates: list[Fate] = []
    held: list[list[int]] = []
    padding, left = 0, list(requests)
    while left:
        rows = 1
        while rows < min(seqs, len(left)) and max(p for p, _ in left[: rows + 1]) + max(o for _, o in left[: rows + 1]) <= longest:
            rows += 1
        batch, left = left[:rows], left[rows:]
        first_columns, num_steps = max(p for p, _ in batch), max(o for _, o in batch)
        most_columns = (slots // longest >= rows) * longest if cache == STATIC else slots // rows
        steps = max(min(num_steps, most_columns - first_columns + 1), 0)  # step k (from 0) needs first_columns + k columns
        began = len(held)
        for prompt, output in batch:
            own = [began + k for k in range(min(output - 1, steps))]
            fates.append(Fate((*own, began + steps - 1) if steps == num_steps else (*own,), steps < num_steps))
            padding += max(first_columns + steps - 1, 0) * (steps > 0) - (prompt + min(output, steps) - 1) * (steps > 0)
        held += [[longest if cache == STATIC else first_columns + k] * rows for k in range(steps)]
    return Oracle(fates, padding, held)


LENGTHS = st.tuples(st.integers(1, 15), st.integers(1, 12)).filter(lambda lengths: sum(lengths) <= 20)


@given(
    requests=st.lists(LENGTHS, max_size=12),
    cache=st.sampled_from([DYNAMIC, STATIC]),
    seqs=st.integers(1, 5),
    slots=st.integers(20, 70),
)
def test_every_token_comes_when_the_table_says(requests: list[tuple[int, int]], cache: str, seqs: int, slots: int) -> None:
    longest = 20
    one = naive(slots=slots, seqs=seqs, longest=longest, cache=cache)
    assert add(one, *requests) == list(range(len(requests)))
    came: list[list[int]] = [[] for _ in requests]
    failed: list[int] = []
    held: list[list[int]] = []
    padding = 0
    while one.num_running or one.num_waiting:
        seen = advance(one)
        assert not one.preempted.size
        failed += one.failed.tolist()
        if one.failed.size:
            assert not seen.entries
            assert one.allocator.free_slots == slots
            continue
        for request in seen.sampled:
            came[request].append(len(held))
        assert set(seen.finished) <= set(seen.sampled)
        held.append(seen.held)
        padding += sum(tokens for tokens, _ in seen.passes) - sum(tokens for _, tokens, _ in seen.entries)
        assert all(own <= columns for (*_, own), (_, columns) in zip(seen.entries, seen.passes, strict=True))
    oracle = expected(requests, slots=slots, seqs=seqs, longest=longest, cache=cache)
    assert [Fate(tuple(steps), request in failed) for request, steps in enumerate(came)] == oracle.fates
    assert held == oracle.held
    assert padding == oracle.padding
    assert one.allocator.free_slots == slots


@given(
    requests=st.lists(LENGTHS, min_size=1, max_size=12),
    cache=st.sampled_from([DYNAMIC, STATIC]),
    seqs=st.integers(1, 4),
    state=st.integers(0, 6),
    at_once=st.integers(1, 4),
)
def test_every_slot_is_counted_at_every_step(
    requests: list[tuple[int, int]], cache: str, seqs: int, state: int, at_once: int
) -> None:
    """Requests come while others run; models with states hold those besides. Nothing is counted twice, or below zero."""
    one = naive(slots=120, seqs=seqs, longest=20, cache=cache, state_slots=state)
    arrivals, answered = list(requests), 0
    while arrivals or one.num_running or one.num_waiting:
        assert None not in add(one, *[arrivals.pop(0) for _ in range(min(at_once, len(arrivals)))])
        step = one.schedule()
        one.check_integrity()
        counted = gauges(one, step)
        assert min(counted.values()) >= 0
        assert sum(counted.values()) == 120
        own = step.batch["num_slots_needed"][: step.num_entries].sum()
        assert counted["tokens"] == own <= one.num_columns * one.num_running
        one.complete()
        answered += one.finished.size + one.failed.size
    assert answered == len(requests)
    assert one.allocator.free_slots == 120
