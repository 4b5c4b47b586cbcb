"""TensorRT-LLM's scheduler: whom its capacity policies admit, delay and pause."""

from typing import Any

import pytest
from steps import add, advance, entries
from tensorrt_llm_scheduling import iterations, scheduler

from pagedkv.scheduling.step import Blocker


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
