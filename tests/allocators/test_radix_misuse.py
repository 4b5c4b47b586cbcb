"""SGLang's memory as an allocator: its slots, wrong use, and damage that is noticed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from radix_requests import everything, grow, known, pool, run

from pagedkv.allocators.radix import RadixAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.slot_allocator import SlotAllocator


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_slots_are_those_of_alloc_extend_and_alloc_decode(block_size: int) -> None:
    """Blocks are taken whole, which hands out the same slots as SGLang's three phases do for one request at a time."""
    allocator, oracle = pool(30, block_size=block_size), SlotAllocator(num_blocks=30, block_size=block_size)
    requests = [KVRequest(request_id=i, num_tokens=12) for i in range(3)]
    expected: list[list[int]] = [[], [], []]
    for turn, size in enumerate([3, 5, 1, 1, 2, 1, 4, 1, 1, 1, 1, 3]):
        request, slots = requests[turn % 3], expected[turn % 3]
        seq, last = [len(slots) + size], [slots[-1] if slots else -1]
        new = oracle.alloc_decode(seq=seq, last=last) if size == 1 else oracle.alloc_extend(pre=[len(slots)], seq=seq, last=last)
        assert new is not None
        slots += new.tolist()
        assert grow(allocator, request, size) == 0
        assert allocator.slots_held(request)[: len(slots)].tolist() == slots
        assert allocator.cache.slots.free_list().tolist() == oracle.free_list().tolist()


def test_wrong_use_is_told_and_changes_nothing() -> None:
    allocator = pool(20, block_size=2, max_model_len=8, max_num_seqs=2)
    live, stranger = known(1, 2, 3), known(1, 2, 3, 4)
    run(allocator, live)
    short = KVRequest(request_id="short", num_tokens=5, token_ids=np.arange(4, dtype=np.int32))
    far = known(1, 2, 3)
    far.num_computed_tokens = 3

    def with_(request: KVRequest, change: Callable[[KVRequest], None], call: Callable[[KVRequest], object]) -> Callable[[], object]:
        def do() -> object:
            saved = (request.num_computed_tokens, request.token_ids)
            change(request)
            try:
                return call(request)
            finally:
                request.num_computed_tokens, request.token_ids = saved

        return do

    def too_far(request: KVRequest) -> None:
        request.num_computed_tokens = 5

    def too_few(request: KVRequest) -> None:
        request.token_ids = request.token_ids[:1]

    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: allocator.free(stranger), "never allocated, or was freed"),
        (lambda: allocator.preempt(stranger), "never allocated, or was freed"),
        (lambda: allocator.note_computed(stranger), "never allocated, or was freed"),
        (lambda: allocator.allocate_slots(stranger, 0), "needs 1 or more"),
        (lambda: allocator.allocate_slots(live, -1), "needs 1 or more"),
        (lambda: allocator.allocate_slots(stranger, 9), "max_model_len 8"),
        (lambda: allocator.allocate_slots(live, 6), "max_model_len 8"),
        (lambda: allocator.allocate_slots(known(*range(9)), 1), "max_model_len 8"),
        (lambda: allocator.get_computed_tokens(known()), "needs 1 or more"),
        (lambda: allocator.allocate_slots(far, 1), "set it to what is held"),
        (lambda: allocator.allocate_slots(short, 1), "4 token ids for 5 tokens"),
        (lambda: allocator.get_computed_tokens(short), "4 token ids for 5 tokens"),
        (with_(live, too_far, lambda request: allocator.allocate_slots(request, 1)), "set it to what is held"),
        (with_(live, too_far, allocator.note_computed), "set it to what is held"),
        (with_(live, too_far, allocator.free), "set it to what is held"),
        (with_(live, too_few, allocator.note_computed), "1 token ids for 2 tokens"),
        (with_(live, too_few, allocator.free), "1 token ids for 2 tokens"),
    ]
    for call, message in calls:
        before = everything(allocator)
        with pytest.raises(ConfigError, match=message):
            call()
        assert everything(allocator) == before
    grow(allocator, stranger)
    before = everything(allocator)
    with pytest.raises(ConfigError, match="raise max_num_seqs 2"):
        allocator.allocate_slots(known(9), 1)
    assert everything(allocator) == before
    allocator.free(live)
    with pytest.raises(ConfigError, match="was freed before"):
        allocator.free(live)
    with pytest.raises(ConfigError, match="needs"):
        pool(0)


def test_integrity_checks_notice_damage() -> None:
    def held(allocator: RadixAllocator) -> Any:
        return next(iter(allocator._holdings.values()))

    def point_elsewhere(allocator: RadixAllocator) -> None:
        held(allocator).table[0] += 2

    def lose_a_block(allocator: RadixAllocator) -> None:
        held(allocator).num_slots -= 2

    def lock_for_nobody(allocator: RadixAllocator) -> None:
        allocator.cache.tree.inc_lock_ref(held(allocator).node)

    def give_twice(allocator: RadixAllocator) -> None:
        held(allocator).state[:] = held(allocator).table[:2]

    for damage, message in (
        (point_elsewhere, "does not hold the prefix"),
        (lose_a_block, "lost or given twice"),
        (lock_for_nobody, "no request explains"),
        (give_twice, "lost or given twice"),
    ):
        allocator = pool(9, block_size=2, state_slots=1)
        run(allocator, known(1, 2, 3))
        allocator.check_integrity()
        damage(allocator)
        with pytest.raises(IntegrityError, match=message):
            allocator.check_integrity()
