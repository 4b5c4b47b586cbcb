"""An owner of requests that holds an allocator to its laws: every operation goes through it, with what must be so afterwards."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

from pagedkv.allocation import Allocator, Forkable, KVPoolSettings
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.fuzz_guest import Guest
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import ShadowMemory, check_unchanged, state_of

Choose: TypeAlias = Callable[[int], int]
"""Given n, returns one of 0 to n - 1."""


@dataclass(slots=True)
class FuzzCounts:
    """What was done: shows that a run tried what it should try."""

    grants: int = 0
    """Allocations that got what they asked for."""
    refusals: int = 0
    """Allocations that did not fit, and changed nothing."""
    hit_tokens: int = 0
    """Tokens that admissions found cached, each compared with what they should be."""
    copies: int = 0
    """Slots copied on behalf of a grant."""
    forks: int = 0
    """Requests that began as a fork."""
    misuses: int = 0
    """Calls that cannot be right: each was a ConfigError, and changed nothing."""


MISUSES = (
    "free of nothing",
    "preemption of nothing",
    "no new tokens",
    "computed beyond its slots",
    "beyond max_model_len",
    "one request too many",
    "fork of nothing",
    "fork onto slots",
    "tokens left out",
    "keys left out",
)
"""What an owner can do wrong."""


class FuzzOwner:
    """Owns the requests of an allocator as a scheduler does, and raises IntegrityError where a law is broken.

    Every method is one operation, with cheap checks. While `thorough` is true, each ends with `memory.check()`, and a call that
    fails must leave the allocator's whole state as it was.
    """

    def __init__(self, allocator: Allocator, settings: KVPoolSettings, *, must_refuse: Iterable[str] = ()) -> None:
        self.allocator = allocator
        self.settings = settings
        self.memory = ShadowMemory(allocator, windows=allocator.num_groups > 1)
        self.counts = FuzzCounts()
        self.thorough = True
        self.running: list[Guest] = []
        """Guests that hold slots, in order of admission."""
        self.trail: deque[tuple[object, ...]] = deque(maxlen=24)
        """The last operations."""
        self._most_new = settings.max_num_batched_tokens or settings.max_model_len
        """Tokens that a step may compute."""
        self._must_refuse = frozenset(must_refuse)
        """Misuses that only some allocators must notice, of which this one is."""

    def arrive(self, guest: Guest) -> bool:
        """Ask whether `guest` can ever fit."""
        self.trail.append(("arrival of", guest, "with", guest.prompt_tokens, "+", guest.output_tokens))
        slots = self.allocator.admission_slots(guest.prompt_tokens, guest.output_tokens)
        guest.request.admission_slots = slots or 0
        return slots is not None

    def admit(self, guest: Guest, most: int, *, has_scheduled_reqs: bool = False) -> bool:
        """Admit `guest` with what is cached and up to `most` more of its known tokens; return whether it fitted."""
        request = guest.request
        self.trail.append(("admission of", guest, "with", most))
        hit = self.allocator.get_computed_tokens(request)
        if not 0 <= hit < request.num_tokens or (hit and not self.settings.enable_prefix_caching):
            raise IntegrityError(
                f"{guest}: {hit} of {request.num_tokens} tokens cached; needs 0 or more, less than all, 0 uncached"
            )
        return self._allocate(
            guest, hit, min(most, request.num_tokens - hit, self._most_new), has_scheduled_reqs=has_scheduled_reqs
        )

    def grow(self, guest: Guest, most: int) -> bool:
        """Give running `guest` slots for up to `most` of its uncomputed tokens; return whether they fitted."""
        self.trail.append(("growth of", guest, "by", most))
        return self._allocate(guest, 0, min(most, guest.uncomputed, self._most_new))

    def note_computed(self, guest: Guest) -> None:
        """Tell that running `guest` has computed what it was granted."""
        self.trail.append(("computed", guest))
        self.allocator.note_computed(guest.request)
        self._end(guest)

    def free(self, guest: Guest) -> None:
        """End running `guest`."""
        self.trail.append(("end of", guest))
        self.memory.check_request(guest.request)
        self.allocator.free(guest.request)
        self._gone(guest)

    def preempt(self, guest: Guest) -> None:
        """Preempt running `guest`."""
        self.trail.append(("preemption of", guest))
        self.memory.check_request(guest.request)
        self.allocator.preempt(guest.request)
        if guest.request.num_computed_tokens:
            raise IntegrityError(f"{guest} was preempted and has {guest.request.num_computed_tokens} computed tokens")
        self._gone(guest)

    @property
    def can_fork(self) -> bool:
        """There is a fork, and a place for one more request."""
        room = len(self.running) < self.allocator.max_num_seqs and not self.allocator.state_slots
        return room and isinstance(self.allocator, Forkable)

    def fork(self, parent: Guest, child: Guest) -> None:
        """Let `child`, which has arrived and knows the tokens of running `parent`, share its slots."""
        assert isinstance(self.allocator, Forkable)
        self.trail.append(("fork of", parent, "as", child))
        self.allocator.fork(parent.request, child.request)
        self.counts.forks += 1
        self.running.append(child)
        self.memory.fork(parent.request, child.request, child.script.identities)
        self._end(child)

    def misuse(self, kind: str, guest: Guest) -> None:
        """Do what must be refused with a ConfigError, if `kind`, one of `MISUSES`, can be done with `guest` now."""
        call = self.misuse_call(kind, guest)
        if call is None:
            return
        self.trail.append(("misuse,", kind, "by", guest))
        before = self._mark(guest)
        try:
            call()
        except ConfigError:
            self.counts.misuses += 1
        else:
            raise IntegrityError(f"{kind}, by {guest}, was accepted: needs a ConfigError")
        self._unchanged(guest, before)

    def misuse_call(self, kind: str, guest: Guest) -> Callable[[], object] | None:
        """Return the call that is wrong, or None if it is not possible now, or not known to be wrong."""
        request, allocator = guest.request, self.allocator
        holds = request in self.memory.identities
        if kind == "free of nothing" and not holds:
            return lambda: allocator.free(request)
        if kind == "preemption of nothing" and not holds:
            return lambda: allocator.preempt(request)
        if kind == "no new tokens":
            return lambda: allocator.allocate_slots(request, 0)
        if kind == "computed beyond its slots":
            return self._with(request, num_computed_tokens=allocator.slots_held(request).size + 1)
        if kind == "beyond max_model_len":
            return lambda: allocator.allocate_slots(request, allocator.max_model_len - request.num_computed_tokens + 1)
        if kind == "one request too many" and not holds and len(self.running) == allocator.max_num_seqs:
            return lambda: allocator.allocate_slots(request, 1)
        if kind == "fork of nothing" and not holds and isinstance(allocator, Forkable):
            child = replace(request, request_id="child")
            return lambda: allocator.fork(request, child)
        if kind == "fork onto slots" and holds and isinstance(allocator, Forkable):
            return lambda: allocator.fork(self.running[0].request, request)
        if holds or kind not in self._must_refuse:
            return None
        if kind == "tokens left out" and request.token_ids.size > 1:
            return self._with(request, token_ids=request.token_ids[:-1])
        num_keys = request.num_tokens // self.settings.block_size
        return self._with(request, block_keys=request.block_keys[: num_keys - 1]) if kind == "keys left out" and num_keys else None

    def _with(self, request: KVRequest, **values: object) -> Callable[[], object]:
        def call() -> None:
            with _changed(request, values):
                self.allocator.allocate_slots(request, 1)

        return call

    def _allocate(self, guest: Guest, hit: int, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> bool:
        request, before = guest.request, self._mark(guest)
        held = self.allocator.num_slots_held(request)
        alone = not self.running or self.running == [guest]
        grant = self.allocator.allocate_slots(request, num_new_tokens, has_scheduled_reqs=has_scheduled_reqs and not alone)
        if grant is None:
            self.counts.refusals += 1
            if alone:
                raise IntegrityError(f"{guest} was refused {num_new_tokens} tokens though nobody else holds any and it can fit")
            if self.memory.windows and self.allocator.num_slots_held(request) < held:  # what has left the window is given back
                before = self._mark(guest)
                if self.allocator.allocate_slots(request, num_new_tokens) is not None:
                    raise IntegrityError(
                        f"{guest} was refused {num_new_tokens} tokens and then got them, though nothing had come free"
                    )
            self._unchanged(guest, before)
            return False
        if grant.num_cached_tokens != hit:
            raise IntegrityError(f"{guest} got {grant.num_cached_tokens} cached tokens, but get_computed_tokens said {hit}")
        if request not in self.memory.identities:
            self.running.append(guest)
        self.memory.write(request, guest.script.identities, grant, num_new_tokens)
        self.counts.grants += 1
        self.counts.hit_tokens += hit
        self.counts.copies += len(grant.copies)
        self._end(guest)
        return True

    def _gone(self, guest: Guest) -> None:
        self.memory.forget(guest.request)
        self.running.remove(guest)
        if self.allocator.num_slots_held(guest.request) or self.allocator.slots_held(guest.request).size:
            raise IntegrityError(f"{guest} has gone and still holds slots")
        self._end(guest)

    def _end(self, guest: Guest) -> None:
        if self.thorough:
            self.memory.check()

    def _mark(self, guest: Guest) -> list[object]:
        if self.thorough:
            return state_of((self.allocator, guest.request))
        return [".free_slots", self.allocator.free_slots, ".num_slots_held", self.allocator.num_slots_held(guest.request)]

    def _unchanged(self, guest: Guest, before: list[object]) -> None:
        check_unchanged(before, self._mark(guest))
        self._end(guest)


@contextmanager
def _changed(request: KVRequest, values: dict[str, object]) -> Iterator[None]:
    saved = {name: getattr(request, name) for name in values}
    for name, value in values.items():
        setattr(request, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(request, name, value)
