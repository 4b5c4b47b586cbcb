"""Tails, forks and policies together keep every law."""

from itertools import count

import numpy as np
import pytest
from cache_owner import SIZE
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.fuzzing import FuzzOwner, Guest, Script

MAX_MODEL_LEN = 12
WORDS = st.lists(st.integers(0, 1), min_size=2, max_size=MAX_MODEL_LEN)
PLACES = st.integers(0, 4)


class SharingMachine(RuleBasedStateMachine):
    """Tails, forks and policies together: `FuzzOwner` checks every law; a table of what each block holds checks every tail."""

    eviction: str

    @initialize(unit=st.sampled_from([1, 2]), num_blocks=st.integers(4, 9), state_slots=st.sampled_from([0, 0, 1]))
    def start(self, unit: int, num_blocks: int, state_slots: int) -> None:
        self.pool = KVPoolSettings(
            num_blocks=num_blocks,
            block_size=SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=3,
            enable_prefix_caching=True,
            prefix_match_unit=unit,
            state_slots=state_slots,
            eviction=self.eviction,
        )
        self.allocator = PagedAllocator(self.pool)
        self.owner = FuzzOwner(self.allocator, self.pool)
        self.names = count()
        self.computed: dict[int, list[int]] = {}
        """By block: the identities of the tokens that are known to be computed in it."""

    def guest(self, tokens: list[int], prompt: int, priority: int = 0) -> Guest:
        script = Script.for_pool(self.pool, np.array(tokens, np.int32))
        output = len(tokens) - prompt + 1
        return Guest(script, name=next(self.names), prompt_tokens=prompt, output_tokens=output, priority=priority)

    def tail(self, guest: Guest, hit: int) -> int:
        """Return the tokens that some block has in common with what follows `hit` tokens of `guest`, in whole units."""
        wanted, unit = (
            guest.script.identities[hit : min(hit + SIZE, guest.request.num_tokens) - 1].tolist(),
            self.pool.prefix_match_unit,
        )
        return max(
            (
                len(wanted[:n])
                for held in self.computed.values()
                for n in range(unit, len(wanted) + 1, unit)
                if held[:n] == wanted[:n]
            ),
            default=0,
        )

    def granted(self, guest: Guest, kept: list[int], *, tell: bool) -> None:
        manager = self.allocator.manager
        table, states = manager.block_table(guest.request).tolist(), manager._states[manager._rows[guest.request]].tolist()
        for block in {*table, *states} - set(kept):
            self.computed.pop(block, None)
        if tell:
            self.owner.note_computed(guest)
            for place, block in enumerate(table):
                first, last = place * SIZE, min((place + 1) * SIZE, guest.request.num_computed_tokens)
                self.computed[block] = guest.script.identities[first:last].tolist()

    @rule(
        words=WORDS, prompt=st.integers(1, MAX_MODEL_LEN), most=st.integers(1, MAX_MODEL_LEN), tell=st.booleans(), priority=PLACES
    )
    def admit(self, words: list[int], prompt: int, most: int, tell: bool, priority: int) -> None:
        guest = self.guest(words, min(prompt, len(words)), priority)
        if len(self.owner.running) == self.pool.max_num_seqs or not self.owner.arrive(guest):
            return
        hits, hit = self.allocator.manager.get_computed_blocks(guest.request)
        assert self.allocator.get_computed_tokens(guest.request) == hit + self.tail(guest, hit)
        if self.owner.admit(guest, most):
            self.granted(guest, hits.tolist(), tell=tell)

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES, most=st.integers(1, 5), tell=st.booleans())
    def grow(self, which: int, most: int, tell: bool) -> None:
        guest = self.owner.running[which % len(self.owner.running)]
        kept = self.allocator.manager.block_table(guest.request).tolist()
        if not guest.uncomputed:
            guest.know(min(guest.request.num_tokens + most, guest.last))
        if guest.uncomputed and self.owner.grow(guest, most):
            self.granted(guest, kept, tell=tell)

    @precondition(lambda self: self.owner.running and self.owner.can_fork)
    @rule(which=PLACES, words=WORDS)
    def fork(self, which: int, words: list[int]) -> None:
        parent = self.owner.running[which % len(self.owner.running)]
        known = parent.request.num_tokens
        child = self.guest([*parent.script.tokens[:known].tolist(), *words][: max(known, MAX_MODEL_LEN)], known)
        if self.owner.arrive(child):
            self.owner.fork(parent, child)

    @precondition(lambda self: self.owner.running)
    @rule(which=PLACES, comes_back=st.booleans())
    def leave(self, which: int, comes_back: bool) -> None:
        guest = self.owner.running[which % len(self.owner.running)]
        (self.owner.preempt if comes_back else self.owner.free)(guest)

    @rule()
    def reset(self) -> None:
        if self.allocator.manager.reset_prefix_cache():
            self.computed.clear()


@pytest.mark.parametrize("eviction", ["lru", "lfu", "priority", "cost-aware"])
def test_sharing_keeps_every_law(eviction: str) -> None:
    machine = type("Machine", (SharingMachine,), {"eviction": eviction})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))
