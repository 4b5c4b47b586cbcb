"""Forks under the scheduler: whoever writes where, each request finds its own tokens in its blocks, and all blocks come back."""

import numpy as np
import pytest
from forking import BLOCK, MODELS, Forking, decode
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.content import shared_segments
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "fork", "fork", "take over", "step", "step", "held step", "abort"]), st.integers(0, 2**16)),
    max_size=60,
)


@given(
    operations=OPERATIONS,
    caches=st.booleans(),
    drafts=st.sampled_from([0, 0, 3]),
    policy=st.sampled_from(["fcfs", "priority"]),
    num_blocks=st.integers(17, 40),
    model=st.sampled_from(sorted(MODELS)),
)
@settings(max_examples=150, deadline=None)
def test_each_request_reads_its_own_tokens(
    operations: list[tuple[str, int]], *, caches: bool, drafts: int, policy: str, num_blocks: int, model: str
) -> None:
    one = Forking.of(num_blocks=num_blocks, caches=caches, drafts=drafts, policy=policy, model=model)
    for kind, number in operations:
        forkable = one.decoding()
        if kind == "add":
            one.add([number % 3] * (1 + number % 19), 1 + number % 23, priority=number % 3)
        elif kind == "fork" and forkable:
            one.fork(forkable[number % len(forkable)])
        elif kind == "take over" and forkable:
            parent = forkable[number % len(forkable)]
            known = one.scheduler.requests.arrays
            names = ["prompt_tokens", "output_tokens", "num_known_tokens"]
            alike = [i for i in forkable if i != parent and all(known[name][i] == known[name][parent] for name in names)]
            if alike:
                one.take_over(alike[number % len(alike)], parent)
        elif kind == "step":
            one.step()
        elif kind == "held step":
            one.step(held=0.5)
        elif kind == "abort" and one.chains:
            one.scheduler.abort(number % one.scheduler.requests.size)
            one.check()
    one.finish()


@pytest.mark.parametrize("caches", [True, False])
def test_all_but_the_last_of_those_who_share_a_tail_copy_it(*, caches: bool) -> None:
    one = Forking.of(caches=caches)
    parent = decode(one, 10)  # two blocks and a half
    children = [one.fork(parent) for _ in range(3)]
    assert one.allocator.free_slots == one.allocator.usable_slots - 3 * BLOCK
    for name in ("num_computed_tokens", "num_cached_tokens", "num_hit_tokens"):  # what it finds is what a cache would have given
        assert one.scheduler.requests.arrays[name][children].tolist() == [10] * 3
    one.step()
    assert one.allocator.copies.shape == (3, 2)
    assert one.allocator.free_slots == one.allocator.usable_slots - (2 + 4) * BLOCK
    one.step()
    assert not one.allocator.copies.size
    one.finish()


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("steps_before", [0, 8])
def test_all_rows_may_copy_in_all_groups_at_once(model: str, steps_before: int) -> None:
    one = Forking.of(model=model, num_blocks=90)
    parent = decode(one, 10)
    for _ in range(steps_before):  # windows leave blocks behind
        one.step()
    for _ in range(5):
        one.fork(parent)
    one.step()
    assert one.allocator.copies.shape == (5 * len(one.rules), 2)
    one.finish()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_who_takes_a_new_block_copies_nothing_whatever_lay_there_in_the_table(model: str) -> None:
    one = Forking.of(caches=False, model=model)
    one.scheduler.abort(decode(one, 19))  # leaves block numbers in the row
    one.add([1] * (2 * BLOCK - 1), 20)
    parent = decode(one, 2 * BLOCK + 2)
    for _ in range(2):
        one.fork(parent)
    for _ in range(2 * BLOCK):
        one.step()
    one.finish()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_who_takes_over_full_blocks_holds_no_more_than_these(model: str) -> None:
    one = Forking.of(model=model)
    parent = decode(one, 2 * BLOCK)
    child = one.fork(parent)
    held = one.allocator.free_slots
    one.take_over(child, parent)
    assert one.allocator.free_slots == held
    one.finish()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_tail_that_a_held_step_has_filled_is_not_what_its_fork_will_write(model: str) -> None:
    one = Forking.of(model=model)
    parent = decode(one, BLOCK - 1)  # the next token fills the block, which is keyed with it
    one.step(held=1.0)
    while one.chains[(child := one.fork(parent))].token_ids[-1] == one.chains[parent].token_ids[-1]:
        one.scheduler.abort(child)
    one.step()
    assert one.allocator.copies.size
    one.finish()


def test_a_tail_is_copied_in_each_group_that_writes_to_it() -> None:
    one = Forking.of(model="longer blocks of a window")  # 4 tokens a block, and 8 a block of the window's
    one.fork(decode(one, 12))  # three full blocks; of the window's one and a half, of which the half is read
    one.step()
    assert one.allocator.copies.shape == (1, 2)
    blocks_of_all, blocks_of_window = 3 + 2, 2
    held = (one.allocator.usable_slots - one.allocator.free_slots) // one.allocator.unit_slots
    assert held == blocks_of_all + blocks_of_window
    one.finish()


def test_forks_hold_a_window_until_the_last_of_them_has_left_it() -> None:
    one = Forking.of(model="windows alone", caches=False)
    parent = decode(one, 12, 30)
    child = one.fork(parent)
    for _ in range(20):
        one.step()
    held = (one.allocator.usable_slots - one.allocator.free_slots) // BLOCK
    assert held == 2 * len(range(31 - 9 + 1, 33, BLOCK))
    one.scheduler.abort(child)
    assert (one.allocator.usable_slots - one.allocator.free_slots) // BLOCK == held // 2
    one.finish()


def test_a_full_tail_is_shared_for_good() -> None:
    one = Forking.of()
    parent = decode(one, 12)
    one.fork(parent)
    one.step()
    assert not one.allocator.copies.size
    assert one.allocator.free_slots == one.allocator.usable_slots - (3 + 2) * BLOCK
    one.finish()


def test_a_fork_that_finds_no_row_waits_in_front_and_finds_what_was_full() -> None:
    one = Forking.of(rows=2)
    parent = decode(one, 10, 9)
    one.fork(parent)
    late = one.fork(parent)
    other = one.add([9] * 5, 3)
    assert one.scheduler.waiting().tolist() == [late, other]
    one.finish()
    known = one.scheduler.requests.arrays
    assert known["num_cached_tokens"][late] == 8
    assert (known["num_known_tokens"][:4] == [19, 19, 19, 8]).all()


def test_a_held_request_gets_its_token_when_it_is_held_no_more() -> None:
    one = Forking.of()
    request = decode(one, 7, 8)
    known = one.scheduler.requests.arrays
    for held, gained in ((1.0, 1), (1.0, 1), (0.0, 2)):
        one.step(held=held)
        assert known["num_known_tokens"][request] - 7 == gained
        assert known["num_computed_tokens"][request] == known["num_known_tokens"][request] - 1
        assert one.scheduler.sampled.tolist() == ([request] if held == 0 else [])
    one.finish()


def test_misuse_says_what_works_and_changes_nothing() -> None:
    one = Forking.of()
    request = one.add([1] * 5, 4)
    assert request is not None
    with pytest.raises(ConfigError, match="needs one that decodes"):
        one.scheduler.fork(request, keys=one.chains[request].keys)
    parent, other = decode(one, 10), one.add([2] * 3, 9)
    assert other is not None
    keys = one.chains[parent].keys
    before = one.allocator.free_slots
    for wrong, message in (
        (lambda: one.scheduler.fork(parent), "no keys for a fork"),
        (lambda: one.scheduler.fork(parent, keys=np.concatenate((keys, keys))), "4 keys for a fork of request"),
        (lambda: one.scheduler.take_over(parent, parent, keys=keys), "cannot go on from"),
        (lambda: one.scheduler.take_over(other, parent, keys=keys), "needs one that decodes"),
        (lambda: one.scheduler.fork(99, keys=keys), "needs one that decodes"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()
        assert one.allocator.free_slots == before
    one.scheduler.schedule()
    with pytest.raises(ConfigError, match="between steps"):
        one.scheduler.fork(parent, keys=keys)


def test_who_lacks_the_last_token_of_its_prompt_cannot_be_forked() -> None:
    one = Forking.of()
    request = one.add(list(range(25)), 4)
    assert request is not None
    one.step()  # of 24 tokens
    with pytest.raises(ConfigError, match="needs one that decodes"):
        one.fork(request)
    one.finish()


def test_who_has_keys_and_who_is_known_by_its_number_do_not_take_each_other_over() -> None:
    one = Forking.of()
    known_by_keys = one.add([1] * BLOCK, 9)
    known_by_number = one.scheduler.add(prompt_tokens=BLOCK, output_tokens=9)
    assert known_by_keys is not None
    assert known_by_number is not None
    one.scheduler.schedule()
    one.scheduler.complete()
    one.chains[known_by_keys].extend([1])
    for request, parent in ((known_by_keys, known_by_number), (known_by_number, known_by_keys)):
        with pytest.raises(ConfigError, match="cannot go on from"):
            one.scheduler.take_over(request, parent, keys=one.chains[known_by_keys].keys)


@pytest.mark.parametrize("caches", [True, False])
def test_who_is_known_by_its_number_cannot_become_another_text_where_prefixes_are_kept(*, caches: bool) -> None:
    one = Forking.of(caches=caches).scheduler
    prompt = shared_segments(np.array([5]), np.array([2 * BLOCK]))
    parent = one.add(prompt_tokens=2 * BLOCK, output_tokens=20, content=prompt)
    assert parent is not None
    one.schedule()
    one.complete()
    child = one.fork(parent, content=prompt)
    for _ in range(BLOCK + 2):  # a block of its own is full
        one.schedule()
        one.complete()
    if caches:  # or it would come back from a preemption to that block
        with pytest.raises(ConfigError, match="known by its number"):
            one.take_over(child, parent)
    else:
        one.take_over(child, parent)
    one.check_integrity()


def test_a_state_cannot_be_shared() -> None:
    pool = KVPoolSettings(num_blocks=30, block_size=BLOCK, max_num_seqs=4, max_model_len=60, state_slots=BLOCK)
    one = Forking(
        Scheduler(SchedulerSettings(max_num_seqs=4, max_model_len=60), PagedStepAllocator(pool)), np.random.default_rng(0)
    )
    parent = decode(one, 5)
    with pytest.raises(ConfigError, match="without"):
        one.scheduler.fork(parent)
