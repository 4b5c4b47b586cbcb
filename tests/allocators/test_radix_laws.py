"""SGLang's memory as an allocator: random requests against a memory that knows every prefix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from radix_requests import everything

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.radix import RadixAllocator
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.kv_request import KVRequest
from pagedkv.radix_rules import RadixCacheRules, UnifiedRules

MAX_MODEL_LEN = 14
Prefix = tuple[str, tuple[int, ...]]


@dataclass(eq=False)
class Guest:
    """A request with all it will ever say."""

    request: KVRequest
    script: list[int]
    private: bool

    def identity(self, position: int) -> Prefix:
        """Its prefix up to a token, which nobody shares if it is private."""
        return (f"{id(self)}" if self.private else self.request.namespace, tuple(self.script[: position + 1]))

    def know(self, num_tokens: int) -> None:
        self.request.num_tokens = num_tokens
        if not self.private:
            self.request.token_ids = np.array(self.script[:num_tokens], np.int32)


class RadixMachine(RuleBasedStateMachine):
    """Requests with few different tokens in a small pool. `memory` holds, by slot, the prefix that was computed into it last."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        slots=st.integers(8, 40),
        eviction=st.sampled_from(EVICTION_POLICIES.names()),
        rules=st.sampled_from([UnifiedRules, RadixCacheRules]),
        watermark=st.sampled_from([0.0, 0.2]),
        reserve_full_isl=st.booleans(),
        state_slots=st.sampled_from([0, 0, 1]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(
        self,
        block_size: int,
        slots: int,
        eviction: str,
        rules: Callable[[], Any],
        watermark: float,
        reserve_full_isl: bool,
        state_slots: int,
        caching: bool,
    ) -> None:
        self.settings = KVPoolSettings(
            num_blocks=slots // block_size + 1,
            block_size=block_size,
            max_num_seqs=4,
            max_model_len=MAX_MODEL_LEN,
            watermark=watermark,
            reserve_full_isl=reserve_full_isl,
            state_slots=state_slots,
            enable_prefix_caching=caching,
            eviction=eviction,
        )
        self.allocator = RadixAllocator(self.settings, rules=rules())
        self.memory: dict[int, Prefix] = {}
        self.waiting: list[Guest] = []
        self.running: list[Guest] = []

    def whole(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size) * self.settings.block_size

    def stored(self) -> list[Prefix]:
        """The prefixes whose last token the tree has."""
        return [self.memory[slot] for node in self.allocator.cache.tree.root.below() for slot in node.slots.tolist()]

    def expected_hit(self, guest: Guest) -> int:
        """The longest run of whole blocks, short of the last token, that the memory says the tree has."""
        stored, hit = set(self.stored()), 0
        if guest.private or not self.settings.enable_prefix_caching:
            return 0
        while (
            hit + self.settings.block_size < guest.request.num_tokens
            and guest.identity(hit + self.settings.block_size - 1) in stored
        ):
            hit += self.settings.block_size
        return hit

    def write(self, guest: Guest, cached: int, new: int) -> None:
        request = guest.request
        slots = self.allocator.slots_held(request).tolist()
        first = request.num_computed_tokens + cached
        for position in range(first, first + new):
            self.memory[slots[position]] = guest.identity(position)
        request.num_computed_tokens = first + new

    def complete(self, guests: list[Guest]) -> None:
        """The step is over: what was computed is noted, whoever knows all its tokens says the next one."""
        for guest in guests:
            request = guest.request
            self.allocator.note_computed(request)
            if request.num_computed_tokens == len(guest.script) - 1:
                self.allocator.free(request)
                self.running.remove(guest)
            elif request.num_computed_tokens == request.num_tokens:
                guest.know(request.num_tokens + 1)

    def admit(self, guest: Guest, chunk: int, *, busy: bool) -> bool:
        allocator, request = self.allocator, guest.request
        hit = self.expected_hit(guest)
        assert allocator.get_computed_tokens(request) == hit
        new = min(chunk, request.num_tokens - hit)
        before = everything(allocator)
        cached = {self.memory[slot] for slot in allocator.cached_slots().tolist()}
        size = self.settings.block_size
        evictable = size * sum(guest.identity(end - 1) in cached for end in range(size, hit + 1, size))  # a block has one end
        gated = request.num_tokens if self.settings.reserve_full_isl else hit + new
        kept = int(self.settings.watermark * self.settings.num_blocks) * self.settings.block_size if busy else 0
        fits = self.whole(gated) - hit + allocator.state_slots + kept <= allocator.free_slots - evictable
        grant = allocator.allocate_slots(request, new, has_scheduled_reqs=busy)
        assert (grant is not None) == fits
        if grant is None:
            assert everything(allocator) == before
            return False
        assert grant.num_cached_tokens == hit
        held = allocator.slots_held(request).tolist()
        assert [self.memory[slot] for slot in held[:hit]] == [guest.identity(position) for position in range(hit)]
        self.waiting.remove(guest)
        self.running.append(guest)
        self.write(guest, hit, new)
        return True

    def grow(self, guest: Guest, chunk: int) -> bool:
        request = guest.request
        new = min(chunk, request.num_tokens - request.num_computed_tokens)
        missing = self.whole(request.num_computed_tokens + new) - self.allocator.num_slots_held(request)
        before, fits = everything(self.allocator), missing <= self.allocator.free_slots
        grant = self.allocator.allocate_slots(request, new, has_scheduled_reqs=True)
        assert (grant is not None) == fits
        if grant is None:
            assert everything(self.allocator) == before
            return False
        assert grant.num_cached_tokens == 0
        self.write(guest, 0, new)
        return True

    @rule(
        script=st.lists(st.integers(0, 1), min_size=2, max_size=MAX_MODEL_LEN),
        prompt=st.integers(1, MAX_MODEL_LEN - 1),
        namespace=st.sampled_from(["", "", "", "b"]),
        private=st.sampled_from([False] * 7 + [True]),
        priority=st.integers(0, 2),
    )
    def arrive(self, script: list[int], prompt: int, namespace: str, private: bool, priority: int) -> None:
        prompt = min(prompt, len(script) - 1)
        if self.allocator.admission_slots(prompt, len(script) - prompt) is None:
            assert self.whole(len(script) - 1) + self.allocator.state_slots > self.allocator.usable_slots
            return
        request = KVRequest(request_id=len(self.memory), num_tokens=prompt, namespace=namespace, priority=priority)
        guest = Guest(request, script, private)
        guest.know(prompt)
        self.waiting.append(guest)

    @rule(chunk=st.integers(1, MAX_MODEL_LEN), admissions=st.integers(0, 3))
    def step(self, chunk: int, admissions: int) -> None:
        """Whoever runs grows, the youngest are retracted for it, and some are admitted; then all is computed at once."""
        grown: list[Guest] = []
        for guest in self.running[:]:
            while guest in self.running and not self.grow(guest, chunk):
                victim = self.running[-1]
                self.retract(victim)
                grown = [other for other in grown if other is not victim]
            if guest in self.running:
                grown.append(guest)
        for guest in self.waiting[:admissions]:
            if len(self.running) == self.settings.max_num_seqs or not self.admit(guest, chunk, busy=bool(self.running)):
                break
            grown.append(guest)
        assert self.running or not self.waiting or not admissions, "who is alone is served"
        self.complete(grown)

    def retract(self, guest: Guest) -> None:
        assert len(self.running) > 1, "who is alone is never short of slots"
        stored = self.stored()
        self.allocator.preempt(guest.request)
        assert self.stored() == stored
        assert guest.request.num_computed_tokens == 0
        self.running.remove(guest)
        self.waiting.insert(0, guest)

    @precondition(lambda self: len(self.running) > 1)
    @rule(choice=st.integers(0, 3))
    def preempt(self, choice: int) -> None:
        self.retract(self.running[choice % len(self.running)])

    @precondition(lambda self: self.running)
    @rule(choice=st.integers(0, 3))
    def abort(self, choice: int) -> None:
        guest = self.running.pop(choice % len(self.running))
        computed = guest.request.num_computed_tokens // self.settings.block_size * self.settings.block_size
        stored = set(self.stored())
        self.allocator.free(guest.request)
        if self.settings.enable_prefix_caching and not guest.private:
            stored |= {guest.identity(position) for position in range(computed)}
        assert set(self.stored()) == stored

    @invariant()
    def every_slot_holds_what_it_should(self) -> None:
        allocator = self.allocator
        allocator.check_integrity()
        assert list(allocator.live_requests()) == [guest.request for guest in self.running]
        held: set[int] = set()
        for guest in self.running:
            slots = allocator.slots_held(guest.request).tolist()
            assert len(slots) == len(set(slots)) == allocator.num_slots_held(guest.request)
            for position in range(guest.request.num_computed_tokens):
                assert self.memory[slots[position]] == guest.identity(position)
            held |= set(slots)
        cached, stored = set(allocator.cached_slots().tolist()), self.stored()
        ends = [tokens for tokens in stored if len(tokens[1]) % self.settings.block_size == 0]
        assert len(ends) == len(set(ends)), "a prefix is stored twice"
        assert not cached & held
        assert len(cached) <= allocator.free_slots
        assert allocator.free_slots + len(held) + len(self.running) * allocator.state_slots == allocator.usable_slots
        assert min(held | cached, default=self.settings.block_size) >= self.settings.block_size, "the padding was handed out"

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            for request in self.allocator.live_requests():
                self.allocator.free(request)
            assert self.allocator.free_slots == self.allocator.usable_slots
            self.allocator.check_integrity()


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(max_examples=60, stateful_step_count=40)
