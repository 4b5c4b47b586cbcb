"""Intervals that grow: where they go, what is copied and in which order, and that nothing is lost on the way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.contiguous_growing import ContiguousGrowingAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.growing_heap import FREE_SLOTS, USED, GrowingHeap
from pagedkv.kv_request import KVRequest


def allocator(num_blocks: int = 10, block_size: int = 1, max_model_len: int = 64, **settings: Any) -> ContiguousGrowingAllocator:
    pool = KVPoolSettings(num_blocks=num_blocks, block_size=block_size, max_model_len=max_model_len, **settings)
    return ContiguousGrowingAllocator(pool)


def grow(growing: ContiguousGrowingAllocator, request: KVRequest, tokens: int, *, busy: bool = False) -> list[list[int]] | None:
    """Let `request` know and compute `tokens` more; return the copies, or None."""
    known = request.num_tokens
    request.num_tokens = max(known, request.num_computed_tokens + tokens)
    grant = growing.allocate_slots(request, tokens, has_scheduled_reqs=busy)
    growing.check_integrity()
    if grant is None:
        request.num_tokens = known
        return None
    request.num_computed_tokens += tokens
    copies: list[list[int]] = grant.copies.tolist()
    return copies


def admitted(growing: ContiguousGrowingAllocator, *tokens: int) -> list[KVRequest]:
    requests = [KVRequest(request_id=i, num_tokens=n) for i, n in enumerate(tokens)]
    for request, n in zip(requests, tokens, strict=True):
        assert grow(growing, request, n) == []
    return requests


def state(growing: ContiguousGrowingAllocator) -> Any:
    held = {r.request_id: (r.num_computed_tokens, growing.slots_held(r).tolist()) for r in growing.live_requests()}
    return held, growing.heap.intervals(), growing.heap.free_slots, growing.moved_slots


def test_it_grows_in_place_if_the_slots_behind_it_are_free() -> None:
    growing = allocator()
    first, second = admitted(growing, 2, 2)
    assert grow(growing, second, 3) == []
    assert growing.slots_held(second).tolist() == [2, 3, 4, 5, 6]
    growing.free(second)
    assert grow(growing, first, 8) == []
    assert growing.slots_held(first).tolist() == list(range(10))
    assert growing.moved_slots == 0


def test_with_a_neighbour_in_the_way_it_moves_to_the_lowest_place_that_is_large_enough() -> None:
    growing = allocator()
    first, second, third, _ = admitted(growing, 1, 3, 2, 1)
    growing.free(second)  # free: 1 to 3, and 7 to 9
    assert grow(growing, third, 1) == [[4, 1], [5, 2]]
    assert growing.slots_held(third).tolist() == [1, 2, 3]
    assert growing.slots_held(first).tolist() == [0]
    assert growing.moved_slots == 2


def test_its_own_slots_count_as_free_when_it_moves() -> None:
    growing = allocator()
    first, second, _ = admitted(growing, 2, 5, 3)
    growing.free(first)
    assert grow(growing, second, 2) == [[2, 0], [3, 1], [4, 2], [5, 3], [6, 4]]  # upwards, since source and destination overlap
    assert growing.slots_held(second).tolist() == list(range(7))


def test_if_only_the_sum_is_enough_all_free_slots_are_gathered_behind_it() -> None:
    growing = allocator(num_blocks=12)
    gone, first, grows, also_gone, last = admitted(growing, 2, 2, 3, 2, 2)  # 11 is free
    growing.free(gone)
    growing.free(also_gone)  # free: 0 and 1, 7 and 8, 11
    assert grow(growing, grows, 5) == [[2, 0], [3, 1], [4, 2], [5, 3], [6, 4], [10, 11], [9, 10]]
    assert [growing.slots_held(r).tolist() for r in (first, grows, last)] == [[0, 1], list(range(2, 10)), [10, 11]]
    assert growing.moved_slots == 7
    assert growing.free_slots == 0


def test_those_beyond_it_slide_up_the_highest_first() -> None:
    growing = allocator(num_blocks=9)
    grows, gone, middle, last = admitted(growing, 1, 1, 3, 2)  # 7 and 8 are free
    growing.free(gone)
    assert grow(growing, grows, 3) == [[6, 8], [5, 7], [4, 6], [3, 5], [2, 4]]
    assert [growing.slots_held(r).tolist() for r in (grows, middle, last)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]


def test_an_admission_compacts_too() -> None:
    growing = allocator(num_blocks=6)
    first, second, third = admitted(growing, 2, 2, 2)
    growing.free(first)
    growing.free(third)
    assert grow(growing, KVRequest(request_id="new", num_tokens=3), 3) == [[2, 0], [3, 1]]
    assert growing.slots_held(second).tolist() == [0, 1]


def test_it_grows_by_whole_blocks_and_rests_between() -> None:
    growing = allocator(num_blocks=4, block_size=4)
    first, second = admitted(growing, 1, 4)
    assert growing.slots_held(first).tolist() == [0, 1, 2, 3]
    assert [grow(growing, first, 1) for _ in range(3)] == [[], [], []]
    assert grow(growing, first, 1) == [[3, 11], [2, 10], [1, 9], [0, 8]]
    assert growing.slots_held(second).tolist() == [4, 5, 6, 7]


def test_a_move_takes_the_state_along() -> None:
    growing = allocator(state_slots=2)
    first, second = admitted(growing, 1, 1)
    assert growing.slots_held(first).tolist() == [2]
    assert growing.free_slots + growing.num_slots_held(first) + growing.num_slots_held(second) + 2 * growing.state_slots == 10
    assert grow(growing, first, 1) == [[2, 8], [1, 7], [0, 6]]
    assert growing.slots_held(first).tolist() == [8, 9]
    growing.preempt(first)
    assert (first.num_computed_tokens, growing.free_slots) == (0, 7)


def test_a_refusal_changes_nothing_and_comes_only_if_the_sum_is_too_small() -> None:
    growing = allocator(num_blocks=8)
    gone, first, also_gone, _ = admitted(growing, 2, 2, 2, 2)
    growing.free(gone)
    growing.free(also_gone)
    before = state(growing)
    assert grow(growing, first, 5) is None
    assert grow(growing, KVRequest(request_id="new", num_tokens=5), 5) is None
    assert state(growing) == before
    assert grow(growing, first, 4) is not None


def test_an_admission_leaves_the_watermark_and_finds_room_for_all_that_is_known() -> None:
    growing = allocator(num_blocks=10, watermark=0.2)
    admitted(growing, 3)
    assert grow(growing, KVRequest(request_id="too long", num_tokens=6), 1, busy=True) is None
    assert grow(growing, KVRequest(request_id="too long at once", num_tokens=8), 1) is None
    fits = KVRequest(request_id="fits", num_tokens=5)
    assert grow(growing, fits, 1, busy=True) == []
    assert growing.num_slots_held(fits) == 1
    assert grow(allocator(num_blocks=5, reserve_full_isl=False), KVRequest(request_id="first chunk", num_tokens=8), 4) == []


@pytest.mark.parametrize(("prompt", "output", "slots"), [(5, 4, 0), (6, 4, None), (1, 1, 0), (9, 1, None), (8, 1, 0)])
def test_what_can_ever_fit(prompt: int, output: int, slots: int | None) -> None:
    """Two state slots and blocks of 4 leave room for 8 tokens."""
    assert allocator(num_blocks=3, block_size=4, state_slots=2).admission_slots(prompt, output) == slots
    assert allocator(num_blocks=100, max_model_len=8).admission_slots(prompt, output) == slots


MISUSE: dict[str, Callable[[ContiguousGrowingAllocator, KVRequest], Any]] = {
    "was never allocated, or was freed before": lambda growing, live: growing.free(KVRequest(request_id="x", num_tokens=1)),
    "'y': holds no blocks": lambda growing, live: growing.preempt(KVRequest(request_id="y", num_tokens=1)),
    "0 new and 0 look-ahead": lambda growing, live: growing.allocate_slots(live, 0),
    "9 tokens are more than max_model_len 8": lambda growing, live: growing.allocate_slots(live, 5),
    "9 known tokens": lambda growing, live: growing.allocate_slots(KVRequest(request_id="x", num_tokens=9), 1),
    "3 computed tokens, but it holds 0": lambda growing, live: growing.allocate_slots(
        KVRequest(request_id="x", num_tokens=4, num_computed_tokens=3), 1
    ),
    "1 requests hold slots already": lambda growing, live: growing.allocate_slots(KVRequest(request_id="x", num_tokens=1), 1),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_told_and_changes_nothing(message: str) -> None:
    growing = allocator(max_num_seqs=1, max_model_len=8)
    (live,) = admitted(growing, 4)
    before = state(growing)
    with pytest.raises(ConfigError, match=message):
        MISUSE[message](growing, live)
    assert state(growing) == before


def test_the_heap_refuses_what_cannot_be() -> None:
    heap = GrowingHeap(4, num_places=2)
    with pytest.raises(ConfigError, match="heap of 0 slots"):
        GrowingHeap(0, num_places=2)
    with pytest.raises(ConfigError, match="cannot grow 0 slots to 0"):
        heap.grow(0, 0)
    assert heap.grow(0, 5) is None
    assert heap.grow(1, 2) is not None
    with pytest.raises(ConfigError, match="never shrink"):
        heap.grow(1, 1)
    with pytest.raises(ConfigError, match="no interval of this heap"):
        heap.release(0)
    heap.release(1)
    with pytest.raises(ConfigError, match="no interval of this heap"):
        heap.release(1)
    heap.check_integrity()
    assert heap.free_slots == 4


def put(array: Any, at: Any, value: int) -> None:
    array[at] = value


CORRUPTIONS: dict[str, tuple[str, Callable[[ContiguousGrowingAllocator], Any]]] = {
    "overlap": ("overlap", lambda growing: put(growing.heap.arrays.start, growing.heap.arrays.order[1], 1)),
    "beyond the heap": ("beyond the heap", lambda growing: put(growing.heap.arrays.start, growing.heap.arrays.order[1], 9)),
    "miscounted": ("miscounted", lambda growing: put(growing.heap.arrays.counts, FREE_SLOTS, 7)),
    "empty": ("empty", lambda growing: put(growing.heap.arrays.size, growing.heap.arrays.order[1], 0)),
    "not in the order": ("miscounted|the order has", lambda growing: put(growing.heap.arrays.counts, USED, 1)),
    "twice in the order": ("overlap", lambda growing: put(growing.heap.arrays.order, 1, growing.heap.arrays.order[0])),
    "interval of nobody": ("requests hold", lambda growing: growing._places.popitem()),
}


@pytest.mark.parametrize(("message", "corrupt"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_corruption_is_noticed(message: str, corrupt: Callable[[ContiguousGrowingAllocator], Any]) -> None:
    growing = allocator()
    admitted(growing, 2, 2)
    growing.check_integrity()
    corrupt(growing)
    with pytest.raises(IntegrityError, match=message):
        growing.check_integrity()


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "admit", "grow", "grow", "grow", "free", "preempt"]), st.integers(0, 9), st.integers(1, 9)),
    min_size=10,
    max_size=60,
)


@given(
    operations=OPERATIONS,
    num_blocks=st.integers(4, 16),
    block_size=st.integers(1, 4),
    state_slots=st.sampled_from([0, 0, 1, 5]),
    watermark=st.sampled_from([0.0, 0.0, 0.2]),
)
def test_whatever_moves_no_content_is_lost(
    operations: list[tuple[str, int, int]], num_blocks: int, block_size: int, state_slots: int, watermark: float
) -> None:
    """A memory on which the copies are executed one by one, and an oracle that only counts slots."""
    growing = allocator(num_blocks, block_size, max_num_seqs=4, state_slots=state_slots, watermark=watermark)
    memory = np.zeros((growing.num_slots, 2), np.int64)
    live: list[KVRequest] = []
    moved = 0

    def taken(request: KVRequest, tokens: int) -> int:
        return -(-tokens // block_size) * block_size + state_slots if request in live or tokens else 0

    for number, (operation, which, tokens) in enumerate(operations, start=1):
        admission = operation == "admit"
        if operation in ("free", "preempt"):
            if live:
                getattr(growing, operation)(live.pop(which % len(live)))
        elif (admission and len(live) < 4) or (not admission and live):
            request = KVRequest(request_id=number, num_tokens=tokens) if admission else live[which % len(live)]
            known = request.num_computed_tokens + tokens
            if known > growing.max_model_len:
                continue
            free = growing.num_slots - sum(taken(r, r.num_computed_tokens) for r in live)
            kept = int(watermark * num_blocks) * block_size if admission else 0
            fits = taken(request, known) - taken(request, request.num_computed_tokens) + kept <= free
            before = state(growing)
            copies = grow(growing, request, tokens, busy=True)
            assert (copies is not None) == fits
            if copies is None:
                assert state(growing) == before
                continue
            for source, destination in copies:
                memory[destination] = memory[source]
            moved += len(copies)
            live += [request] if admission else []
            first = request.num_computed_tokens - tokens
            for t in range(first, request.num_computed_tokens):
                memory[growing.slots_held(request)[t]] = request.request_id, t
        growing.check_integrity()
        assert growing.moved_slots == moved
        slots = [slot for request in live for slot in growing.slots_held(request).tolist()]
        assert len(set(slots)) == len(slots) == growing.usable_slots - growing.free_slots - state_slots * len(live)
        for request in live:
            held = growing.slots_held(request)
            assert held.size == growing.num_slots_held(request) == taken(request, request.num_computed_tokens) - state_slots
            computed = memory[held[: request.num_computed_tokens]].tolist()
            assert computed == [[request.request_id, t] for t in range(request.num_computed_tokens)]
    for request in live:
        growing.free(request)
    assert growing.free_slots == growing.usable_slots


@given(num_blocks=st.integers(1, 6), block_size=st.integers(1, 4), prompt=st.integers(1, 12), output=st.integers(1, 12))
def test_who_can_ever_fit_fits_alone(num_blocks: int, block_size: int, prompt: int, output: int) -> None:
    growing = allocator(num_blocks, block_size, state_slots=1)
    gone, alone = (KVRequest(request_id=i, num_tokens=1) for i in range(2))
    if grow(growing, gone, 1) is not None:
        grow(growing, alone, 1)  # where there is room, it begins in the middle
        growing.free(gone)
    grown = all(grow(growing, alone, 1) is not None for _ in range(alone.num_computed_tokens, prompt + output - 1))
    assert grown == (growing.admission_slots(prompt, output) is not None)
