"""Paged and contiguous allocators a step at a time, on every heap: laws of memory after each step, and exact predictions."""

import copy
from dataclasses import replace
from itertools import product
from types import MethodType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from step_allocators import MAX_MODEL_LEN, MAX_NUM_SEQS, POOL, RESERVATIONS, ContiguousOracle, PagedOracle

from pagedkv.allocation import KVPoolSettings
from pagedkv.heaps import HEAPS
from pagedkv.kv_request import KVRequest
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.step_allocation import StepAllocator, step_allocator
from pagedkv.step_batch import empty_batch


def placements() -> list[tuple[str, str]]:
    """(allocator, heap) without those that differ only in a heap that is not used."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, heap in product(("paged", *RESERVATIONS), HEAPS.names()):
        pool = KVPoolSettings(num_blocks=4, max_model_len=16, contiguous_heap=heap)
        seen.setdefault((name, step_allocator(name, pool).placement), (name, heap))
    return list(seen.values())


def state_of(thing: Any) -> Any:
    """Everything an object is made of, as plain values."""
    if isinstance(thing, np.ndarray):
        return thing.tolist()
    if isinstance(thing, tuple | list):
        return [state_of(part) for part in thing]
    if isinstance(thing, dict):
        return [(state_of(name), state_of(part)) for name, part in thing.items()]
    if isinstance(thing, KVRequest):
        return thing.request_id, thing.num_tokens, thing.num_computed_tokens, thing.admission_slots
    if isinstance(thing, MethodType):
        return thing.__name__
    return {name: state_of(part) for name, part in vars(thing).items()} if hasattr(thing, "__dict__") else thing


class AllocatorMachine(RuleBasedStateMachine):
    """Drives an allocator as a scheduler does: whoever runs grows first, then requests are admitted."""

    name: str
    heap: str

    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        watermark=st.sampled_from([0.0, 0.0, 0.1, 0.3]),
        reserve_full_isl=st.booleans(),
        state_slots=st.sampled_from([0, 0, 1, 6]),
    )
    def start(self, num_blocks: int, block_size: int, watermark: float, reserve_full_isl: bool, state_slots: int) -> None:
        self.pool = KVPoolSettings(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=MAX_NUM_SEQS,
            max_model_len=MAX_MODEL_LEN,
            contiguous_heap=self.heap,
            watermark=watermark,
            reserve_full_isl=reserve_full_isl,
            state_slots=state_slots,
        )
        self.allocator: StepAllocator = step_allocator(self.name, self.pool)
        self.oracle: Any = PagedOracle(self.pool) if self.allocator.placement == "block" else ContiguousOracle(self.pool)
        self.running: list[int] = []
        """Rows, in the order of admission."""
        self.slots: dict[int, tuple[int, int]] = {}
        """By running row: (slots in use, slots that it will need at most)."""

    @rule(
        growth=st.lists(st.integers(0, 9), min_size=MAX_NUM_SEQS, max_size=MAX_NUM_SEQS),
        arrivals=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 8), st.integers(1, 16)), max_size=3),
    )
    def step(self, growth: list[int], arrivals: list[tuple[int, int, int]]) -> None:
        batch, entries = empty_batch(MAX_NUM_SEQS), []
        for row, more in zip(self.running, growth, strict=False):
            used, most = self.slots[row]
            entries.append((row, min(used + more, most), most, 0, most))
        num_running = len(entries)
        free_rows = [row for row in range(MAX_NUM_SEQS) if row not in self.slots]
        for row, (prompt, output, chunk) in zip(free_rows, arrivals, strict=False):
            admission_slots = self.allocator.admission_slots(prompt, output)
            self.whether_it_can_ever_fit(prompt, output, admission_slots)
            if admission_slots is not None:
                entries.append((row, min(chunk, prompt), prompt, admission_slots, prompt + output - 1))
        for i, (row, slots, known, admission_slots, _) in enumerate(entries):
            batch["row"][i], batch["num_slots_needed"][i], batch["num_known_tokens"][i] = row, slots, known
            batch["num_scheduled_tokens"][i] = slots - self.slots.get(row, (0, 0))[0]
            batch["admission_slots"][i] = admission_slots

        one_by_one = copy.deepcopy(self.allocator)
        granted = self.allocator.allocate_slots(batch, 0, len(entries), num_running)

        expected = 0
        while expected < len(entries) and self.oracle.grant(batch, expected, admission=expected >= num_running):
            assert one_by_one.allocate_slots(batch, expected, expected + 1, num_running) == expected + 1
            expected += 1
        assert granted == expected
        served = state_of(one_by_one)
        assert state_of(self.allocator) == served  # a batch is its entries one by one, and ends where the first is refused
        if granted < len(entries):
            assert one_by_one.allocate_slots(batch, granted, granted + 1, num_running) == granted
            assert state_of(one_by_one) == served  # a refusal leaves no trace
        for row, slots, _, _, most in entries[:granted]:
            self.slots[row] = (slots, most)
        self.running += [entry[0] for entry in entries[num_running:granted]]

    def whether_it_can_ever_fit(self, prompt: int, output: int, admission_slots: int | None) -> None:
        if self.name in RESERVATIONS:
            reservation = RESERVATIONS[self.name](prompt, output)
            fits = HEAPS.load(self.heap)(self.pool.num_slots).reserve(reservation + self.pool.state_slots) is not None
            assert admission_slots == (reservation if fits else None)
        else:
            fits = self.oracle.blocks(prompt + output - 1) + self.oracle.blocks(self.pool.state_slots) < self.pool.num_blocks
            assert admission_slots == (0 if fits else None)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(self.running)))

    def release(self, row: int) -> None:
        self.running.remove(row)
        del self.slots[row]
        self.allocator.free(row)
        self.oracle.free(row)

    @invariant()
    def every_slot_is_held_or_free(self) -> None:
        allocator = self.allocator
        allocator.check_integrity()
        held = allocator.units_held.astype(int) * allocator.unit_slots
        state = len(self.running) * allocator.state_units * allocator.unit_slots
        assert allocator.free_slots + held.sum() + state + allocator.rounding_slots == allocator.usable_slots
        for row in range(MAX_NUM_SEQS):
            used = self.slots[row][0] if row in self.slots else 0
            assert used <= held[row]
            if self.allocator.placement == "block":
                assert held[row] < used + self.pool.block_size
        self.oracle.agrees_with(allocator)

    def teardown(self) -> None:
        for row in list(getattr(self, "running", [])):
            self.release(row)
            self.every_slot_is_held_or_free()
        if hasattr(self, "allocator"):
            assert self.allocator.free_slots == self.allocator.usable_slots


@pytest.mark.parametrize(("name", "heap"), placements())
def test_allocator_keeps_the_laws(name: str, heap: str) -> None:
    machine = type("Machine", (AllocatorMachine,), {"name": name, "heap": heap})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=25))


def test_both_kinds_of_placement_are_covered() -> None:
    assert ("paged", "block") in {(name, step_allocator(name, POOL).placement) for name, _ in placements()}
    assert {heap for name, heap in placements() if name == "contiguous-oracle"} == set(HEAPS.names())


def test_freeing_a_row_that_holds_nothing_changes_nothing() -> None:
    for name in ("paged", "contiguous-max", "vattention"):
        allocator = step_allocator(name, replace(POOL, state_slots=4, page_tokens=4))
        before = state_of(allocator)
        allocator.free(0)
        assert state_of(allocator) == before


@pytest.mark.parametrize(("prompt", "output", "slots"), [(10, 25, 42), (10, 32, 42), (10, 1, 11), (900, 120, 1000)])
def test_pow2_rounds_the_output_up_but_not_beyond_the_longest_request(prompt: int, output: int, slots: int) -> None:
    # Source of 25 -> 32: PagedAttention paper (Kwon et al., SOSP 2023), section 6.1.
    pool = KVPoolSettings(num_blocks=100, max_model_len=1000)
    assert step_allocator("contiguous-pow2", pool).admission_slots(prompt, output) == slots


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(2, 14), st.sampled_from([1, 2, 4]), st.integers(1, 30))
def test_appending_is_allocating_one_slot_more_for_each(prompts: list[int], num_blocks: int, block_size: int, steps: int) -> None:
    pool = KVPoolSettings(num_blocks=num_blocks, block_size=block_size, max_num_seqs=5, max_model_len=64, reserve_full_isl=False)
    appended, allocated = PagedStepAllocator(pool), PagedStepAllocator(pool)
    batches = []
    for allocator in (appended, allocated):
        batch = empty_batch(5)
        batch["row"] = range(5)
        batch["num_slots_needed"][: len(prompts)] = batch["num_known_tokens"][: len(prompts)] = prompts
        admitted = allocator.allocate_slots(batch, 0, len(prompts), 0)
        batches.append(batch)
    for _ in range(steps):
        served = appended.append_slots(batches[0], admitted)
        batches[1]["num_slots_needed"][:admitted] += 1
        assert allocated.allocate_slots(batches[1], 0, admitted, admitted) == served
        batches[1]["num_slots_needed"][served:admitted] -= 1
        assert state_of(appended) == state_of(allocated)
        assert batches[0].tolist() == batches[1].tolist()
        appended.check_integrity()
