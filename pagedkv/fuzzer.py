"""What random owners do: who comes, with which tokens, who goes on, and what goes wrong."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from pagedkv.errors import IntegrityError
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzz_owner import MISUSES, Choose, FuzzOwner

T = TypeVar("T")

_LIKELIHOOD = {"grow": 20, "admit": 12, "compute": 3, "free": 2, "preempt": 2, "fork": 2, "misuse": 4, "ask": 1}
"""How often each operation is drawn, out of their sum."""
_NUM_SCRIPTS = 24
_RENEWAL_OPS = 512
"""Operations after which one script gives way to a new one, and a request is run alone."""
_VOCABULARY = 3
_NAMESPACES = ("", "", "tenant")
_MOST_WAITING = 8
_SHORTENINGS = 4


class Fuzzer:
    """Draws one operation after the other."""

    def __init__(self, owner: FuzzOwner, choose: Choose) -> None:
        self.owner, self.choose = owner, choose
        self.settings = owner.settings
        most = self.settings.max_model_len
        self.chunks = (1, 1, 1, 1, 1, 2, 3, most)
        """Tokens to compute at once."""
        self.first_chunks = (1, 3, 7, most, most)
        self.waiting: list[Guest] = []
        self.num_guests = 0
        self.scripts: list[Script] = []
        for _ in range(_NUM_SCRIPTS):
            self.scripts.append(self.new_script())
        self.table = [getattr(self, name) for name, times in _LIKELIHOOD.items() for _ in range(times)]

    def step(self, operation: int) -> None:
        """Do one operation."""
        if operation % _RENEWAL_OPS == _RENEWAL_OPS - 1:
            self.scripts[self.choose(len(self.scripts))] = self.new_script()
            self.run_alone()
        else:
            self.table[self.choose(len(self.table))]()

    def run_alone(self) -> None:
        """End all, then run one request from its whole prompt to its end: it must never be refused."""
        while self.owner.running:
            self.owner.free(self.pick(self.owner.running))
        self.owner.memory.check()
        guest = self.arrival()
        if guest is not None and self.owner.admit(guest, self.settings.max_model_len):
            while self.run(guest, self.pick(self.chunks)):
                pass

    def new_script(self) -> Script:
        """Return one that begins like another, or is new; tokens are few, so that prefixes agree by chance too."""
        tokens = np.array([self.choose(_VOCABULARY) for _ in range(self.settings.max_model_len)], np.int32)
        namespace = _NAMESPACES[self.choose(len(_NAMESPACES))]
        if private := not self.choose(6):
            namespace = f"private {self.choose(1 << 30)}"
        elif self.scripts and self.choose(4):
            parent = self.pick(self.scripts)
            shared = self.choose(tokens.size)
            tokens[:shared] = parent.tokens[:shared]
        return Script.for_pool(self.settings, tokens, namespace=namespace, private=private)

    def arrival(self) -> Guest | None:
        """Return a new guest, or None if it could never fit."""
        script, priority = self.pick(self.scripts), self.choose(3)
        for shorter in range(_SHORTENINGS):  # allocators differ in how long a request can be: try half as long
            most = max(self.settings.max_model_len >> shorter, 2)
            prompt = 1 + self.choose(most - 1)
            output = 1 + self.choose(most - prompt)
            self.num_guests += 1
            guest = Guest(script, name=self.num_guests, prompt_tokens=prompt, output_tokens=output, priority=priority)
            if self.owner.arrive(guest):
                return guest
        return None

    def admit(self) -> None:
        """Let someone in: who waits, or a new one."""
        if len(self.owner.running) == self.settings.max_num_seqs:
            return self.grow()
        again = self.waiting and (len(self.waiting) == _MOST_WAITING or self.choose(2))
        guest = self.waiting.pop(self.choose(len(self.waiting))) if again else self.arrival()
        if guest is None:
            return None
        if not self.owner.admit(guest, self.pick(self.first_chunks), has_scheduled_reqs=bool(self.choose(2))):
            self.waiting.append(guest)
        elif self.choose(4):
            self.owner.note_computed(guest)
        return None

    def grow(self) -> None:
        """Let a running request go on."""
        if self.owner.running:
            self.run(self.pick(self.owner.running), self.pick(self.chunks))

    def run(self, guest: Guest, chunk: int) -> bool:
        """Let `guest` compute up to `chunk` tokens, or end if it is done; return whether it may go on."""
        if not guest.uncomputed:
            if guest.request.num_computed_tokens == guest.last:
                self.owner.free(guest)
                return False
            guest.know(min(guest.request.num_tokens + chunk, guest.last))
        if self.owner.grow(guest, chunk):
            self.owner.note_computed(guest)
        return True

    def compute(self) -> None:
        """Tell once more, or late, what is computed."""
        if self.owner.running:
            self.owner.note_computed(self.pick(self.owner.running))

    def free(self) -> None:
        """End a running request wherever it is: in the middle of its prompt, with its next token known or not."""
        if self.owner.running:
            guest = self.pick(self.owner.running)
            if not guest.uncomputed and self.choose(2):
                guest.know(guest.request.num_tokens + 1)
            self.owner.free(guest)

    def preempt(self) -> None:
        """Preempt a running request; it comes again, or gives up."""
        if self.owner.running:
            guest = self.pick(self.owner.running)
            self.owner.preempt(guest)
            if len(self.waiting) < _MOST_WAITING:
                self.waiting.append(guest)

    def fork(self) -> None:
        """Let a running request go on in two ways."""
        if not self.owner.running or not self.owner.can_fork:
            return
        parent, other = self.pick(self.owner.running), self.pick(self.scripts)
        known = parent.request.num_tokens
        script = replace(parent.script, tokens=np.concatenate((parent.script.tokens[:known], other.tokens[known:])))
        self.num_guests += 1
        output = 1 + self.choose(self.settings.max_model_len - known) if known < self.settings.max_model_len else 1
        child = Guest(script, name=self.num_guests, prompt_tokens=known, output_tokens=output)
        if self.owner.arrive(child):
            self.owner.fork(parent, child)

    def misuse(self) -> None:
        """Do what must be refused."""
        guests = self.waiting if self.choose(2) else self.owner.running
        if guests:
            self.owner.misuse(self.pick(MISUSES), self.pick(guests))

    def ask(self) -> None:
        """Ask twice how much of a waiting request is cached."""
        if self.waiting:
            request, allocator = self.pick(self.waiting).request, self.owner.allocator
            first, again = allocator.get_computed_tokens(request), allocator.get_computed_tokens(request)
            if first != again:
                raise IntegrityError(f"request {request.request_id}: get_computed_tokens says {first}, then {again}")

    def pick(self, items: Sequence[T]) -> T:
        """Return one of `items`."""
        return items[self.choose(len(items))]
