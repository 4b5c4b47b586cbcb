"""The scheduler of llama.cpp's server and of Ollama, one rule at a time, in the words of ENGINES.md, sections 4, 5 and 9."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError
from pagedkv.scheduling.content import NO_SEGMENTS, keyed_segments, shared_segments
from pagedkv.scheduling.llama_cpp_scheduler import OLLAMA, LlamaCppScheduler, LlamaCppSettings
from pagedkv.scheduling.llama_cpp_step import most_passes
from pagedkv.scheduling.server_batch import ServerBatch
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.scheduling.stream_tokens import token_ids
from pagedkv.scheduling.ubatches import equal_split, simple_split
from pagedkv.step_batch import empty_batch


def server(
    *, cells: int, slots: int = 2, allocator: str = "llama-cpp-unified", context: int | None = None, **settings: Any
) -> LlamaCppScheduler:
    pool = KVPoolSettings(
        num_blocks=cells, block_size=1, max_num_seqs=slots, max_model_len=context or cells, enable_prefix_caching=True
    )
    return LlamaCppScheduler(LlamaCppSettings(**settings), ALLOCATORS.load(allocator)(pool))  # type: ignore[arg-type]


def add(to: LlamaCppScheduler, *lengths: tuple[int, int]) -> list[int | None]:
    return [to.add(prompt_tokens=prompt, output_tokens=output) for prompt, output in lengths]


def chat(to: LlamaCppScheduler, stream: int, prompt: int, output: int, *, shared: int | None = None) -> int | None:
    """Add a request whose first `shared` tokens, all by default, are those of a conversation."""
    content = shared_segments(np.array([stream]), np.array([prompt + output if shared is None else shared]))
    return to.add(prompt_tokens=prompt, output_tokens=output, content=content)


def entries(step: Step) -> list[tuple[int, int]]:
    """(request, tokens) in scheduling order."""
    n = step.num_entries
    return list(zip(step.batch["request"][:n].tolist(), step.batch["num_scheduled_tokens"][:n].tolist(), strict=True))


def advance(one: LlamaCppScheduler) -> list[tuple[int, int]]:
    scheduled = entries(one.schedule())
    one.complete()
    one.check_integrity()
    return scheduled


def finish(one: LlamaCppScheduler) -> list[list[tuple[int, int]]]:
    """All steps until nobody is there; nobody may fail."""
    steps = []
    while one.num_running or one.num_waiting:
        steps.append(advance(one))
        assert not one.failed.size
    return steps


def slot_of(one: LlamaCppScheduler, request: int) -> int:
    slots = one._memory.slots
    slot = int(one.requests.arrays["row"][request])
    assert (slots.runs[slot], slots.requests[slot]) == (1, request)
    return slot


# --- batches


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


# --- which slot


def test_the_slot_with_the_longest_common_prefix_is_chosen_else_the_least_recently_used() -> None:
    """ "slot with best LCP/prompt ratio > -sps (0.1 default), else LRU slot"."""
    one = server(cells=300, slots=3)
    for stream, output in ((1, 3), (2, 1), (3, 2)):
        chat(one, stream, 30, output)
    advance(one)
    home = {request: slot_of(one, request) for request in (0, 2)}
    finish(one)
    home[1] = ({0, 1, 2} - set(home.values())).pop()
    chat(one, 3, 40, 1)  # goes on where request 2 was, all it computed is found
    assert advance(one) == [(3, 9)]
    assert one.requests.arrays["num_cached_tokens"][3] == 31
    chat(one, 9, 40, 3)  # knows nobody: goes where request 1 was, which ended first
    chat(one, 1, 40, 3, shared=4)  # 4 of 40 tokens are not more than a tenth: the next by age is where request 0 was
    advance(one)
    assert (slot_of(one, 4), slot_of(one, 5)) == (home[1], home[0])
    assert one.requests.arrays["num_cached_tokens"][5] == 4  # what it has in common with that slot is kept all the same


def test_the_last_token_is_always_computed() -> None:
    """ "last token rule: ≤ len−1"."""
    one = server(cells=64)
    chat(one, 1, 10, 4)
    finish(one)
    chat(one, 1, 10, 4)
    assert advance(one) == [(1, 1)]


def test_a_prefix_is_not_shared_between_slots() -> None:
    """ "duplicates of a prefix: per slot"."""
    one = server(cells=64)
    chat(one, 1, 10, 4)
    chat(one, 1, 10, 4)
    assert advance(one) == [(0, 10), (1, 10)]
    assert one.shared_slots == 0


def test_without_cache_prompt_nothing_is_found() -> None:
    one = server(cells=64, cache_prompt=False)
    chat(one, 1, 10, 1)
    finish(one)
    chat(one, 1, 10, 1)
    assert advance(one) == [(1, 10)]


# --- Ollama


def ollama(*, context: int, parallel: int, max_queue: int = 2) -> LlamaCppScheduler:
    return server(cells=context * parallel, slots=parallel, context=context, allocator="ollama", max_queue=max_queue)


def test_ollama_reserves_a_context_for_each_slot_at_load() -> None:
    """ "every slot gets NumCtx, all reserved at load"; "cannot occur (slot-bound)"."""
    one = ollama(context=16, parallel=2)
    add(one, (1, 1))
    one.schedule()
    assert (one.allocator.units_held.sum(), one.allocator.free_slots) == (16, 16)
    assert one.add(prompt_tokens=9, output_tokens=8) is None  # longer than a context
    assert one.num_turned_away == 0


def test_ollama_turns_away_who_finds_the_queue_full() -> None:
    """ "OLLAMA_MAX_QUEUE 512 (then 503)"."""
    assert OLLAMA.max_queue == 512
    one = ollama(context=16, parallel=1, max_queue=2)
    assert add(one, (4, 2), (4, 2), (4, 2), (4, 2)) == [0, 1, 2, None]  # one for the slot, two wait
    advance(one)
    assert (add(one, (4, 2)), one.num_turned_away) == ([None], 2)
    advance(one)  # request 0 ends
    assert add(one, (4, 2), (4, 2)) == [3, None]
    assert len(finish(one)) == 6


def test_only_a_queue_without_limit_can_be_told_who_will_come() -> None:
    lengths = np.array([4, 90, 4]), np.array([2, 20, 2])
    assert server(cells=100).add_all(*lengths).tolist() == [True, False, True]
    with pytest.raises(ConfigError, match="add them one by one"):
        ollama(context=16, parallel=1).add_all(*lengths)


# --- micro-batches


def ubatches(one: LlamaCppScheduler) -> list[list[tuple[int, int, int]]]:
    """(request, tokens, slots needed) of each."""
    fields = ("request", "num_scheduled_tokens", "num_slots_needed")
    return [list(zip(*(batch[field].tolist() for field in fields), strict=True)) for batch in one.forward_passes()]


def parts(split: str, num_tokens: list[int], slots: list[int], n_ubatch: int) -> list[list[tuple[int, int]]]:
    """Cut a batch of so many tokens by entry, in these slots; return (entry, tokens) of each micro-batch."""
    size = len(num_tokens)
    server = ServerBatch.empty(
        n_batch=sum(num_tokens), n_ubatch=n_ubatch, cont_batching=True, equal_sequences=split == "equal", num_server_slots=size
    )
    batch, passes, ends = empty_batch(size), empty_batch(server.n_batch), np.zeros(most_passes(server), np.int64)
    batch["request"], batch["row"], batch["num_scheduled_tokens"] = np.arange(size), slots, num_tokens
    batch["num_slots_needed"] = batch["num_scheduled_tokens"] + 100
    order = np.arange(size)
    if split == "simple":
        number = simple_split(batch, order, n_ubatch, passes, ends)
    else:
        number = equal_split(batch, order, n_ubatch, np.zeros(size, np.int64), passes, ends)
    cut = np.split(passes[: ends[number - 1]], ends[: number - 1])
    computed = dict.fromkeys(range(size), 100)
    for entry, tokens, needed in ((*row,) for part in cut for row in part[["request", "num_scheduled_tokens", "num_slots_needed"]]):
        computed[entry] += tokens
        assert needed == computed[entry]
    return [list(zip(part["request"].tolist(), part["num_scheduled_tokens"].tolist(), strict=True)) for part in cut]


def test_one_stream_is_cut_every_n_ubatch_tokens() -> None:
    assert parts("simple", [1, 5], [0, 1], 4) == [[(0, 1), (1, 3)], [(1, 2)]]
    one = server(cells=100, n_ubatch=4)
    add(one, (2, 3))
    advance(one)
    add(one, (5, 1))
    one.schedule()
    assert ubatches(one) == [[(0, 1, 3), (1, 3, 3)], [(1, 2, 5)]]


def test_split_streams_are_as_long_as_each_other_in_a_micro_batch() -> None:
    one = server(cells=200, allocator="llama-cpp-split", n_ubatch=512)
    add(one, (2, 3))
    advance(one)
    add(one, (5, 1))
    one.schedule()
    # The first request got slot 1, the second slot 0: a gap in the order of the batch.
    assert ubatches(one) == [[(0, 1, 3)], [(1, 5, 5)]]
    assert parts("equal", [1, 1, 1], [0, 2, 3], 512) == [[(0, 1)], [(1, 1), (2, 1)]]
    assert parts("equal", [1, 1, 5], [0, 1, 2], 512) == [[(0, 1), (1, 1), (2, 1)], [(2, 4)]]
    one = server(cells=200, allocator="llama-cpp-split", n_ubatch=6)
    add(one, (9, 1), (4, 1))
    one.schedule()
    assert ubatches(one) == [[(1, 3, 3), (0, 3, 3)], [(1, 1, 4), (0, 1, 4)], [(0, 5, 9)]]


@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=8), n_ubatch=st.integers(1, 20))
def test_every_token_is_in_one_micro_batch(sizes: list[tuple[int, bool]], n_ubatch: int) -> None:
    tokens = [size for size, _ in sizes]
    slots = np.cumsum([1 + gap for _, gap in sizes]).tolist()
    for split in ("simple", "equal"):
        done = [0] * len(tokens)
        for part in parts(split, tokens, slots, n_ubatch):
            assert 0 < sum(size for _, size in part) <= n_ubatch
            for entry, size in part:
                done[entry] += size
        assert done == tokens
    for part in parts("equal", tokens, slots, n_ubatch):
        assert len({size for _, size in part}) == 1


# --- tokens and settings


@given(ends=st.lists(st.integers(1, 20), max_size=4), num_tokens=st.integers(1, 60), requests=st.tuples(*[st.integers(0, 5)] * 2))
def test_tokens_are_alike_as_far_as_requests_share(ends: list[int], num_tokens: int, requests: tuple[int, int]) -> None:
    """Synthetic ids agree exactly where content does, also where the number of a request is that of a stream."""
    shared = shared_segments(np.arange(len(ends)), np.cumsum(ends, dtype=np.int64)) if ends else NO_SEGMENTS
    one, other = (token_ids(shared, request, num_tokens) for request in requests)
    alike = num_tokens if requests[0] == requests[1] else min(sum(ends), num_tokens)
    assert (one == other).sum() == alike == (one[:alike] == other[:alike]).sum()
    assert (one >= 0).all()


def test_keyed_blocks_are_alike_where_their_keys_are() -> None:
    keys = np.arange(8, dtype=np.uint64).reshape(4, 2) * np.uint64(0x123456789ABCDEF)
    other = keys.copy()
    other[2] += np.uint64(1)
    a, b = (token_ids(keyed_segments(each, 4), 0, 16) for each in (keys, other))
    assert (a == b).tolist() == [True] * 8 + [False] * 4 + [True] * 4


def test_bad_settings_are_refused() -> None:
    for wrong in ({"n_batch": 0}, {"n_ubatch": 0}, {"max_queue": -1}, {"n_batch": 1}):
        with pytest.raises(ConfigError):
            server(cells=8, slots=2, **wrong)
    with pytest.raises(ConfigError):
        server(cells=8).add(prompt_tokens=1, output_tokens=1, priority=1)


# --- laws


@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=14),
    allocator=st.sampled_from(["llama-cpp-unified", "llama-cpp-split", "ollama"]),
    cells=st.integers(4, 60),
    slots=st.integers(1, 4),
    n_batch=st.integers(4, 40),
    at_once=st.integers(1, 14),
    cont_batching=st.booleans(),
)
def test_every_request_is_served_or_fails_and_no_slot_is_lost(
    requests: list[tuple[int, int, int]], allocator: str, cells: int, slots: int, n_batch: int, at_once: int, cont_batching: bool
) -> None:
    one = server(
        cells=cells,
        slots=slots,
        allocator=allocator,
        context=cells // slots if allocator == "ollama" and cells >= slots else None,
        n_batch=n_batch,
        cont_batching=cont_batching,
    )
    accepted: list[int] = []
    served: set[int] = set()
    failed: list[int] = []
    started: list[int] = []
    arrivals = list(requests)
    while arrivals or one.num_running or one.num_waiting:
        for prompt, output, stream in [arrivals.pop(0) for _ in range(min(len(arrivals), at_once))]:
            content = shared_segments(np.array([stream]), np.array([prompt])) if stream else None
            added = one.add(prompt_tokens=prompt, output_tokens=output, content=content)
            accepted += [] if added is None else [added]
        if not one.num_running and not one.num_waiting:
            continue
        step = one.schedule()
        one.check_integrity()
        started += step.batch["request"][step.num_running_before : step.num_entries].tolist()
        if one.failed.size:
            assert allocator == "llama-cpp-unified"  # nobody else shares cells
            assert step.num_entries == one.num_running == 0
            assert one.allocator.free_slots == one.allocator.usable_slots
            failed += one.failed.tolist()
        else:
            assert 0 < step.batch["num_scheduled_tokens"][: step.num_entries].sum() <= n_batch
            one.complete()
            served.update(one.finished.tolist())
            one.check_integrity()
        assert not one.preempted.size
        assert one.num_running <= slots
    assert sorted([*served, *failed]) == accepted
    assert started == sorted(set(started))  # in order of arrival, each once
    assert one.allocator.free_slots == one.allocator.usable_slots
    assert not one._memory.slots.runs.any()
