"""SGLang's scheduler: who computes how many tokens in a step."""

from sglang_scheduling import run_out, scheduler
from steps import advance, entries

from pagedkv.scheduling.step import Blocker


def test_prompts_come_first_and_running_requests_wait_meanwhile() -> None:
    one = scheduler()
    one.add(prompt_tokens=10, output_tokens=3)
    assert advance(one) == [(0, 10)]
    one.add(prompt_tokens=5, output_tokens=3)
    assert advance(one) == [(1, 5)]
    assert advance(one) == [(0, 1), (1, 1)]
    assert advance(one) == [(0, 1), (1, 1)]
    assert (one.finished.tolist(), one.num_running) == ([0, 1], 0)


def test_with_mixed_chunks_they_decode_in_the_same_step() -> None:
    one = scheduler(enable_mixed_chunk=True, chunked_prefill_size=16)
    one.add(prompt_tokens=10, output_tokens=9)
    advance(one)
    one.add(prompt_tokens=20, output_tokens=9)
    assert advance(one) == [(0, 1), (1, 15)]  # the decode token takes one of the 16
    step = one.schedule()
    assert entries(step) == [(1, 5), (0, 1)]
    assert step.num_running_before == 2
    one.complete()
    assert one.sampled.tolist() == [1, 0]
    assert advance(one) == [(1, 1), (0, 1)]  # the prompts of a batch come first in it from now on


def test_one_prompt_at_a_time_is_computed_in_pieces() -> None:
    one = scheduler(chunked_prefill_size=16, block_size=4)
    for _ in range(2):
        one.add(prompt_tokens=38, output_tokens=2)
    assert advance(one) == [(0, 16)]
    assert one.sampled.tolist() == []
    assert advance(one) == [(0, 16)]
    assert advance(one) == [(0, 6), (1, 8)]  # 6 tokens are charged as two blocks
    assert advance(one) == [(1, 16)]
    assert advance(one) == [(1, 14)]
    assert run_out(one) == [0, 1]


def test_without_chunks_the_first_prompt_may_exceed_the_budget_and_later_ones_may_not() -> None:
    one = scheduler(chunked_prefill_size=None, max_prefill_tokens=16)
    for prompt in (40, 4, 8, 8):
        one.add(prompt_tokens=prompt, output_tokens=2)
    assert advance(one) == [(0, 40)]
    assert advance(one) == [(1, 4), (2, 8)]  # a prompt of 4 would be the limit, and the fourth has 8
    assert one.schedule().num_entries == 1


def test_a_batch_that_was_full_stays_so_until_a_decode_step_sees_somebody_gone() -> None:
    one = scheduler(rows=2)
    for output in (2, 4, 2):
        one.add(prompt_tokens=4, output_tokens=output)
    step = one.schedule()
    assert (entries(step), step.blocker) == ([(0, 4), (1, 4)], Blocker.MAX_NUM_SEQS)
    one.complete()
    assert advance(one) == [(0, 1), (1, 1)]
    assert one.finished.tolist() == [0]
    assert advance(one) == [(1, 1)]  # request 0 is in the batch still when admission is tried
    assert advance(one) == [(2, 4)]
    assert run_out(one) == [1, 2]


def test_who_has_just_finished_takes_a_place_until_the_next_decode_step() -> None:
    one = scheduler(rows=2)
    for output in (2, 4):
        one.add(prompt_tokens=4, output_tokens=output)
    advance(one)
    advance(one)
    assert (one.finished.tolist(), one.num_running) == ([0], 1)
    one.add(prompt_tokens=4, output_tokens=2)
    assert [advance(one), advance(one)] == [[(1, 1)], [(2, 4)]]


def test_a_refusal_holds_for_a_batch_that_ran_before_though_expectations_would_allow_more() -> None:
    one = scheduler(slots=150)
    one.add(prompt_tokens=10, output_tokens=10)
    advance(one)
    one.add(prompt_tokens=10, output_tokens=50)
    one.add(prompt_tokens=10, output_tokens=62)
    assert advance(one) == [(1, 10)]  # 150 - 10 - 6.3 - 61 < 10 + 62 + 1; in a new pass 150 - 20 - 0.7 * 58 would be enough
    for _ in range(9):
        assert advance(one) == [(0, 1), (1, 1)]
    assert one.finished.tolist() == [0]
    assert [advance(one), advance(one)] == [[(1, 1)], [(2, 10)]]


def test_nobody_waits_for_those_who_are_all_done() -> None:
    one = scheduler(rows=1)
    for _ in range(2):
        one.add(prompt_tokens=4, output_tokens=2)
    assert [advance(one) for _ in range(4)] == [[(0, 4)], [(0, 1)], [(1, 4)], [(1, 1)]]
