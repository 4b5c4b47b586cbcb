"""TensorRT-LLM's scheduler, one rule at a time, in the words of the engine's behaviour to model (ENGINES.md, section 3)."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.errors import ConfigError
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.reuse_steps import ReuseStepAllocator
from pagedkv.scheduling.capacity_policy import CAPACITY_POLICIES
from pagedkv.scheduling.content import shared_segments
from pagedkv.scheduling.micro_batch import (
    EQUAL_PROGRESS,
    FIRST_COME_FIRST_SERVED,
    WHOLE,
    MicroBatch,
    MicroBatchLimits,
    choose_entries,
)
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.scheduling.tensorrt_llm_scheduler import TensorRTLLMScheduler, TensorRTLLMSettings


def scheduler(
    *, num_blocks: int, block_size: int = 4, allocator: str = "tensorrt-llm", caching: bool = False, state: int = 0, **limits: Any
) -> TensorRTLLMScheduler:
    settings = TensorRTLLMSettings(**{"max_num_seqs": 8, "max_model_len": 256, "enable_block_reuse": caching, **limits})
    pool = KVPoolSettings(
        num_blocks=num_blocks + (allocator == "paged"),  # it has a null block
        block_size=block_size,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        enable_prefix_caching=caching,
        state_slots=state,
    )
    own = allocator == "tensorrt-llm"
    return TensorRTLLMScheduler(settings, ReuseStepAllocator(TensorRTLLMAllocator(pool)) if own else PagedStepAllocator(pool))


def add(to: TensorRTLLMScheduler, *lengths: tuple[int, int], priority: int = 0) -> list[int | None]:
    return [to.add(prompt_tokens=prompt, output_tokens=output, priority=priority) for prompt, output in lengths]


def entries(step: Step) -> list[tuple[int, int]]:
    """(request, tokens) in scheduling order."""
    n = step.num_entries
    return list(zip(step.batch["request"][:n].tolist(), step.batch["num_scheduled_tokens"][:n].tolist(), strict=True))


def advance(one: TensorRTLLMScheduler) -> list[tuple[int, int]]:
    scheduled = entries(one.schedule())
    one.complete()
    one.check_integrity()
    return scheduled


def iterations(one: TensorRTLLMScheduler) -> int:
    """Steps until all are served; nothing may stand still or fail."""
    steps = 0
    while one.num_running + one.num_waiting:
        assert advance(one)
        steps += 1
    assert one.allocator.free_slots == one.allocator.usable_slots
    return steps


@pytest.mark.parametrize(
    ("capacity", "policy", "expected"),
    [
        (200, "guaranteed_no_evict", 80),
        (200, "max_utilization", 80),
        (200, "static_batch", 80),
        (100, "guaranteed_no_evict", 160),
        (100, "max_utilization", 119),
        (100, "static_batch", 160),
    ],
)
def test_two_requests_of_prompt_10_and_output_80(capacity: int, policy: str, expected: int) -> None:
    """Two requests of prompt 10 and output 80 in blocks of 10: capacity 200 ends after 80 iterations, 100 after 160 or 119."""
    one = scheduler(
        num_blocks=capacity // 10, block_size=10, allocator="paged", capacity_policy=policy, max_num_seqs=2, max_model_len=90
    )
    add(one, (10, 80), (10, 80))
    assert iterations(one) == expected


@pytest.mark.parametrize(
    ("num_blocks", "policy", "paused_at", "expected"),
    [
        (18, "guaranteed_no_evict", None, 64),
        (18, "max_utilization", None, 64),
        (10, "guaranteed_no_evict", None, 128),
        (10, "max_utilization", 34, 64 + 31),  # both need a 6th block at step 34; the second has 33 tokens of 64 then
        (9, "max_utilization", 26, 64 + 39),  # the first gets the 9th block as its 5th; the second has 25 tokens
    ],
)
def test_the_same_over_its_own_blocks(num_blocks: int, policy: str, paused_at: int | None, expected: int) -> None:
    """Two requests of prompt 8 and output 64 over its own allocator, whose blocks are powers of two."""
    one = scheduler(num_blocks=num_blocks, block_size=8, capacity_policy=policy, max_model_len=72)
    add(one, (8, 64), (8, 64))
    pauses = []
    for step in range(1, expected + 1):
        assert advance(one)
        pauses += [step] * one.preempted.size
    assert (one.num_running, one.num_waiting) == (0, 0)
    assert pauses == ([] if paused_at is None else [paused_at])


# --- GUARANTEED_NO_EVICT


def test_a_request_is_admitted_if_its_blocks_to_the_end_are_left() -> None:
    """ "A pending request is admitted iff its full ceil((prompt+max_new)/B) ≤ what is left; first failure breaks."."""
    one = scheduler(num_blocks=8)
    add(one, (8, 9), (4, 5), (1, 3))  # 5, 3 and 1 blocks
    assert entries(one.schedule()) == [(0, 8), (1, 4)]
    one = scheduler(num_blocks=7)
    add(one, (8, 9), (4, 5), (1, 3))
    step = one.schedule()
    assert (entries(step), step.blocker) == ([(0, 8)], Blocker.KV_MEMORY)  # nor does request 2 overtake, though it would fit
    assert one.allocator.free_slots == 5 * 4  # the gate reserves nothing: the prompt's blocks are all that is taken


def test_the_last_token_counts_in_the_reservation_though_it_never_gets_a_slot() -> None:
    """ "ceil((prompt+max_new)/B)": 8 + 9 tokens are 5 blocks, of which 4 are ever filled."""
    one = scheduler(num_blocks=4)
    assert add(one, (8, 9), (8, 8)) == [None, 0]
    assert add(scheduler(num_blocks=4, capacity_policy="max_utilization"), (8, 9)) == [0]


def test_running_requests_always_continue() -> None:
    """ "Running requests always continue; subtract for each the blocks still needed to finish". "No pause ever"."""
    one = scheduler(num_blocks=6)
    add(one, (4, 13), (4, 5))  # 5 and 3 blocks
    for _ in range(12):
        assert advance(one)[0][0] == 0
        assert one.preempted.size == 0
        assert one.num_waiting == 1  # only 1 block is left until request 0 ends, though 4 are free at first
    advance(one)
    assert advance(one) == [(1, 4)]


def test_without_a_number_of_tokens_the_whole_length_is_reserved() -> None:
    """ "omitted max_new means the whole max_seq_len is reserved"."""
    limits: dict[str, Any] = {"num_blocks": 15, "max_model_len": 32}
    one = scheduler(**limits)
    add(one, (4, 4), (4, 4))
    assert entries(one.schedule()) == [(0, 4), (1, 4)]
    one = scheduler(**limits, max_tokens_given=False)
    add(one, (4, 4), (4, 4))
    assert entries(one.schedule()) == [(0, 4)]  # 8 + 8 blocks are more than 15
    assert add(scheduler(num_blocks=7, max_model_len=32, max_tokens_given=False), (4, 4)) == [None]


def test_the_state_of_a_request_counts_too() -> None:
    one = scheduler(num_blocks=7, state=5)  # 2 blocks
    add(one, (4, 4), (4, 4))
    assert entries(one.schedule()) == [(0, 4)]
    assert add(scheduler(num_blocks=3, state=5), (4, 4)) == [None]


def test_a_static_batch_admits_only_when_nothing_runs() -> None:
    """ "as no-evict but only when nothing is running"."""
    one = scheduler(num_blocks=100, capacity_policy="static_batch", max_num_seqs=2)
    add(one, (4, 2), (4, 4), (4, 2))
    assert advance(one) == [(0, 4), (1, 4)]
    assert advance(one) == [(0, 1), (1, 1)]
    step = one.schedule()
    assert (entries(step), step.blocker) == ([(1, 1)], Blocker.MAX_NUM_SEQS)  # a row is free, and nobody gets it
    one.complete()
    assert advance(one) == [(1, 1)]
    assert advance(one) == [(2, 4)]


# --- MAX_UTILIZATION


def test_the_last_started_request_is_paused() -> None:
    """ "if it does not fit, pause the last started request in the list, return its blocks in the simulation, retry"."""
    one = scheduler(num_blocks=4, capacity_policy="max_utilization")
    add(one, (4, 9), (4, 9), (4, 9))
    assert advance(one) == [(0, 4), (1, 4), (2, 4)]
    step = one.schedule()  # each needs a second block: request 0 gets the last one, request 1 that of request 2
    assert (entries(step), one.preempted.tolist()) == ([(0, 1), (1, 1)], [2])


def test_who_comes_behind_a_paused_request_waits_and_a_pause_keeps_what_was_generated() -> None:
    """ "Paused: sequence removed, prompt := prompt + generated, context-init again"."""
    one = scheduler(num_blocks=5, capacity_policy="max_utilization")
    add(one, (8, 9), (8, 9), (1, 1))
    assert advance(one) == [(0, 8), (1, 8), (2, 1)]  # 2 + 2 + 1 blocks; request 2 ends
    step = one.schedule()
    assert one.preempted.tolist() == [1]  # both need a third block, and one is left
    assert (entries(step), step.num_preempted, step.blocker) == ([(0, 1)], 1, Blocker.KV_MEMORY)
    one.complete()
    add(one, (1, 1))
    for _ in range(3):  # request 1 would need 3 blocks for its 9 tokens, 2 are free; nobody overtakes it
        assert advance(one) == [(0, 1)]
    while one.requests.arrays["num_known_tokens"][0] < 17:
        advance(one)
    assert one.num_running == 0
    assert advance(one) == [(1, 9), (3, 1)]
    assert one.requests.arrays["num_preemptions"][1] == 1


def test_nobody_overtakes_a_paused_request_in_the_step_of_its_pause() -> None:
    """The list ends where the paused one stood."""
    one = scheduler(num_blocks=3, capacity_policy="max_utilization")
    add(one, (4, 5), (5, 4))
    advance(one)
    add(one, (1, 1))
    step = one.schedule()  # request 0 takes one of the 2 blocks that request 1 gives back; request 2 would need the other
    assert (entries(step), one.preempted.tolist(), one.waiting().tolist()) == ([(0, 1)], [1], [1, 2])


def test_nor_if_it_is_paused_amid_its_prompt() -> None:
    """The block that it was about to fill would delay it, which is no reason to pass it over."""
    limits: dict[str, Any] = {"caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 16}
    one = scheduler(num_blocks=6, capacity_policy="max_utilization", **limits)
    add(one, (20, 4), priority=1)
    assert advance(one) == [(0, 16)]
    add(one, (12, 1), priority=0)
    add(one, (1, 1), priority=1)
    step = one.schedule()  # 3 blocks of 6 for the urgent one: there would be room for request 2
    assert (entries(step), one.preempted.tolist(), one.waiting().tolist()) == ([(1, 12)], [0], [0, 2])


def test_nobody_started_behind_it_nobody_is_paused_for_it() -> None:
    """ "if none started, break"."""
    one = scheduler(num_blocks=4, capacity_policy="max_utilization")
    add(one, (8, 5), (12, 2))
    assert advance(one) == [(0, 8)]
    step = one.schedule()
    assert (entries(step), step.num_preempted, step.blocker) == ([(0, 1)], 0, Blocker.KV_MEMORY)


def test_a_more_urgent_request_pauses_the_less_urgent() -> None:
    """ "order = queue order (priority desc, arrival)": the walk reaches it before those who have started."""
    one = scheduler(num_blocks=4, capacity_policy="max_utilization")
    add(one, (8, 5), (4, 5), priority=1)
    advance(one)
    add(one, (8, 2), priority=0)
    step = one.schedule()
    assert one.preempted.tolist() == [1, 0]  # the last one first; its block alone is not enough
    assert entries(step) == [(2, 8)]
    one.complete()
    assert one.waiting().tolist() == [0, 1]
    no_evict = scheduler(num_blocks=8)
    add(no_evict, (8, 5), (4, 5), priority=1)
    advance(no_evict)
    add(no_evict, (8, 2), priority=0)
    assert entries(no_evict.schedule()) == [(0, 1), (1, 1)]


# --- reuse


def with_prefix(to: TensorRTLLMScheduler, stream: int, shared: int, prompt: int, output: int) -> None:
    content = shared_segments(np.array([stream]), np.array([shared]))
    to.add(prompt_tokens=prompt, output_tokens=output, content=content)


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
def test_a_request_waits_a_step_for_the_block_that_another_one_fills(policy: str) -> None:
    """ "a context request whose first new block is being produced by another context request this step is delayed one step"."""
    one = scheduler(num_blocks=100, caching=True, capacity_policy=policy)
    with_prefix(one, 7, 8, 12, 3)
    with_prefix(one, 7, 8, 12, 3)
    with_prefix(one, 9, 8, 12, 3)  # another stream: it does not wait, and overtakes
    assert advance(one) == [(0, 12), (2, 12)]
    assert advance(one) == [(0, 1), (2, 1), (1, 4)]  # 8 of its tokens are found
    assert one.requests.arrays["num_cached_tokens"][:3].tolist() == [0, 8, 0]
    assert one.shared_slots == 8


def test_a_static_batch_delays_nobody() -> None:
    """The delay is part of the other two policies."""
    one = scheduler(num_blocks=100, caching=True, capacity_policy="static_batch")
    with_prefix(one, 7, 8, 12, 3)
    with_prefix(one, 7, 8, 12, 3)
    assert advance(one) == [(0, 12), (1, 12)]


def test_a_chunk_in_progress_delays_who_would_fill_the_same_block() -> None:
    """A prompt that is half computed produces blocks as well."""
    one = scheduler(num_blocks=100, caching=True, enable_chunked_prefill=True, max_num_batched_tokens=12)
    with_prefix(one, 7, 16, 20, 3)
    with_prefix(one, 7, 16, 20, 3)
    assert advance(one) == [(0, 12)]
    assert advance(one) == [(0, 8)]  # 4 tokens of the step are left, but request 0 fills the block that they would go to
    assert advance(one) == [(0, 1), (1, 4)]  # 16 of its tokens are found


def test_hits_are_counted_in_tokens_up_to_the_last_but_one() -> None:
    """ "Partial reuse: longest common prefix inside a block counts". "Prompt hit ≤ len−1"."""
    one = scheduler(num_blocks=100, caching=True)
    with_prefix(one, 7, 14, 12, 3)
    iterations(one)
    assert one.cached_slots == 16
    with_prefix(one, 7, 14, 14, 1)
    assert advance(one) == [(1, 1)]
    assert one.requests.arrays["num_cached_tokens"][1] == 13


def test_a_paused_request_finds_what_is_not_evicted() -> None:
    """ "recompute, with reuse if enabled"."""
    one = scheduler(num_blocks=7, capacity_policy="max_utilization", caching=True)
    add(one, (8, 9), (8, 9))
    while not one.preempted.size:
        advance(one)
    known = int(one.requests.arrays["num_known_tokens"][1])
    while not one.requests.arrays["row"][1] >= 0:
        advance(one)
    assert one.requests.arrays["num_hit_tokens"][1] > 0
    assert one.requests.arrays["num_queried_tokens"][1] == 8 + known


# --- the micro-batch scheduler


Work = tuple[int, int, bool]
"""(request, its tokens, whether it is a prompt)."""


def micro_batch(work: list[Work], limits: MicroBatchLimits) -> list[tuple[int, int]]:
    """(request, tokens) of a step."""
    batch = MicroBatch.empty(len(work))
    for kept, values in zip((batch.requests, batch.num_tokens, batch.is_context), zip(*work, strict=True), strict=True):
        kept[:] = values
    number = choose_entries(batch, len(work), limits)
    return list(zip(batch.requests[batch.chosen[:number]].tolist(), batch.sizes[:number].tolist(), strict=True))


def test_without_chunks_a_prompt_that_exceeds_the_step_ends_it() -> None:
    work = [(0, 1, False), (1, 6, True), (2, 5, True), (3, 1, False)]
    assert micro_batch(work, MicroBatchLimits(8, 10, WHOLE, 4)) == [(0, 1), (1, 6)]  # nor does request 3 run
    assert micro_batch(work, MicroBatchLimits(1, 10, WHOLE, 4)) == [(0, 1)]


def test_chunks_are_whole_blocks_unless_they_end_a_prompt() -> None:
    work = [(0, 9, True), (1, 1, False), (2, 9, True)]
    assert micro_batch(work, MicroBatchLimits(8, 16, FIRST_COME_FIRST_SERVED, 4)) == [(1, 1), (0, 9), (2, 4)]
    assert micro_batch(work, MicroBatchLimits(8, 11, FIRST_COME_FIRST_SERVED, 4)) == [(1, 1), (0, 9)]
    assert micro_batch(work, MicroBatchLimits(8, 11, EQUAL_PROGRESS, 4)) == [(1, 1), (0, 4), (2, 4)]
    assert micro_batch(work, MicroBatchLimits(8, 19, EQUAL_PROGRESS, 4)) == [(1, 1), (0, 9), (2, 9)]
    assert micro_batch(work, MicroBatchLimits(8, 4, FIRST_COME_FIRST_SERVED, 4)) == [(1, 1)]


def test_a_prompt_longer_than_a_step_needs_chunks() -> None:
    assert add(scheduler(num_blocks=100, max_num_batched_tokens=8), (9, 1), (8, 1)) == [None, 0]
    one = scheduler(num_blocks=100, max_num_batched_tokens=8, enable_chunked_prefill=True)
    add(one, (9, 1), (8, 1))
    assert [advance(one) for _ in range(3)] == [[(0, 8)], [(0, 1), (1, 4)], [(1, 4)]]


def test_bad_settings_are_refused() -> None:
    for wrong in (
        {"capacity_policy": "no_evict"},
        {"chunk_policy": "fifo"},
        {"max_num_batched_tokens": 0},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 3},
        {"max_model_len": 300},
    ):
        with pytest.raises(ConfigError):
            TensorRTLLMScheduler(
                TensorRTLLMSettings(**{"max_num_seqs": 8, "max_model_len": 256, **wrong}),
                ReuseStepAllocator(
                    TensorRTLLMAllocator(KVPoolSettings(num_blocks=8, block_size=4, max_num_seqs=8, max_model_len=256))
                ),
            )
    with pytest.raises(ConfigError):
        scheduler(num_blocks=8).add(prompt_tokens=0, output_tokens=1)


# --- laws

LENGTHS = st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2), st.integers(0, 3))


@given(
    requests=st.lists(LENGTHS, min_size=1, max_size=12),
    num_blocks=st.integers(2, 20),
    policy=st.sampled_from(sorted(CAPACITY_POLICIES)),
    chunk=st.sampled_from([None, "first_come_first_served", "equal_progress"]),
    caching=st.booleans(),
    late=st.integers(0, 6),
)
def test_all_are_served(
    requests: list[tuple[int, int, int, int]], num_blocks: int, policy: str, chunk: str | None, caching: bool, late: int
) -> None:
    """Whoever is accepted is served, whatever the policy; no policy but MAX_UTILIZATION pauses; when all end, all is free."""
    one = scheduler(
        num_blocks=num_blocks,
        caching=caching,
        capacity_policy=policy,
        enable_chunked_prefill=chunk is not None,
        max_num_batched_tokens=12 if chunk else 60,
        chunk_policy=chunk or "equal_progress",
        max_num_seqs=4,
        max_model_len=60,
    )
    accepted, served, arrivals = 0, 0, list(requests)
    while arrivals or one.num_running or one.num_waiting:
        for prompt, output, priority, stream in [arrivals.pop(0) for _ in range(min(len(arrivals), 12 - late))]:
            content = shared_segments(np.array([stream]), np.array([prompt])) if stream else None
            added = one.add(prompt_tokens=prompt, output_tokens=output, priority=priority, content=content)
            accepted += added is not None
        if not one.num_waiting and not one.num_running:
            continue
        before = one.waiting().tolist()
        step = one.schedule()
        assert step.num_entries > 0
        assert step.batch["num_scheduled_tokens"][: step.num_entries].min() > 0
        assert step.batch["num_scheduled_tokens"][: step.num_entries].sum() <= one.settings.max_num_batched_tokens
        one.check_integrity()
        if policy != "max_utilization":
            assert not one.preempted.size
            if not caching and chunk is None:  # in queue order
                assert before == [*step.batch["request"][step.num_running_before : step.num_entries], *one.waiting()]
        one.complete()
        one.check_integrity()
        served += one.finished.size
        assert one.failed.size == 0
    assert served == accepted
    assert one.allocator.free_slots == one.allocator.usable_slots
