"""The laws that every registered allocator keeps, after every operation, whatever its owner does.

A new allocator is covered by being registered. That the laws notice anything is shown on allocators that are broken on purpose.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pagedkv.allocation import NO_SLOT, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzz_owner import MISUSES
from pagedkv.fuzzing import FuzzFailure, fuzz, fuzz_owner, fuzz_settings
from pagedkv.kv_request import KVRequest
from pagedkv.sims.fuzz_command import choose_from

MAX_MODEL_LEN = 12
SMALL = {"num_slots": 32, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 3}
LENGTHS = st.integers(1, MAX_MODEL_LEN)
WORDS = st.lists(st.integers(0, 1), min_size=1, max_size=MAX_MODEL_LEN)
PLACES = st.integers(0, 4)


class AllocatorContract(RuleBasedStateMachine):
    """Requests come, grow, share, part and go, `FuzzOwner` holds every step to the laws. `which` counts round from the oldest."""

    name: str
    pool: KVPoolSettings

    def __init__(self) -> None:
        super().__init__()
        self.owner = fuzz_owner(self.name, self.pool)
        self.scripts: list[Script] = []
        self.waiting: list[Guest] = []
        self.arrivals = 0

    def arrival(self, script: Script, prompt: int) -> Guest | None:
        prompt = min(prompt, script.tokens.size)
        output = min(script.tokens.size + 1, MAX_MODEL_LEN) - prompt
        guest = Guest(script, name=self.arrivals, prompt_tokens=prompt, output_tokens=max(output, 1))
        self.arrivals += 1
        self.scripts.append(script)
        return guest if self.owner.arrive(guest) else None

    def script(self, tokens: Sequence[int], namespace: str, *, private: bool) -> Script:
        return Script.for_pool(self.pool, np.array(tokens, np.int32), namespace=namespace, private=private)

    def wait(self, guest: Guest | None) -> None:
        if guest is not None:
            self.waiting.append(guest)

    @rule(words=WORDS, prompt=LENGTHS, tenant=st.booleans(), private=st.booleans())
    def arrive(self, words: list[int], prompt: int, tenant: bool, private: bool) -> None:
        namespace = f"private {self.arrivals}" if private else "tenant" if tenant else ""
        self.wait(self.arrival(self.script(words, namespace, private=private), prompt))

    @precondition(lambda self: self.scripts)
    @rule(which=PLACES, same=LENGTHS, words=WORDS, prompt=LENGTHS)
    def arrive_with_a_known_prefix(self, which: int, same: int, words: list[int], prompt: int) -> None:
        like = self.scripts[which % len(self.scripts)]
        tokens = [*like.tokens[:same].tolist(), *words][:MAX_MODEL_LEN]
        self.wait(self.arrival(self.script(tokens, like.namespace, private=like.private), prompt))

    @precondition(lambda self: self.waiting and len(self.owner.running) < self.pool.max_num_seqs)
    @rule(which=PLACES, most=LENGTHS, has_scheduled_reqs=st.booleans())
    def admit(self, which: int, most: int, has_scheduled_reqs: bool) -> None:
        guest = self.waiting[which % len(self.waiting)]
        if self.owner.admit(guest, most, has_scheduled_reqs=has_scheduled_reqs):
            self.waiting.remove(guest)

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES, most=LENGTHS)
    def grow(self, which: int, most: int) -> None:
        guest = self.running(which)
        if not guest.uncomputed:
            guest.know(min(guest.request.num_tokens + most, guest.last))
        if guest.uncomputed:
            self.owner.grow(guest, most)

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES)
    def note_computed(self, which: int) -> None:
        self.owner.note_computed(self.running(which))

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES)
    def free(self, which: int) -> None:
        self.owner.free(self.running(which))

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES)
    def preempt(self, which: int) -> None:
        guest = self.running(which)
        self.owner.preempt(guest)
        self.waiting.append(guest)

    @precondition(lambda self: self.owner.running and self.owner.can_fork)
    @rule(which=PLACES, words=WORDS)
    def fork(self, which: int, words: list[int]) -> None:
        parent = self.running(which)
        known, old = parent.request.num_tokens, parent.script
        tokens = [*old.tokens[:known].tolist(), *words][: max(known, MAX_MODEL_LEN - 1)]
        child = self.arrival(self.script(tokens, old.namespace, private=old.private), known)
        if child is not None:
            self.owner.fork(parent, child)

    @precondition(lambda self: self.waiting or self.owner.running)
    @rule(which=PLACES, data=st.data())
    def misuse(self, which: int, data: st.DataObject) -> None:
        guests = [*self.waiting, *self.owner.running]
        guest = guests[which % len(guests)]
        possible = [kind for kind in MISUSES if self.owner.misuse_call(kind, guest) is not None]
        self.owner.misuse(data.draw(st.sampled_from(possible), label="kind"), guest)

    def running(self, which: int) -> Guest:
        return self.owner.running[which % len(self.owner.running)]

    def teardown(self) -> None:
        """Whoever waits can be served to its end once nobody else is there, whatever is cached."""
        if sys.exc_info()[0] is not None:  # a rule has failed: that is the message
            return
        while self.owner.running:
            self.owner.free(self.owner.running[-1])
        for guest in self.waiting:
            self.owner.admit(guest, MAX_MODEL_LEN)
            while guest.request.num_computed_tokens < guest.last:
                guest.know(min(guest.request.num_computed_tokens + 1, guest.last))
                self.owner.grow(guest, 1)
            self.owner.free(guest)


def run(name: str, pool: KVPoolSettings, *, examples: int, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    machine = type("Machine", (AllocatorContract,), {"name": name, "pool": pool})
    how = settings(max_examples=examples, stateful_step_count=25, report_multiple_bugs=False, phases=phases)
    run_state_machine_as_test(machine, settings=how)


def cases() -> list[Any]:
    """Every registered allocator on every small pool that concerns it."""
    return [
        pytest.param(name, pool, id=f"{name}-{i}")
        for name in ALLOCATORS.names()
        for i, pool in enumerate(fuzz_settings(name, **SMALL))
        if pool.max_model_len == MAX_MODEL_LEN and (pool.enable_prefix_caching or pool.block_size == 2)
    ]


@pytest.mark.parametrize(("name", "pool"), cases())
def test_allocator_keeps_its_contract(name: str, pool: KVPoolSettings) -> None:
    run(name, pool, examples=12)


def toy_allocator() -> Any:
    """The example of docs/examples."""
    file = Path(__file__).parents[2] / "docs" / "examples" / "toy_allocator.py"
    spec = importlib.util.spec_from_file_location("toy_allocator", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ToyAllocator


Toy: Any = toy_allocator()


class KeepingToy(Toy):
    """Keeps in its free areas what was computed there, and gives a request the area that holds most of its prefix."""

    def __init__(self, settings: KVPoolSettings) -> None:
        super().__init__(settings)
        self.caching = settings.enable_prefix_caching
        self.kept: dict[int, tuple[str, list[int]]] = {}

    def common(self, request: KVRequest, namespace: str, tokens: list[int]) -> int:
        """Leading tokens of `request` that an area holds."""
        own = request.token_ids.tolist()
        same = [a == b for a, b in zip(own, tokens, strict=False)]
        return 0 if namespace != request.namespace else min([*same, False].index(False), request.num_tokens - 1)

    def best(self, request: KVRequest) -> tuple[int, int | None]:
        """Tokens found in the best free area, and that area."""
        if request in self.areas or not self.free_areas:
            return 0, None
        return max((self.common(request, *self.kept.get(area, ("", []))), area) for area in self.free_areas)

    def get_computed_tokens(self, request: KVRequest) -> int:
        return self.best(request)[0]

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        hit, area = self.best(request)
        before = list(self.free_areas)
        if area is not None:
            self.free_areas.remove(area)
            self.free_areas.append(area)
        try:
            grant = super().allocate_slots(request, num_new_tokens)
        except ConfigError:
            self.free_areas = before
            raise
        if grant is None or area is None:
            return grant
        self.kept.pop(area, None)
        return Grant(num_cached_tokens=hit)

    def free(self, request: KVRequest) -> None:
        area = self.areas.get(request)
        super().free(request)
        if self.caching:
            self.kept[area] = (request.namespace, request.token_ids[: request.num_computed_tokens].tolist())

    def cached_slots(self) -> Int64Array:
        kept = [np.arange(len(tokens)) + area * self.unit_slots for area, (_, tokens) in self.kept.items()]
        return np.concatenate(kept) if kept else super().cached_slots()

    @property
    def num_cached_slots(self) -> int:
        return self.cached_slots().size


class GivesASlotTwice(Toy):
    """The last slot of an area is the first of the next."""

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        return np.arange(self.num_slots_held(request)) + self.areas.get(request, 0) * (self.unit_slots - 1)


class HitsAnotherPrefix(KeepingToy):
    """Takes what is as long for what is the same."""

    def common(self, request: KVRequest, namespace: str, tokens: list[int]) -> int:
        return min(len(tokens), request.token_ids.size, request.num_tokens - 1)


class HitsAnotherTenant(KeepingToy):
    def common(self, request: KVRequest, namespace: str, tokens: list[int]) -> int:
        return super().common(request, request.namespace, tokens)


class HitsAllTokens(KeepingToy):
    def common(self, request: KVRequest, namespace: str, tokens: list[int]) -> int:
        hit = super().common(request, namespace, tokens)
        return hit + 1 if hit and request.token_ids.tolist() == tokens[: request.num_tokens] else hit


class SharesUnasked(KeepingToy):
    """Keeps prefixes though the settings say not to."""

    def __init__(self, settings: KVPoolSettings) -> None:
        super().__init__(settings)
        self.caching = True


class KeepsWhatWasNeverComputed(KeepingToy):
    """Offers all that a request knew, computed or not."""

    def free(self, request: KVRequest) -> None:
        area = self.areas.get(request)
        super().free(request)
        if self.caching:
            self.kept[area] = (request.namespace, request.token_ids.tolist())


class KeepsWhatItOverwrites(KeepingToy):
    """Its next occupant writes over what it goes on offering."""

    def free(self, request: KVRequest) -> None:
        old = self.kept.get(self.areas.get(request))
        super().free(request)
        if old is not None:
            self.kept[self.free_areas[-1]] = old

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        kept = dict(self.kept)
        grant = super().allocate_slots(request, num_new_tokens)
        self.kept = kept
        return grant

    def cached_slots(self) -> Int64Array:
        return np.empty(0, np.int64)


class MiscountsWhatItKeeps(KeepingToy):
    """Says that it has kept one area more than it has, from the second on."""

    @property
    def num_cached_slots(self) -> int:
        return super().num_cached_slots + (len(self.kept) > 1)


class LosesSlots(Toy):
    """Has no slot for the first token of a long request."""

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        slots = super().slots_held(request)
        slots[: request.num_computed_tokens > 5] = NO_SLOT
        return slots


class ForgetsToFree(Toy):
    def free(self, request: KVRequest) -> None:
        super().free(request)
        if request.num_computed_tokens == 3:
            self.free_areas.pop()

    def check_integrity(self) -> None:
        pass


class ChangesOnRefusal(Toy):
    """Counts what did not fit."""

    def __init__(self, settings: KVPoolSettings) -> None:
        super().__init__(settings)
        self.refused = 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        grant = super().allocate_slots(request, num_new_tokens)
        if grant is None:
            self.refused += 1
        return grant


class FreesTwice(Toy):
    def free(self, request: KVRequest) -> None:
        if request in self.areas:
            super().free(request)


class ForgetsOnAnError(Toy):
    """Gives everything back before it says that a number is wrong."""

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        if num_new_tokens < 1 and request in self.areas:
            self.free(request)
        return super().allocate_slots(request, num_new_tokens)


class RefusesTheLonely(Toy):
    """Leaves a place free that nobody will ever need."""

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        grant = super().allocate_slots(request, num_new_tokens)
        if grant is not None and request.num_tokens >= MAX_MODEL_LEN - 1 and not request.num_computed_tokens:
            super().free(request)
            return None
        return grant


class MovesWithoutCopying(Toy):
    """Moves a request to another area when it grows to seven tokens, and leaves its content behind."""

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        grant = super().allocate_slots(request, num_new_tokens)
        if (
            grant is not None
            and 0 < request.num_computed_tokens < 7 <= request.num_computed_tokens + num_new_tokens
            and self.free_areas
        ):
            self.free_areas.insert(0, self.areas[request])
            self.areas[request] = self.free_areas.pop()
        return grant


class MovesAndCopies(MovesWithoutCopying):
    """As it should be."""

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        before = self.slots_held(request)
        grant = super().allocate_slots(request, num_new_tokens)
        if grant is None or not before.size or (before == self.slots_held(request)).all():
            return grant
        return Grant(copies=np.stack((before, self.slots_held(request)), axis=1))


BROKEN = {
    GivesASlotTwice: "usable ones",
    HitsAnotherPrefix: "holds something else",
    HitsAnotherTenant: "holds something else",
    HitsAllTokens: "tokens cached",
    SharesUnasked: "tokens cached",
    KeepsWhatWasNeverComputed: "holds something else",
    KeepsWhatItOverwrites: "holds something else",
    MiscountsWhatItKeeps: "the allocator counts",
    LosesSlots: "holds something else|one that is none",
    ForgetsToFree: "usable ones|was refused",
    ChangesOnRefusal: "changed the state, near 'refused'",
    FreesTwice: "of nothing",
    ForgetsOnAnError: "changed the state, near '(areas|free_areas|free_slots)'",
    RefusesTheLonely: "was refused",
    MovesWithoutCopying: "holds something else",
}
"""Allocators with one fault each, and what must be said of it."""


@pytest.mark.parametrize("kind", [Toy, KeepingToy, MovesAndCopies])
def test_correct_toys_are_accepted(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS._registered, "toy", kind)
    for pool in fuzz_settings("toy", **SMALL)[:4]:
        run("toy", pool, examples=30)
        fuzz("toy", pool, choose_from(1), ops=3000, seed=1)


def pool_for(kind: Any) -> KVPoolSettings:
    return KVPoolSettings(
        num_blocks=32, block_size=1, max_model_len=MAX_MODEL_LEN, max_num_seqs=3, enable_prefix_caching=kind is not SharesUnasked
    )


def broken() -> list[Any]:
    return [pytest.param(kind, message, id=kind.__name__) for kind, message in BROKEN.items()]


@pytest.mark.parametrize(("kind", "message"), broken())
def test_a_broken_allocator_is_caught(kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS._registered, "broken", kind)
    with pytest.raises(IntegrityError, match=message):
        run("broken", pool_for(kind), examples=1000, phases=(Phase.generate,))


@pytest.mark.parametrize(("kind", "message"), broken())
def test_a_broken_allocator_is_caught_by_fuzzing(kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS._registered, "broken", kind)
    with pytest.raises(FuzzFailure, match=message):
        fuzz("broken", pool_for(kind), choose_from(1), ops=20_000, seed=1)
