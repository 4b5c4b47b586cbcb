"""vLLM's scheduler, one rule at a time. tests/properties holds them all together against an oracle."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from steps import add, advance, entries

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.scheduling.content import NO_SEGMENTS
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Blocker
from pagedkv.scheduling.waiting import NUM_RUNNING, WAITING_HEAD
from pagedkv.step_allocation import step_allocator
from pagedkv.step_batch import StepBatch


def scheduler(*, num_blocks: int = 100, watermark: float = 0.0, allocator: str = "paged", **limits: Any) -> Scheduler:
    """A scheduler over blocks of 4 tokens."""
    settings = SchedulerSettings(**{"max_num_seqs": 8, "max_model_len": 64, **limits})
    pool = KVPoolSettings(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        watermark=watermark,
    )
    return Scheduler(settings, step_allocator(allocator, pool))


def test_a_request_is_prefilled_then_decoded_token_by_token() -> None:
    one = scheduler()
    add(one, (10, 3))
    assert advance(one) == [(0, 10)]
    assert (one.sampled.tolist(), one.finished.tolist()) == ([0], [])  # the prefill gives the first token
    assert advance(one) == [(0, 1)]
    assert advance(one) == [(0, 1)]
    assert (one.sampled.tolist(), one.finished.tolist()) == ([0], [0])
    assert (one.num_running, one.num_waiting) == (0, 0)


def test_a_long_prompt_is_cut_to_the_budget_and_shares_steps() -> None:
    one = scheduler(max_num_batched_tokens=16)
    add(one, (20, 2), (9, 2))
    assert advance(one) == [(0, 16)]
    assert one.sampled.tolist() == []
    assert advance(one) == [(0, 4), (1, 9)]
    assert advance(one) == [(0, 1), (1, 1)]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_it() -> None:
    one = scheduler(max_num_batched_tokens=64, enable_chunked_prefill=False)
    add(one, (50, 2), (20, 2), (1, 2))
    step = one.schedule()
    assert entries(step) == [(0, 50)]  # nor does request 2, which would fit, overtake
    assert step.blocker is Blocker.TOKEN_BUDGET
    one.complete()
    assert advance(one) == [(0, 1), (1, 20), (2, 1)]


def test_the_threshold_for_long_prefills_counts_only_in_company() -> None:
    one = scheduler(long_prefill_token_threshold=6)
    add(one, (20, 3))
    assert advance(one) == [(0, 20)]
    add(one, (20, 2))
    assert advance(one) == [(0, 1), (1, 6)]
    assert advance(one) == [(0, 1), (1, 6)]
    assert one.finished.tolist() == [0]
    assert advance(one) == [(1, 8)]  # alone again


def test_the_last_to_come_is_preempted_and_recomputes_its_outputs_too() -> None:
    one = scheduler(num_blocks=5)  # 4 blocks that can be held
    add(one, (7, 6), (6, 6), (1, 1))
    assert advance(one) == [(0, 7), (1, 6)]
    assert advance(one) == [(0, 1), (1, 1)]
    step = one.schedule()  # request 0 needs a third block: request 1 gives its two
    assert (entries(step), step.num_preempted, step.blocker) == ([(0, 1)], 1, Blocker.KV_MEMORY)
    assert one.waiting().tolist() == [1, 2]  # in front of those who never ran, and nobody is admitted in this step
    assert one.requests.arrays["num_preemptions"][:3].tolist() == [0, 1, 0]
    one.complete()
    for _ in range(3):
        assert advance(one) == [(0, 1)]
    assert one.finished.tolist() == [0]
    assert advance(one) == [(1, 8), (2, 1)]  # prompt and the two tokens it had


def test_who_asks_may_be_the_one_that_is_preempted() -> None:
    one = scheduler(num_blocks=5)
    add(one, (5, 8), (8, 4))
    assert advance(one) == [(0, 5), (1, 8)]
    step = one.schedule()
    assert (entries(step), step.num_preempted) == ([(0, 1)], 1)


def test_the_watermark_holds_back_admissions_while_anything_runs() -> None:
    one = scheduler(num_blocks=11, watermark=0.5)  # 5 of 10 blocks stay free
    add(one, (24, 4), (4, 4))
    step = one.schedule()
    assert entries(step) == [(0, 24)]  # 6 blocks: nothing ran, so the watermark did not count; it does for request 1
    assert step.blocker is Blocker.KV_MEMORY


def test_who_holds_up_the_queue_is_named() -> None:
    one = scheduler(max_num_seqs=2)
    assert one.schedule().blocker is Blocker.NONE
    add(one, (4, 4), (4, 4))
    assert one.schedule().blocker is Blocker.NONE
    one.complete()
    add(one, (4, 4))
    assert one.schedule().blocker is Blocker.MAX_NUM_SEQS
    tight = scheduler(max_num_batched_tokens=4)
    add(tight, (4, 4), (4, 4))
    assert tight.schedule().blocker is Blocker.TOKEN_BUDGET


def test_what_can_never_run_is_refused_at_once() -> None:
    assert add(scheduler(), (60, 4), (60, 5)) == [0, None]  # max_model_len 64
    assert add(scheduler(num_blocks=5), (10, 7), (10, 8)) == [0, None]  # 16 slots, and the last token needs none
    assert add(scheduler(num_blocks=5, allocator="contiguous-max"), (1, 1)) == [None]  # 64 slots never come together in 20


@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (-3, 4)])
def test_a_request_has_tokens(lengths: tuple[int, int]) -> None:
    one = scheduler()
    with pytest.raises(ConfigError, match="1 or more prompt and output tokens"):
        add(one, lengths)
    assert one.num_waiting == 0


def test_thousands_may_wait_and_keep_their_order() -> None:
    one = scheduler(max_num_seqs=3)
    served = []
    for i in range(3000):
        add(one, (1 + i % 5, 1), (2, 1))
        served += [request for request, _ in advance(one)]
    while one.num_waiting:
        served += [request for request, _ in advance(one)]
    assert served == list(range(6000))


def test_the_head_can_be_dropped() -> None:
    one = scheduler(max_num_seqs=1)
    add(one, (4, 4), (4, 4), (4, 4))
    one.schedule()
    assert one.drop_head() == 1
    assert one.waiting().tolist() == [2]
    one.check_integrity()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "max-num-seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max-num-batched-tokens is 0"),
        ({"max_model_len": 0}, "max-model-len is 0"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 63}, "needs 64 or more"),
    ],
)
def test_limits_must_let_every_request_run(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler(**limits)


@pytest.mark.parametrize("limits", [{"max_num_seqs": 9}, {"max_model_len": 65}])
def test_the_allocator_must_have_room_for_the_limits(limits: dict[str, Any]) -> None:
    pool = KVPoolSettings(num_blocks=100, block_size=4, max_num_seqs=8, max_model_len=64)
    with pytest.raises(ConfigError):
        Scheduler(SchedulerSettings(**{"max_num_seqs": 8, "max_model_len": 64, **limits}), step_allocator("paged", pool))


class Refusing:
    """An allocator that promises room and never has it."""

    name = placement = "refusing"
    usable_slots, unit_slots, free_slots, rounding_slots = 64, 1, 64, 0
    max_model_len = 64
    units_held = np.zeros(8, np.int32)

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        return 0

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        return first

    def free(self, row: int) -> None:
        raise AssertionError("nothing was given")

    def check_integrity(self) -> None:
        pass


def test_a_refusal_with_nothing_running_is_an_empty_step() -> None:
    one = Scheduler(SchedulerSettings(max_num_seqs=8, max_model_len=64), Refusing())
    add(one, (4, 4))
    step = one.schedule()
    assert (step.num_entries, step.num_preempted, step.blocker) == (0, 0, Blocker.KV_MEMORY)
    assert one.drop_head() == 0
    one.check_integrity()


def put(array: Any, at: int, value: int) -> None:
    array[at] = value


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda s: put(s.requests.arrays["row"], 1, 0), id="two requests in a row"),
        pytest.param(lambda s: put(s.requests.arrays["row"], 2, 1), id="waiting request with a row"),
        pytest.param(lambda s: put(s.arrays.free_rows, 2, 0), id="free row that is taken"),
        pytest.param(lambda s: put(s.arrays.running, 1, 0), id="request that runs twice"),
        pytest.param(lambda s: put(s.arrays.waiting, s.arrays.counts[WAITING_HEAD], 1), id="request that runs and waits"),
        pytest.param(lambda s: put(s.arrays.counts, NUM_RUNNING, 1), id="running request forgotten"),
        pytest.param(lambda s: put(s.requests.arrays["num_computed_tokens"], 0, 9), id="more tokens than slots"),
        pytest.param(lambda s: put(s.requests.arrays["num_computed_tokens"], 2, 1), id="waiting request with computed tokens"),
        pytest.param(lambda s: s.allocator.free(1), id="running request without slots"),
        pytest.param(lambda s: put(s.allocator.pool.ref_cnt, 1, 2), id="corrupt allocator"),
    ],
)
def test_corruption_is_noticed(corrupt: Callable[[Any], None]) -> None:
    one = scheduler(max_num_seqs=3, max_num_batched_tokens=12)
    add(one, (8, 2), (4, 2), (4, 2))
    assert advance(one) == [(0, 8), (1, 4)]  # request 2 waits
    corrupt(one)
    with pytest.raises(IntegrityError):
        one.check_integrity()


@pytest.mark.parametrize("settings", [{"eviction": "lfu"}, {"prefix_match_unit": 2}])
def test_what_is_not_done_step_by_step_is_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match="a scheduler drives whole blocks and lru"):
        step_allocator("paged", KVPoolSettings(num_blocks=9, max_model_len=32, **settings))


def test_prefixes_are_shared_in_paged_memory_only() -> None:
    pool = KVPoolSettings(num_blocks=9, block_size=4, max_model_len=32, enable_prefix_caching=True)
    with pytest.raises(ConfigError, match="radix needs enable_prefix_caching off"):
        step_allocator("radix", pool)
    without = Scheduler(SchedulerSettings(max_model_len=32), step_allocator("paged", replace(pool, enable_prefix_caching=False)))
    with pytest.raises(ConfigError, match="prefix caching is off"):
        without.add(prompt_tokens=9, output_tokens=1, keys=np.zeros((2, 2), np.uint64))
    with pytest.raises(ConfigError, match="one by one"):
        Scheduler(SchedulerSettings(max_model_len=32), step_allocator("radix", replace(pool, enable_prefix_caching=False))).add_all(
            np.array([1]), np.array([1])
        )


def with_keys(*, num_blocks: int = 100, **limits: Any) -> Scheduler:
    settings = SchedulerSettings(**{"max_num_seqs": 8, "max_model_len": 64, **limits})
    pool = KVPoolSettings(num_blocks=num_blocks, block_size=4, max_num_seqs=8, max_model_len=64, enable_prefix_caching=True)
    return Scheduler(settings, step_allocator("paged", pool))


def keys_of(*blocks: int) -> BlockKeys:
    return np.array([[block, 1 << 62] for block in blocks], np.uint64)


def test_a_block_that_outputs_fill_is_found_by_the_key_that_is_told_when_it_is_full() -> None:
    one = with_keys()
    assert one.add(prompt_tokens=6, output_tokens=8, keys=keys_of(10), keys_follow=True) == 0
    for _ in range(2):  # tokens 7 and 8 are known: the second block is full
        advance(one)
    one.add_keys(0, keys_of(20))
    for _ in range(4):
        advance(one)
    one.add_keys(0, keys_of(30))
    advance(one)
    one.add(prompt_tokens=13, output_tokens=1, keys=keys_of(10, 20, 30), keys_follow=True)
    assert advance(one) == [(0, 1), (1, 1)]
    assert one.requests.arrays["num_cached_tokens"][1] == 12


def test_a_block_without_a_key_is_found_by_its_own_request_alone() -> None:
    one = with_keys(num_blocks=8)
    one.add(prompt_tokens=9, output_tokens=10, keys=keys_of(10, 20), keys_follow=True)
    one.add(prompt_tokens=6, output_tokens=12, keys=keys_of(50), keys_follow=True)
    while not one.schedule().num_preempted:
        one.complete()
    one.complete()
    assert one.waiting().tolist() == [1]
    while one.num_waiting:
        advance(one)
    assert one.requests.arrays["num_hit_tokens"][1] >= 8  # its second block, which nobody told a key of


def test_a_fork_without_keys_cannot_be_forgotten_and_one_with_them_can() -> None:
    one = with_keys()
    one.add(prompt_tokens=6, output_tokens=4, keys=keys_of(10, 20))  # all that it will ever fill
    one.add(prompt_tokens=6, output_tokens=4, keys=keys_of(30), keys_follow=True)
    advance(one)
    one.fork(1, keys=keys_of(30))
    assert one.forget_done().tolist() == [0, 1, 2]
    one.fork(0)  # from now on blocks may be known by its number
    with pytest.raises(ConfigError, match="cannot be forgotten"):
        one.forget_done()


def test_keys_must_be_those_of_full_blocks_of_a_request_that_goes_on() -> None:
    one = with_keys()
    one.add(prompt_tokens=6, output_tokens=2, keys=keys_of(10), keys_follow=True)
    one.add(prompt_tokens=6, output_tokens=2, content=NO_SEGMENTS)
    with pytest.raises(ConfigError, match="needs full blocks"):
        one.add_keys(0, keys_of(20))
    with pytest.raises(ConfigError, match="keys_follow"):
        one.add_keys(1, keys_of(20))
    for _ in range(2):
        advance(one)
    with pytest.raises(ConfigError, match="not done"):
        one.add_keys(0, keys_of(20))


def test_a_text_may_end_before_its_last_token() -> None:
    one = scheduler()
    add(one, (4, 10), (4, 10))
    advance(one)
    one.schedule()
    one.end_after(0, 2)
    one.complete()
    assert one.finished.tolist() == [0]
    assert advance(one) == [(1, 1)]
    for wrong in (3, 11):
        with pytest.raises(ConfigError, match="needs 4 to 10"):
            one.end_after(1, wrong)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_whoever_is_aborted_gives_its_blocks_back_at_once(policy: str) -> None:
    one = scheduler(num_blocks=9, policy=policy)
    add(one, (8, 9), (8, 9), (30, 2), (3, 2), (20, 2))
    advance(one)
    free = one.allocator.free_slots
    one.schedule()
    with pytest.raises(ConfigError, match="within a step"):
        one.abort(0)
    one.complete()
    assert one.abort(3)
    assert one.waiting().tolist() == [2, 4]
    assert one.abort(0)
    one.check_integrity()
    assert one.allocator.free_slots == free + 8 - 4  # request 1 has taken a third block
    assert not one.abort(0)
    served = {request for _ in range(60) for request, _ in advance(one)}
    assert served == {1, 2, 4}
    assert one.allocator.free_slots == 32
