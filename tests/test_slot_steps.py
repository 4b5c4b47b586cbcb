"""What a scheduler gets from server slots, row by row and by streams, is what they give request by request and by token ids."""

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.kv_request import KVRequest
from pagedkv.scheduling.common_prefix import common_tokens
from pagedkv.scheduling.content import Segments, shared_segments
from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppScheduler, LlamaCppSettings
from pagedkv.scheduling.requests import RequestTable
from pagedkv.scheduling.scheduler_memory import memory_of
from pagedkv.scheduling.stream_tokens import token_ids

CONTENT = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=4)
"""Streams and lengths: few of them, so that texts part and meet again."""
TEXTS = st.sampled_from([[], [(0, 20)], [(0, 9), (1, 8)], [(0, 9), (1, 3)], [(0, 2), (2, 20)], [(3, 20)]])


def segments_of(content: list[tuple[int, int]]) -> Segments:
    """Return segments of streams that may be the same again later on, as keyed blocks are."""
    streams, lengths = np.array(content, np.int64).reshape(-1, 2).T
    return shared_segments(streams, np.cumsum(lengths))


@given(contents=st.tuples(CONTENT, CONTENT), lengths=st.tuples(*[st.integers(1, 40)] * 2))
def test_requests_are_alike_as_far_as_their_token_ids_are(
    contents: tuple[list[tuple[int, int]], list[tuple[int, int]]], lengths: tuple[int, int]
) -> None:
    table = RequestTable()
    for content, length in zip(contents, lengths, strict=True):
        table.add(prompt_tokens=length, output_tokens=1, admission_slots=0, content=segments_of(content))
    ids = [token_ids(segments_of(content), i, min(lengths)) for i, content in enumerate(contents)]
    differs = np.flatnonzero(ids[0] != ids[1])
    assert common_tokens(table.arrays, table.segments, 0, 1, min(lengths)) == (differs[0] if differs.size else min(lengths))


class Shadow:
    """Asks an allocator of its own, request by request and with token ids, for what a scheduler has got in each step."""

    def __init__(self, name: str, pool: KVPoolSettings, scheduler: LlamaCppScheduler) -> None:
        self.allocator: Any = ALLOCATORS.load(name)(pool)
        self.scheduler = scheduler
        self.requests: dict[int, KVRequest] = {}
        self.num_purged = 0

    def take(self) -> None:
        """Ask for the cells of the step that was decided."""
        scheduler, allocator = self.scheduler, self.allocator
        step, records = scheduler._step, scheduler.requests
        kept = allocator.num_cached_slots
        for entry in step.batch[: step.num_entries]:
            index, num_tokens = int(entry["request"]), int(entry["num_scheduled_tokens"])
            request = self.requests.get(index)
            if request is None:
                record = records.arrays[index]
                request = self.requests[index] = KVRequest(request_id=index, num_tokens=int(record["prompt_tokens"]))
                first, most = int(record["first_segment"]), int(record["prompt_tokens"] + record["output_tokens"])
                ends = records.segments["end_token"][first : first + int(record["num_segments"])]
                request.message_start = max((end for end in ends.tolist() if end < record["prompt_tokens"]), default=0)
                request.token_ids = token_ids(records.segments[first : first + int(record["num_segments"])], index, most)
            grant = allocator.allocate_slots(request, num_tokens)
            assert grant is not None
            request.num_computed_tokens += grant.num_cached_tokens + num_tokens
            assert request.num_computed_tokens == entry["num_slots_needed"] <= entry["num_known_tokens"]
            assert allocator.server_slots.of(request).index == entry["row"]
        self.num_purged += allocator.num_cached_slots < kept
        for index in scheduler.failed.tolist():
            if (request := self.requests.pop(index, None)) is not None:
                request.num_computed_tokens = 0
                allocator.free(request)

    def compute(self) -> None:
        """Let the step that was completed be over."""
        records = self.scheduler.requests.arrays
        for index, request in self.requests.items():
            request.num_tokens = int(records["num_known_tokens"][index])
            self.allocator.note_computed(request)
        for index in self.scheduler.finished.tolist():
            self.allocator.free(self.requests.pop(index))

    def compare(self) -> None:
        """Check that both have the same cells for everybody, and keep the same for others."""
        memory, allocator = memory_of(self.scheduler), self.allocator
        assert {request.request_id for request in memory.live_requests()} == set(self.requests)
        for request in memory.live_requests():
            assert isinstance(request.request_id, int)
            own = self.requests[request.request_id]
            assert memory.slots_held(request).tolist() == allocator.slots_held(own).tolist()
        assert sorted(memory.cached_slots().tolist()) == sorted(allocator.cached_slots().tolist())
        for mine, other in zip(self.scheduler._memory.slots.windows, allocator.server_slots.arrays.windows, strict=True):
            assert np.array_equal(mine, other)
        told = self.scheduler.allocator.free_slots, self.scheduler.cached_slots
        assert told == (allocator.free_slots, allocator.num_cached_slots)


@pytest.mark.parametrize("name", ["llama-cpp-unified", "llama-cpp-split", "ollama"])
@given(
    requests=st.lists(st.tuples(TEXTS, st.integers(4, 20), st.integers(1, 12)), min_size=6, max_size=20),
    cells=st.integers(16, 70),
    slots=st.integers(1, 4),
    n_batch=st.sampled_from([4, 9, 40]),
    at_once=st.sampled_from([1, 3, 20]),
    state_slots=st.sampled_from([0, 2]),
    caching=st.booleans(),
    window=st.sampled_from([(0, 0, 32), (3, 24, 32), (2, 16, 1), (3, 12, 0), (9, 8, 3)]),
)
@settings(max_examples=100)
def test_a_scheduler_gets_what_requests_get_one_by_one(
    name: str,
    requests: list[tuple[list[tuple[int, int]], int, int]],
    cells: int,
    slots: int,
    n_batch: int,
    at_once: int,
    state_slots: int,
    caching: bool,
    window: tuple[int, int, int],
) -> None:
    pool = KVPoolSettings(
        num_blocks=cells,
        block_size=1,
        max_num_seqs=slots,
        max_model_len=max(cells // slots - state_slots, 1) if name == "ollama" else cells,
        enable_prefix_caching=caching,
        state_slots=state_slots,
        window_tokens=window[0],
        window_cells=window[1],
        context_checkpoints=window[2],
        ubatch_tokens=3,
    )
    scheduler = LlamaCppScheduler(LlamaCppSettings(n_batch=n_batch), ALLOCATORS.load(name)(pool))  # type: ignore[arg-type]
    shadow, arrivals, num_failed = Shadow(name, pool, scheduler), list(requests), 0
    while arrivals or scheduler.num_running or scheduler.num_waiting:
        for content, prompt, output in [arrivals.pop(0) for _ in range(min(len(arrivals), at_once))]:
            scheduler.add(prompt_tokens=prompt, output_tokens=output, content=segments_of(content))
        if scheduler.num_running or scheduler.num_waiting:
            step = scheduler.schedule()
            num_failed += scheduler.failed.size
            shadow.take()
            if step.num_entries:
                scheduler.complete()
                shadow.compute()
            scheduler.check_integrity()
            shadow.compare()
    hits = scheduler.requests.arrays["num_hit_tokens"].sum()
    event(f"found: {hits > 0}, failed: {num_failed > 0}, purged: {shadow.num_purged > 0}")
    assert caching or not hits
