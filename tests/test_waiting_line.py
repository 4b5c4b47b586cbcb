"""The queue of which anybody may leave, against a list that is sorted anew; and the set that each step empties."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.scheduling.filled_blocks import FilledBlocks, add_filled
from pagedkv.scheduling.requests import REQUEST
from pagedkv.scheduling.waiting import NUM_WAITING, WAITING_HEAD, SchedulerArrays, drop_head
from pagedkv.scheduling.waiting_line import join_line, leave_line, waiting_at


@given(
    priorities=st.lists(st.integers(0, 3), min_size=1, max_size=15),
    moves=st.lists(st.tuples(st.sampled_from(["join", "join", "leave", "drop"]), st.integers(0, 14)), max_size=60),
    head=st.integers(0, 15),
)
def test_the_line_is_a_sorted_list(priorities: list[int], moves: list[tuple[str, int]], head: int) -> None:
    requests, state = np.zeros(len(priorities), REQUEST), SchedulerArrays.empty(1, waiting_capacity=16)
    requests["priority"] = priorities
    state.counts[WAITING_HEAD] = head  # wherever the ring begins
    line: list[int] = []
    for move, which in moves:
        request = which % len(priorities)
        if move == "join" and request not in line:
            join_line(state, requests, request)
            line.append(request)
        elif move == "leave" and request in line:
            leave_line(state, requests, request)
            line.remove(request)
        elif move == "drop" and line:
            assert drop_head(state, requests, False) == line.pop(0)
        line.sort(key=lambda each: (priorities[each], each))
        assert [waiting_at(state, place) for place in range(state.counts[NUM_WAITING])] == line


@given(steps=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8), max_size=6))
def test_keys_are_told_apart_and_forgotten_with_the_step(steps: list[list[tuple[int, int]]]) -> None:
    filled = FilledBlocks.empty(8)
    for keys in steps:
        filled.step[0] += 1
        seen: set[tuple[int, int]] = set()
        for word_a, word_b in keys:
            assert add_filled(filled, np.uint64(word_a), np.uint64(word_b)) == ((word_a, word_b) in seen)
            seen.add((word_a, word_b))
