"""Random requests against an allocator, every operation held to its laws: what a scheduler does, and what it must never do.

Whatever is random comes from a function that the caller passes in: one seed is one sequence of operations. The checks draw nothing,
so with fewer operations, or with more checks, the sequence is the same up to there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.fuzz_owner import MISUSES, Choose, FuzzCounts, FuzzOwner, Guest, Script
from pagedkv.heaps import HEAPS

T = TypeVar("T")


class FuzzFailure(IntegrityError):  # noqa: N818 - it says what happened in a run, and is an IntegrityError
    """A law that an allocator broke, with all that is needed to see it again."""

    def __init__(self, *, allocator: str, settings: KVPoolSettings, seed: int | str, operation: int, owner: FuzzOwner) -> None:
        self.allocator, self.settings, self.seed, self.operation = allocator, settings, seed, operation
        self.trail = tuple(" ".join(map(str, entry)) for entry in owner.trail)
        """The last operations, the one that failed at the end."""

    def __str__(self) -> str:
        return (
            f"{self.__cause__}\n  allocator {self.allocator}, {self.settings}\n  seed {self.seed!r}, operation {self.operation} "
            f"({self.operation + 1} operations show it again)\n  " + "\n  ".join(self.trail)
        )


_LIKELIHOOD = {"grow": 20, "admit": 12, "compute": 3, "free": 2, "preempt": 2, "fork": 2, "misuse": 4, "ask": 1}
"""How often each operation is drawn, out of their sum."""
_NUM_SCRIPTS = 24
_RENEWAL_OPS = 512
"""Operations after which one script gives way to a new one, and a request is run alone."""
_VOCABULARY = 3
_NAMESPACES = ("", "", "tenant")
_MOST_WAITING = 8
_SHORTENINGS = 4


class _Fuzzer:
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
        return Script(tokens=tokens, namespace=namespace, private=private, block_size=self.settings.block_size)

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


def fuzz(
    allocator: str,
    settings: KVPoolSettings,
    choose: Choose,
    *,
    ops: int,
    seed: int | str,
    check_every: int = 251,
    check_all_from: int | None = None,
    progress: Callable[[int], None] = lambda operations: None,
) -> FuzzCounts:
    """Do `ops` random operations on the registered `allocator`: cheap checks on each, all checks now and then and at the end.

    Args:
        allocator: Its name in the registry.
        settings: What it is built from; see `fuzz_settings`.
        choose: The source of randomness, fresh.
        ops: Operations.
        seed: What `choose` was made from: for the message of a failure only.
        check_every: Operations from one full check to the next. A failure at operation n was caused after n - check_every.
        check_all_from: Operation from which every one gets all checks: they find a fault in the operation that causes it. The last
            one by default.
        progress: Is told, at every full check, how many operations are done.

    Raises:
        FuzzFailure: If a law is broken, or an operation raises what it must not.
        ConfigError: If there is no such allocator, or it cannot work with these settings.
    """
    owner = fuzz_owner(allocator, settings)
    fuzzer = _Fuzzer(owner, choose)
    operation = 0
    try:
        for operation in range(ops):
            full = operation % check_every == 0
            owner.thorough = full or operation >= (ops - 1 if check_all_from is None else check_all_from)
            if full:
                progress(operation)
            fuzzer.step(operation)
        owner.thorough = True
        owner.memory.check()
    except Exception as error:
        raise FuzzFailure(allocator=allocator, settings=settings, seed=seed, operation=operation, owner=owner) from error
    return owner.counts


def fuzz_owner(allocator: str, settings: KVPoolSettings) -> FuzzOwner:
    """Return the owner of a new `allocator`, knowing which left-out arrays it must notice: those that its like misses when new."""
    new = ALLOCATORS.load(allocator)
    noticed = []
    for kind in ("tokens left out", "keys left out"):
        owner = FuzzOwner(new(settings), settings, must_refuse=(kind,))
        script = Script(tokens=np.zeros(settings.max_model_len, np.int32), block_size=settings.block_size)
        guest = Guest(script, name="probe", prompt_tokens=settings.max_model_len - 1, output_tokens=1)
        call = owner.arrive(guest) and owner.misuse_call(kind, guest)
        try:
            if call:
                call()
        except ConfigError:
            noticed.append(kind)
    return FuzzOwner(new(settings), settings, must_refuse=noticed)


def fuzz_settings(
    allocator: str, *, num_slots: int = 64, max_model_len: int = 24, max_num_seqs: int = 5
) -> tuple[KVPoolSettings, ...]:
    """Return small pools, short of room, that together try every setting that concerns `allocator`.

    A setting concerns it if it refuses nonsense there. Pools that it cannot work with are left out.

    Raises:
        ConfigError: If it can work with none.
    """
    new = ALLOCATORS.load(allocator)

    def refused(settings: KVPoolSettings) -> bool:
        try:
            new(settings)
        except ConfigError:
            return True
        return False

    small = [
        KVPoolSettings(
            num_blocks=num_slots // block_size,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            page_tokens=block_size,
            enable_prefix_caching=caching,
        )
        for block_size in (1, 2, 4)
        for caching in (False, True)
    ]
    pools = [*small, replace(small[2], watermark=0.1, state_slots=3, reserve_full_isl=False, page_tokens=3)]
    pools.append(replace(small[3], watermark=0.1, state_slots=3, reserve_full_isl=False))
    pools.append(replace(small[1], num_blocks=num_slots, block_size=16, max_num_seqs=3 * max_num_seqs, page_tokens=16))
    pools[-1] = replace(pools[-1], max_model_len=10 * max_model_len)
    pools = [pool for pool in pools if not refused(pool)]
    if not pools:
        new(small[0])
    if refused(replace(pools[0], contiguous_heap="?")):
        pools += [replace(pools[0], contiguous_heap=heap) for heap in HEAPS.names() if heap != pools[0].contiguous_heap]
    cached = next((pool for pool in pools if pool.enable_prefix_caching), None)
    if cached is not None and refused(replace(cached, eviction="?")):
        pools += [replace(cached, eviction=policy) for policy in EVICTION_POLICIES.names() if policy != cached.eviction]
    return tuple(pools)
