"""llama.cpp's cells and server slots, unified and split, and Ollama's: the engines' rules one by one, and a model of the search."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import Forkable, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.cell_cache import CellCache
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import check_unchanged, state_of

UNIFIED, SPLIT, OLLAMA = "llama-cpp-unified", "llama-cpp-split", "ollama"
EVERY = pytest.mark.parametrize("name", [UNIFIED, SPLIT, OLLAMA])


def allocator_of(name: str, slots: int, *, seqs: int = 2, longest: int = 16, caching: bool = True, state_slots: int = 0) -> Any:
    return ALLOCATORS.load(name)(
        KVPoolSettings(
            num_blocks=slots,
            block_size=1,
            max_num_seqs=seqs,
            max_model_len=longest,
            enable_prefix_caching=caching,
            state_slots=state_slots,
        )
    )


def request_of(tokens: Any, name: str = "r", **fields: Any) -> KVRequest:
    ids = np.asarray(list(tokens), np.int32)
    return KVRequest(request_id=name, num_tokens=ids.size, token_ids=ids, **fields)


def admit(allocator: Any, request: KVRequest, count: int | None = None) -> Grant | None:
    """Admit `request` with all its tokens, or `count` of those that are not cached, and compute them."""
    new = request.num_tokens - allocator.get_computed_tokens(request) if count is None else count
    return grow(allocator, request, new)


def grow(allocator: Any, request: KVRequest, count: int) -> Grant | None:
    before = state_of((allocator, request))
    grant: Grant | None = allocator.allocate_slots(request, count)
    if grant is None:
        check_unchanged(before, state_of((allocator, request)))
    else:
        request.num_computed_tokens += grant.num_cached_tokens + count
        allocator.note_computed(request)
    allocator.check_integrity()
    return grant


def run(allocator: Any, request: KVRequest) -> int:
    """Run `request` from admission to its end; return its server slot."""
    assert admit(allocator, request) is not None
    slot: int = allocator.server_slots.of(request).index
    allocator.free(request)
    allocator.check_integrity()
    return slot


def slot_of(allocator: Any, request: KVRequest) -> int:
    index: int = allocator.server_slots.of(request).index
    return index


def remembered(allocator: Any) -> list[list[int]]:
    return [slot.tokens.tolist() for slot in allocator.server_slots.slots]


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
                assert cache.place(count).tolist() == found
                held += found or []
        elif operation == "share" and not sequences[count % 5]:
            sequences[count % 5] = list(held)
            cache.share(np.array(held, np.int64))
            for cell in held:
                model.cells[cell].add(count % 5)
        elif operation in ("cut", "end"):
            dropped = held[count:] if operation == "cut" else list(held)
            cache.park(np.array(dropped, np.int64))
            cache.remove(np.array(dropped, np.int64))
            model.remove(sequence, dropped)
            del held[len(held) - len(dropped) :]
        cache.check_integrity([np.array(s, np.int64) for s in sequences], [])
        assert cache.counters[0] % size == model.head % size
        assert cache.num_seqs.tolist() == [len(cell) for cell in model.cells]
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
    first = cache.place(6)
    cache.park(first[1:3])
    cache.remove(first[1:3])
    assert cache.place(1).tolist() == [1]  # emptied cells pull the head down
    assert cache.place(2).tolist() == [2, 6]
    cache.park(first[:1])
    cache.remove(first[:1])
    cache.counters[0] = 7
    assert cache.place(2).tolist() == [7, 0]


@pytest.mark.parametrize(("count", "cell"), [(3, 10), (2, 0)])
def test_search_starts_over_if_the_head_is_more_than_twice_the_request_above_the_used_cells(count: int, cell: int) -> None:
    cache = CellCache(20)
    cache.place(5)
    cache.counters[0] = 10  # 5 used: 10 > 5 + 2 * 2, but not 10 > 5 + 2 * 3
    assert cache.place(count)[0] == (cell or 5)


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


def forked(allocator: Any) -> tuple[KVRequest, KVRequest]:
    parent, child = request_of([1, 2, 3, 4], "parent"), request_of([1, 2, 3, 4], "child")
    admit(allocator, parent)
    allocator.fork(parent, child)
    child.num_computed_tokens = 4
    allocator.check_integrity()
    return parent, child


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


@EVERY
@pytest.mark.parametrize(
    ("who", "fields", "call", "message"),
    [
        pytest.param("new", {}, lambda a, r: a.free(r), "never allocated, or was freed before", id="free of nothing"),
        pytest.param("new", {}, lambda a, r: a.preempt(r), "never allocated, or was freed before", id="preemption of nothing"),
        pytest.param("new", {}, lambda a, r: a.note_computed(r), "never allocated, or was freed before", id="news of nobody"),
        pytest.param("live", {}, lambda a, r: a.allocate_slots(r, 0), "0 new", id="no new tokens"),
        pytest.param("live", {}, lambda a, r: a.allocate_slots(r, 14), "17 tokens are more than max_model_len 16", id="too long"),
        pytest.param(
            "new", {}, lambda a, r: a.allocate_slots(r, 17), "17 tokens are more than max_model_len 16", id="too long at once"
        ),
        pytest.param(
            "new", {"num_tokens": 17}, lambda a, r: a.get_computed_tokens(r), "up to max_model_len 16", id="knows too much"
        ),
        pytest.param(
            "live", {"num_computed_tokens": 99}, lambda a, r: a.allocate_slots(r, 1), "99 computed", id="beyond its cells"
        ),
        pytest.param(
            "live", {"num_computed_tokens": 99}, lambda a, r: a.note_computed(r), "99 computed", id="news beyond its cells"
        ),
        pytest.param("new", {"num_computed_tokens": 1}, lambda a, r: a.allocate_slots(r, 1), "1 computed", id="computed nowhere"),
        pytest.param(
            "new", {"num_tokens": 4}, lambda a, r: a.allocate_slots(r, 1), "3 token_ids, but 4", id="admission without tokens"
        ),
        pytest.param(
            "live", {"num_tokens": 4}, lambda a, r: a.allocate_slots(r, 1), "3 token_ids, but 4", id="growth without tokens"
        ),
        pytest.param(
            "new", {"num_tokens": 4}, lambda a, r: a.get_computed_tokens(r), "3 token_ids, but 4", id="look-up without tokens"
        ),
        pytest.param(
            "live", {"token_ids": np.ones(1, np.int32)}, lambda a, r: a.free(r), "1 token_ids, but 3", id="end without tokens"
        ),
    ],
)
def test_bad_use_says_what_would_work_and_changes_nothing(
    name: str, who: str, fields: dict[str, Any], call: Callable[[Any, KVRequest], object], message: str
) -> None:
    allocator = allocator_of(name, 48, seqs=3)
    requests = {title: request_of([i] * 3, title) for i, title in enumerate(("live", "new", "gone"))}
    run(allocator, requests["gone"])
    admit(allocator, requests["live"])
    for field, value in fields.items():
        setattr(requests[who], field, value)
    before = state_of(allocator)
    with pytest.raises(ConfigError, match=message):
        call(allocator, requests[who])
    check_unchanged(before, state_of(allocator))


@EVERY
def test_one_request_too_many_is_a_mistake(name: str) -> None:
    allocator = allocator_of(name, 32)
    for i in range(2):
        admit(allocator, request_of([i], str(i)))
    before = state_of(allocator)
    with pytest.raises(ConfigError, match="free one first, or raise max_num_seqs 2"):
        allocator.allocate_slots(request_of([5]), 1)
    check_unchanged(before, state_of(allocator))


@pytest.mark.parametrize("name", [UNIFIED, SPLIT])
def test_fork_needs_a_parent_that_runs_a_child_that_does_not_and_an_idle_slot(name: str) -> None:
    allocator = allocator_of(name, 32)
    parent, child, new = (request_of([1, 2, 3], title) for title in ("parent", "child", "new"))
    admit(allocator, parent)
    short = request_of([1], "short")
    for first, second, message in (
        (new, child, "holds no"),
        (parent, parent, "holds slots already"),
        (parent, short, "1 known tokens: needs the 3"),
    ):
        before = state_of(allocator)
        with pytest.raises(ConfigError, match=message):
            allocator.fork(first, second)
        check_unchanged(before, state_of(allocator))
    allocator.fork(parent, child)
    before = state_of(allocator)
    with pytest.raises(ConfigError, match="free one first"):
        allocator.fork(parent, new)
    check_unchanged(before, state_of(allocator))


def put(array: Any, at: Any, value: object) -> None:
    array[at] = value


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a: put(a.cells.num_seqs, 0, 2), id="one sequence too many"),
        pytest.param(lambda a: put(a.cells.num_live, 2, 0), id="running cell taken for idle"),
        pytest.param(lambda a: put(a.cells.num_live, 0, 1), id="idle cell taken for running"),
        pytest.param(lambda a: put(a.cells.counters, 0, 99), id="head outside"),
        pytest.param(lambda a: put(a.cells.counters, 1, 4), id="wrong count of used cells"),
        pytest.param(lambda a: put(a.cells.counters, 2, 4), id="wrong highest cell"),
        pytest.param(lambda a: put(a.cells.counters, 3, 2), id="wrong count of held cells"),
        pytest.param(lambda a: put(a._sequences[0].cells, 0, 99), id="cell outside"),
        pytest.param(lambda a: put(a._sequences[0].cells, 0, 1), id="cell twice in a sequence"),
        pytest.param(lambda a: a._sequences[1].cut(1), id="cell lost"),
        pytest.param(lambda a: setattr(a.server_slots.slots[1], "tokens", np.arange(1, dtype=np.int32)), id="token forgotten"),
        pytest.param(lambda a: setattr(a.server_slots.slots[0], "request", None), id="slot without its request"),
        pytest.param(lambda a: setattr(a.server_slots.slots[0], "num_computed", 4), id="computed beyond its cells"),
        pytest.param(lambda a: a.server_slots._running.clear(), id="request lost"),
    ],
)
def test_unified_notices_corruption(corrupt: Callable[[Any], None]) -> None:
    allocator = allocator_of(UNIFIED, 16)
    live, idle = request_of([1, 2, 3], "live"), request_of([4, 5], "idle")
    admit(allocator, idle)  # cells 0 and 1
    admit(allocator, live)  # cells 2 to 4, slot 0
    allocator.free(idle)
    allocator.check_integrity()
    corrupt(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a: put(a._streams, 0, 1), id="stream twice"),
        pytest.param(lambda a: put(a._used, 1, 1), id="idle slot with tokens at work"),
        pytest.param(lambda a: put(a._uncopied, 1, (2, 1)), id="idle slot that waits for copies"),
        pytest.param(lambda a: put(a._uncopied, 0, (1, 4)), id="copies from an idle stream"),
        pytest.param(lambda a: put(a._uncopied, 0, (2, 5)), id="copies of more than it has"),
        pytest.param(lambda a: setattr(a.server_slots.slots[0], "num_computed", 9), id="computed beyond its stream"),
        pytest.param(lambda a: a.server_slots._running.popitem(), id="request lost"),
    ],
)
def test_split_notices_corruption(corrupt: Callable[[Any], None]) -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    forked(allocator)  # parent in slot 2, child in slot 0
    corrupt(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()
