"""The memory map: every slot of every allocator is in exactly one part, and each unit says who holds it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import NO_SLOT, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzzing import fuzz_owner, fuzz_settings, hybrid_layers
from pagedkv.kv_request import KVRequest
from pagedkv.sims.fuzz_command import choose_from
from pagedkv.snapshot import NOBODY, MemorySnapshot, UnitState, snapshot

POOL = KVPoolSettings(
    num_blocks=8,
    block_size=4,
    max_num_seqs=4,
    max_model_len=24,
    enable_prefix_caching=True,
    layer_groups=hybrid_layers(4),
)
FREE, CACHED, HELD, ASIDE = UnitState


def script(tokens: Any, pool: KVPoolSettings = POOL) -> Script:
    return Script.for_pool(pool, np.array(list(tokens), np.int32))


def guest(name: str, tokens: Any, *, prompt: int | None = None) -> Guest:
    said = script(tokens)
    return Guest(said, name=name, prompt_tokens=prompt or said.tokens.size, output_tokens=1)


def admit(allocator: Any, guest: Guest, num_new_tokens: int) -> KVRequest:
    request = guest.request
    request.admission_slots = allocator.admission_slots(guest.prompt_tokens, guest.output_tokens)
    grant = allocator.allocate_slots(request, num_new_tokens)
    assert grant is not None
    request.num_computed_tokens += grant.num_cached_tokens + num_new_tokens
    allocator.note_computed(request)
    return request


def test_shared_filled_unfilled_and_cached_blocks() -> None:
    """Block 0 is the null block; 1 and 2 are shared; 3 and 4 are the tails; what has ended is cached, but for its partial block."""
    allocator = ALLOCATORS.load("paged")(POOL)
    first = admit(allocator, guest("a", range(10)), 10)
    second = admit(allocator, guest("b", [*range(8), 50, 51, 52]), 1)
    now = snapshot(allocator)
    assert (now.unit_slots, now.requests) == (4, ("a", "b"))
    assert now.states.tolist() == [ASIDE, HELD, HELD, HELD, HELD, FREE, FREE, FREE]
    assert now.ref_counts.tolist() == [0, 2, 2, 1, 1, 0, 0, 0]
    assert now.owners.tolist() == [NOBODY, 0, 0, 0, 1, NOBODY, NOBODY, NOBODY]
    assert now.tokens.tolist() == [0, 4, 4, 2, 1, 0, 0, 0]
    assert now.unfilled.tolist() == [0, 0, 0, 2, 3, 0, 0, 0]
    assert [[table.tolist() for table in groups] for groups in now.tables] == [[[1, 2, 3]], [[1, 2, 4]]]
    allocator.free(first)
    allocator.free(second)
    later = snapshot(allocator)
    assert later.states.tolist() == [ASIDE, CACHED, CACHED, FREE, FREE, FREE, FREE, FREE]
    assert (later.parts.cached, later.parts.free, later.parts.tokens) == (8, 20, 0)
    assert now.states[1] == HELD  # the earlier one is its own


def test_reservations_of_a_buddy_heap_show_their_rounding() -> None:
    """A reservation for 4 + 1 tokens and 1 slot of state is rounded to 8 slots: 3 computed, 2 unfilled, 1 state, 2 rounding."""
    pool = replace(POOL, num_blocks=4, state_slots=1, enable_prefix_caching=False)
    allocator = ALLOCATORS.load("contiguous-oracle")(pool)
    admit(allocator, guest("a", range(4)), 3)
    now = snapshot(allocator)
    assert (now.unit_slots, now.unplaced_slots) == (1, 0)
    assert now.states.tolist() == [HELD] * 5 + [ASIDE] * 3 + [FREE] * 8
    parts = now.parts
    assert (parts.tokens, parts.unfilled, parts.state, parts.rounding, parts.free) == (3, 2, 1, 2, 8)
    by_four = snapshot(allocator, 4)
    assert by_four.states.tolist() == [HELD, HELD, FREE, FREE]
    assert by_four.tokens.tolist() == [3, 0, 0, 0]
    assert by_four.unfilled.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["paged", "hybrid", "contiguous-growing"])
def test_state_is_placed_where_the_pool_or_heap_tells(name: str) -> None:
    allocator = ALLOCATORS.load(name)(replace(POOL, state_slots=4, enable_prefix_caching=False))
    admit(allocator, guest("a", range(4)), 4)
    now = snapshot(allocator)
    aside = int((now.states == ASIDE).sum()) * now.unit_slots
    assert (now.unplaced_slots, aside) == (0, now.parts.state + allocator.num_slots - allocator.usable_slots)
    assert now.parts.state == 4


def test_what_is_left_over_behind_the_last_page_is_set_aside() -> None:
    allocator = ALLOCATORS.load("vattention")(replace(POOL, page_tokens=5))
    admit(allocator, guest("a", range(6)), 6)
    now = snapshot(allocator)
    assert now.states.tolist() == [HELD, HELD, FREE, FREE, FREE, FREE, ASIDE]
    assert now.tokens.tolist() == [5, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("unit_slots", [0, -1])
def test_units_need_a_size(unit_slots: int) -> None:
    with pytest.raises(ConfigError, match=f"units of {unit_slots} slots: needs 1 or more"):
        snapshot(ALLOCATORS.load("paged")(POOL), unit_slots)


def by_slot(allocator: Any) -> tuple[list[set[int]], list[bool]]:
    """Who holds each slot, and whether it is filled, one slot after the other."""
    holders: list[set[int]] = [set() for _ in range(allocator.num_slots)]
    filled = [False] * allocator.num_slots
    for i, request in enumerate(allocator.live_requests()):
        for group in range(allocator.num_groups):
            slots: Int64Array = allocator.slots_held(request, group)
            for t, slot in enumerate(slots.tolist()):
                if slot != NO_SLOT:
                    holders[slot].add(i)
                    filled[slot] |= t < request.num_computed_tokens
    return holders, filled


def check(allocator: Any, now: MemorySnapshot, holders: list[set[int]], filled: list[bool]) -> None:
    cached = set(allocator.cached_slots().tolist())
    size = now.unit_slots
    tables = [set(np.concatenate(groups).tolist()) for groups in now.tables]
    columns = (now.ref_counts, now.owners, now.tokens, now.unfilled, now.states)
    for unit, (ref_count, owner, num_tokens, unfilled, state) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        slots = range(unit * size, min((unit + 1) * size, allocator.num_slots))
        who = set().union(*(holders[slot] for slot in slots))
        tokens = sum(filled[slot] for slot in slots)
        assert ref_count == len(who)
        assert owner == min(who, default=NOBODY)
        assert num_tokens == tokens
        assert unfilled == sum(bool(holders[slot]) for slot in slots) - tokens
        assert (state == HELD) == bool(who)
        assert (state == CACHED) == (not who and not cached.isdisjoint(slots))
        assert who == {i for i, table in enumerate(tables) if unit in table}
    assert all(len(set(table.tolist())) == len(table) for groups in now.tables for table in groups)
    assert now.parts.usable == allocator.usable_slots
    assert min(now.parts.free, now.parts.unfilled, now.parts.tokens) >= 0
    free = int((now.states == FREE).sum())
    if size == 1:
        assert free - now.unplaced_slots == now.parts.free


def cases() -> list[Any]:
    return [
        pytest.param(name, pool, id=f"{name}-{i}")
        for name in ALLOCATORS.names()
        for i, pool in enumerate(fuzz_settings(name, num_slots=32, max_model_len=12, max_num_seqs=3))
        if pool.max_model_len == 12 and (pool.block_size == 4 or pool.state_slots or pool.contiguous_heap != "buddy")
    ]


@pytest.mark.parametrize(("name", "pool"), cases())
def test_every_allocator_is_mapped_slot_by_slot(name: str, pool: KVPoolSettings) -> None:
    """Against a walk over single slots, in units of its own, of one slot and of three, while random requests come and go."""
    owner, choose = fuzz_owner(name, pool), choose_from(7)
    running: list[Guest] = []
    held = 0
    for step in range(60):
        if len(running) < 3 and choose(2):
            words = [choose(2) for _ in range(12)]
            new = Guest(script(words, pool), name=step, prompt_tokens=1 + choose(11), output_tokens=1)
            if owner.arrive(new) and owner.admit(new, 1 + choose(new.prompt_tokens)):
                owner.note_computed(new)
                running.append(new)
        elif running:
            one = running[choose(len(running))]
            if one.uncomputed and choose(3):
                if owner.grow(one, 1 + choose(3)):
                    owner.note_computed(one)
            else:
                owner.free(one)
                running.remove(one)
        walked = by_slot(owner.allocator)
        for unit_slots in (None, 1, 3):
            check(owner.allocator, snapshot(owner.allocator, unit_slots), *walked)
        held += len(running)
    assert held
