"""SGLang's scheduler: who goes when memory runs out while decoding, and what is expected of outputs afterwards."""

import pytest
from sglang_scheduling import run_out, scheduler
from steps import advance

from pagedkv.scheduling.sglang_retraction import NewTokenRatio, decayed
from pagedkv.scheduling.sglang_scheduler import SGLangScheduler


def until_retraction(one: SGLangScheduler) -> None:
    """Run until a step is decided that retracts somebody."""
    one.schedule()
    while not one.preempted.size:
        one.complete()
        assert one.num_running
        one.schedule()
    one.check_integrity()


def two_too_many() -> SGLangScheduler:
    """Two requests that would come to 124 slots of 96, the first with two outputs more."""
    one = scheduler(slots=96, schedule_conservativeness=0.1)
    one.add(prompt_tokens=8, output_tokens=60)
    advance(one)
    advance(one)
    one.add(prompt_tokens=8, output_tokens=50)
    assert advance(one) == [(1, 8)]
    return one


def test_the_one_with_the_fewest_outputs_goes_and_comes_back_behind_the_others() -> None:
    one = two_too_many()
    one.add(prompt_tokens=70, output_tokens=2)
    until_retraction(one)
    assert one.preempted.tolist() == [1]
    assert one.waiting().tolist() == [2, 1]
    assert one.requests.arrays["num_preemptions"][:3].tolist() == [0, 1, 0]
    made = one.requests.arrays["num_known_tokens"][0] - 8
    assert one.new_token_ratio == min(1.0, (made + 20) / (60 + 1))
    one.complete()
    assert run_out(one) == [0, 2, 1]


def test_of_equals_the_longest_prompt_goes_first() -> None:
    one = scheduler(slots=60, schedule_conservativeness=0.1, chunked_prefill_size=None)
    for prompt in (8, 9, 7):
        one.add(prompt_tokens=prompt, output_tokens=16)
    until_retraction(one)
    assert one.preempted.tolist() == [1]


def test_a_retraction_stores_nothing_beyond_the_prompt() -> None:
    one = two_too_many()
    until_retraction(one)
    assert one.cached_slots == 8
    one.complete()
    assert run_out(one) == [0, 1]
    record = one.requests.arrays[1]
    assert record["num_hit_tokens"] <= 8 < record["num_queried_tokens"] - 8  # it looked for its outputs too when it came again


def test_a_retraction_evicts_until_20_tokens_are_free_for_each_who_stays() -> None:
    one = scheduler(slots=48, schedule_conservativeness=0.1)
    for output in (30, 24):
        one.add(prompt_tokens=8, output_tokens=output)
        advance(one)
    until_retraction(one)
    assert one.cached_slots == 0  # the one that left gave back less than 20, so its prompt went too
    assert one.allocator.cache.slots.num_free_slots >= 20 - 1


def test_the_ratio_falls_with_every_decode_step_that_fits_and_is_reset_when_idle() -> None:
    one = scheduler()
    one.add(prompt_tokens=4, output_tokens=9)
    advance(one)
    assert one.new_token_ratio == 0.7
    advance(one)
    advance(one)
    assert one.new_token_ratio == pytest.approx(0.7 - 2 * (0.7 - 0.098) / 600)
    run_out(one)
    assert one.new_token_ratio == 0.7
    ratio = NewTokenRatio.of(2.0)
    assert ratio == (1.0, 0.14)
    current = ratio.initial
    for _ in range(601):
        current = decayed(ratio, current)
    assert current == 0.14
