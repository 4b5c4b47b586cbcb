"""Every registered heap, step by step against a plain-Python oracle that knows only which intervals are taken."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.heaps import HEAPS, Heap
from pagedkv.heaps.buddy import BuddyHeap
from pagedkv.heaps.first_fit import FirstFitHeap

MOST_SLOTS = 48


class Oracle:
    """A heap that takes exactly what is asked for, anywhere. `taken` maps the first slot of each reservation to its size."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.taken: dict[int, int] = {}

    def rounded(self, size: int) -> int:
        return size

    def taken_slots(self) -> list[int]:
        return [slot for first, size in self.taken.items() for slot in range(first, first + size)]

    def free_slots(self) -> int:
        return self.num_slots - len(self.taken_slots())

    def places(self, size: int) -> set[int]:
        """Where a reservation of `size` may lie now: None must come back exactly when this is empty."""
        taken = set(self.taken_slots())
        return {a for a in range(self.num_slots - size + 1) if taken.isdisjoint(range(a, a + size))}


class FirstFitOracle(Oracle):
    def places(self, size: int) -> set[int]:
        return set(sorted(super().places(size))[:1])


class BuddyOracle(Oracle):
    def rounded(self, size: int) -> int:
        return next(1 << k for k in range(64) if 1 << k >= size)

    def places(self, size: int) -> set[int]:
        """Any free extent of the smallest size that will do."""
        extents = [(length, start) for start, length in self.free_extents() if length >= self.rounded(size)]
        return {start for length, start in extents if length == min(extents)[0]}

    def free_extents(self) -> Iterator[tuple[int, int]]:
        """The powers of two of num_slots, largest first, each cut in halves as far as its reservations need."""
        start = 0
        for size in sorted((2**k for k in range(64) if self.num_slots & 2**k), reverse=True):
            yield from self._free_in(start, size)
            start += size

    def _free_in(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        inside = [a for a in self.taken if start <= a < start + size]
        if not inside:
            yield start, size
        elif self.taken.get(start) != size:
            yield from self._free_in(start, size // 2)
            yield from self._free_in(start + size // 2, size // 2)


ORACLES: dict[str, type[Oracle]] = {"first-fit": FirstFitOracle, "buddy": BuddyOracle}
"""Heaps that say where they place. Any other must place exact sizes wherever they fit."""


def state_of(thing: Any) -> Any:
    """Everything an object is made of, as plain values."""
    if isinstance(thing, np.ndarray):
        return thing.tolist()
    if isinstance(thing, tuple):
        return [state_of(part) for part in thing]
    return {name: state_of(part) for name, part in vars(thing).items()} if hasattr(thing, "__dict__") else thing


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fill(heap: Heap) -> list[tuple[int, int]]:
    """Take everything, the largest first; return (address, size)."""
    got = []
    for size in range(heap.largest_reservation, 0, -1):
        while (address := heap.reserve(size)) is not None:
            got.append((address, size))
    return got


class HeapMachine(RuleBasedStateMachine):
    name: str

    @initialize(num_slots=st.integers(1, MOST_SLOTS))
    def start(self, num_slots: int) -> None:
        self.heap = HEAPS.load(self.name)(num_slots)
        self.oracle = ORACLES.get(self.name, Oracle)(num_slots)

    @rule(size=st.integers(1, 4) | st.integers(1, MOST_SLOTS + 2))
    def reserve(self, size: int) -> None:
        places, before = self.oracle.places(size), state_of(self.heap)
        address = self.heap.reserve(size)
        if address is None:
            assert not places
            assert state_of(self.heap) == before
        else:
            assert address in places
            self.oracle.taken[address] = self.oracle.rounded(size)

    @precondition(lambda self: self.oracle.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.oracle.taken)))
        self.heap.release(address)
        del self.oracle.taken[address]

    @rule(address=st.integers(-2, MOST_SLOTS + 2))
    def release_what_nobody_reserved(self, address: int) -> None:
        if address not in self.oracle.taken:
            self.refused(lambda: self.heap.release(address))

    @rule(size=st.integers(-2, 0))
    def reserve_nothing(self, size: int) -> None:
        self.refused(lambda: self.heap.reserve(size))

    def refused(self, call: Callable[[], object]) -> None:
        before = state_of(self.heap)
        with pytest.raises(ConfigError):
            call()
        assert state_of(self.heap) == before

    @invariant()
    def agrees(self) -> None:
        with time_limit(2.0):  # a corrupt list may have no end
            self.heap.check_integrity()
        taken = self.oracle.taken_slots()
        assert len(set(taken)) == len(taken)
        assert all(0 <= slot < self.heap.num_slots for slot in taken)
        assert self.heap.free_slots == self.oracle.free_slots()

    def teardown(self) -> None:
        if not hasattr(self, "heap"):
            return
        for address in list(self.oracle.taken):
            self.heap.release(address)
        self.heap.check_integrity()
        assert self.heap.free_slots == self.heap.num_slots
        assert fill(self.heap) == fill(HEAPS.load(self.name)(self.heap.num_slots))  # as if nothing had been


@pytest.mark.parametrize("name", HEAPS.names())
def test_heap_agrees_with_its_oracle(name: str) -> None:
    machine = type("Machine", (HeapMachine,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=60))


@pytest.mark.parametrize("name", HEAPS.names())
@pytest.mark.parametrize("num_slots", [1, 2, 7, 12, 16, 100])
def test_largest_reservation_is_the_largest_that_fits_an_empty_heap(name: str, num_slots: int) -> None:
    heap = HEAPS.load(name)(num_slots)
    assert heap.reserve(heap.largest_reservation + 1) is None
    assert heap.reserve(heap.largest_reservation) == 0
    assert heap.free_slots == num_slots - heap.rounded(heap.largest_reservation)


@pytest.mark.parametrize("name", HEAPS.names())
def test_a_heap_of_many_small_pieces(name: str) -> None:
    heap = HEAPS.load(name)(1000)
    addresses = [heap.reserve(1) for _ in range(1000)]
    assert sorted(a for a in addresses if a is not None) == list(range(1000))
    for address in range(0, 1000, 2):
        heap.release(address)
    heap.check_integrity()
    assert heap.free_slots == 500
    assert heap.reserve(2) is None  # half is free, in pieces of 1
    for address in range(1, 1000, 2):
        heap.release(address)
    assert heap.reserve(heap.largest_reservation) == 0


@pytest.mark.parametrize("name", HEAPS.names())
def test_a_heap_needs_a_slot(name: str) -> None:
    with pytest.raises(ConfigError, match="0 slots"):
        HEAPS.load(name)(0)


@pytest.mark.parametrize(
    ("column", "at", "value"),
    [
        pytest.param("free_order", 8, 2, id="free extent too small"),
        pytest.param("free_order", 8, -1, id="free extent forgotten"),
        pytest.param("free_order", 10, 0, id="free extent inside another"),
        pytest.param("taken_order", 16, -1, id="reservation forgotten"),
        pytest.param("taken_order", 16, 1, id="reservation too large"),
        pytest.param("taken_order", 8, 3, id="free and reserved"),
        pytest.param("first", 3, -1, id="list lost its only extent"),
        pytest.param("first", 1, 17, id="extent in the list of another order"),
        pytest.param("free_slots", 0, 5, id="wrong count"),
        pytest.param("prev_free", 4, 18, id="wrong back link"),
        pytest.param("next_free", 4, 20, id="list that bites its tail"),
        pytest.param("next_free", 4, 24, id="link out of the heap"),
        pytest.param("taken_order", 16, -2, id="impossible order"),
    ],
)
def test_buddy_notices_corruption(column: str, at: int, value: int) -> None:
    heap = BuddyHeap(24)
    assert [heap.reserve(1), heap.reserve(4), heap.reserve(3)] == [16, 20, 0]
    heap.release(20)  # free: 1 at 17, 2 at 18, then 4 at 20 and at 4 in this order, 8 at 8
    heap.check_integrity()
    getattr(heap.arrays, column)[at] = value
    with time_limit(1.0), pytest.raises(IntegrityError):
        heap.check_integrity()


def test_buddy_notices_buddies_that_did_not_merge() -> None:
    heap = BuddyHeap(2)
    heap.arrays.free_order[:] = 0
    heap.arrays.first[:] = [0, -1]
    heap.arrays.next_free[:] = [1, -1]
    heap.arrays.prev_free[:] = [-1, 0]
    with pytest.raises(IntegrityError, match=r"free buddies \[0, 1\]"):
        heap.check_integrity()


@pytest.mark.parametrize(
    ("free", "taken"),
    [
        pytest.param([(0, 3), (6, 4)], [(2, 2), (4, 2)], id="free extent too long"),
        pytest.param([(0, 2), (7, 4)], [(2, 2), (4, 2)], id="free extent moved"),
        pytest.param([(0, 2)], [(2, 2), (4, 2)], id="free extent forgotten"),
        pytest.param([(0, 2), (6, 4)], [(2, 1), (4, 2)], id="reservation too short"),
        pytest.param([(0, 2), (6, 4)], [(2, 2)], id="reservation forgotten"),
        pytest.param([(0, 2), (6, 4)], [(2, 4), (6, 4)], id="free and reserved"),
        pytest.param([(0, 5), (5, 5)], [], id="free neighbours not merged"),
        pytest.param([(0, 2), (2, 0), (6, 4)], [(2, 2), (4, 2)], id="empty extent"),
        pytest.param([(6, 4), (0, 2)], [(2, 2), (4, 2)], id="extents out of order"),
        pytest.param([(0, 2), (6, 4), (6, 4)], [(2, 2), (4, 2)], id="extent twice"),
    ],
)
def test_first_fit_notices_corruption(free: list[tuple[int, int]], taken: list[tuple[int, int]]) -> None:
    heap = FirstFitHeap(10)
    for extents, wrong in ((heap.arrays.free, free), (heap.arrays.taken, taken)):
        extents.used[0] = len(wrong)
        for i, (start, size) in enumerate(wrong):
            extents.start[i], extents.size[i] = start, size
    with pytest.raises(IntegrityError):
        heap.check_integrity()
