"""An owner of any allocator as a state machine: after every operation, whatever it does, the laws hold."""

import sys
from collections.abc import Sequence

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pagedkv.allocation import KVPoolSettings
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzz_owner import MISUSES
from pagedkv.fuzzing import fuzz_owner

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
