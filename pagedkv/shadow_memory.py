"""What every slot of an allocator must hold: the oracle that any allocator is checked against.

A slot is written when a token is granted its place, and what is written is the identity of the request's whole prefix up to that
token. So one comparison tells whether a request still finds all it computed: a slot given twice, a hit of another prefix or of
another namespace, a forgotten copy and an eviction of what somebody holds all leave a wrong identity in a slot that is held.
"""

from collections import deque
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np

from pagedkv.allocation import NO_SLOT, Allocator, Grant
from pagedkv.arrays import NO_SLOTS, Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.kv_request import KVRequest

_GROUP_STEP = 0x1E3779B97F4A7C15
"""Sets the identities of layer groups apart."""


def prefix_identities(tokens: Sequence[int] | Int32Array, namespace: str) -> Int64Array:
    """Return the identity of each prefix of `tokens`: entry t stands for the namespace and tokens 0 to t. O(tokens).

    A sum, modulo 2**64, of scrambled (position, token) pairs, begun with a hash of the namespace: two prefixes that differ have the
    same identity with a chance of 2**-64.
    """
    mixed = np.asarray(tokens, np.int64).astype(np.uint64) | (np.arange(len(tokens), dtype=np.uint64) << np.uint64(32))
    mixed += np.uint64(0x9E3779B97F4A7C15)  # splitmix64 (Steele, Lea and Flood, OOPSLA 2014)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    salt = np.frombuffer(blake2b(namespace.encode(), digest_size=8).digest(), np.uint64)
    return (np.cumsum(mixed, dtype=np.uint64) + salt).view(np.int64)


class ShadowMemory:
    """The contents of all slots, as an owner who computes every granted token at once would write them.

    Every check raises IntegrityError. The cheap one, `check_request`, is enough to find any damage to a request before it ends;
    `check` finds it at once and adds the laws of the whole pool.

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> from pagedkv.allocators import ALLOCATORS
        >>> pool = KVPoolSettings(num_blocks=4, block_size=2, max_model_len=6)
        >>> allocator = ALLOCATORS.load("paged")(pool)
        >>> memory = ShadowMemory(allocator)
        >>> request = KVRequest(request_id="a", num_tokens=3)
        >>> memory.write(request, prefix_identities([7, 8, 9], ""), allocator.allocate_slots(request, 3), 3)
        >>> memory.check()
        >>> memory.contents[allocator.slots_held(request)[2]] = 0  # somebody else writes there
        >>> memory.check_request(request)
        Traceback (most recent call last):
        pagedkv.errors.IntegrityError: request 'a': slot 4 of its token 2, group 0, holds something else
    """

    def __init__(self, allocator: Allocator, *, windows: bool = False) -> None:
        self.allocator = allocator
        self.windows = windows
        """Tokens but the last may have no slot any more, once they have left a window."""
        self.contents: Int64Array = np.zeros(allocator.num_slots, np.int64)
        """By slot: the identity of the prefix whose last token lies there; 0 if nothing was ever written."""
        self.identities: dict[KVRequest, tuple[Int64Array, ...]] = {}
        """By request that holds slots, in order of admission: per group, what its token t must find in its slot."""

    def write(self, request: KVRequest, identities: Int64Array, grant: Grant, num_new_tokens: int) -> None:
        """Do what the owner does with a grant: copy, count cached and new tokens as computed, write the new ones. O(tokens held).

        Args:
            request: The request; this counts its computed tokens.
            identities: Of all prefixes it will ever have; read at its first grant.
            grant: What it got.
            num_new_tokens: Tokens to write behind its computed and its cached ones.

        Raises:
            IntegrityError: If its computed and cached tokens are not in its slots, or the new ones have none.
        """
        if grant.copies.size:
            self._copy(grant.copies)
        known = self._hold(request, identities)
        request.num_computed_tokens += grant.num_cached_tokens
        first, end = request.num_computed_tokens, request.num_computed_tokens + num_new_tokens
        for group, expected in enumerate(known):
            slots = self.allocator.slots_held(request, group)
            self._compare(request, group, slots, expected, first)
            if slots.size < end or slots[end - 1] == NO_SLOT:
                raise IntegrityError(
                    f"request {request.request_id!r}: tokens up to {end} were granted, its slots are {_show(slots)}"
                )
            places, content = slots[first:end], expected[first:end]
            if self.windows and places.min() < 0:
                places, content = places[places >= 0], content[places >= 0]
            try:
                self.contents[places] = content
            except IndexError:
                self._extend(places)
                self.contents[places] = content
        request.num_computed_tokens = end

    def fork(self, parent: KVRequest, child: KVRequest, identities: Int64Array) -> None:
        """Note that `child`, whose prefixes have `identities`, shares all that `parent` computed; this counts its tokens."""
        self._hold(child, identities)
        child.num_computed_tokens = parent.num_computed_tokens
        self.check_request(child)

    def forget(self, request: KVRequest) -> None:
        """Note that `request` holds nothing any more. What it wrote stays until somebody writes there."""
        del self.identities[request]

    def check_request(self, request: KVRequest) -> None:
        """Raise unless every computed token of `request` is in its slot. O(tokens held)."""
        for group, expected in enumerate(self.identities[request]):
            self._compare(request, group, self.allocator.slots_held(request, group), expected, request.num_computed_tokens)

    def check(self) -> None:
        """Raise unless all laws hold: contents of all requests, their slots, and the pool's accounts. O(slots held and cached)."""
        allocator, live = self.allocator, tuple(self.identities)
        allocator.check_integrity()
        if tuple(allocator.live_requests()) != live:
            raise IntegrityError(
                f"live_requests says {_names(allocator.live_requests())}; {_names(live)} hold slots, in that order"
            )
        if len(live) > allocator.max_num_seqs:
            raise IntegrityError(f"{len(live)} requests hold slots, max_num_seqs is {allocator.max_num_seqs}")
        held = [self._check_slots(request) for request in live]
        self._check_accounts(np.unique(np.concatenate(held)) if held else NO_SLOTS, len(live))

    def _check_slots(self, request: KVRequest) -> Int64Array:
        """Return the slots that `request` holds for its tokens, in all groups, once they are found right."""
        self.check_request(request)
        allocator = self.allocator
        slots: Int64Array = np.concatenate([allocator.slots_held(request, group) for group in range(allocator.num_groups)])
        name = f"request {request.request_id!r}"
        held: Int64Array = slots[slots != NO_SLOT]
        if held.size != np.unique(held).size or (held < 0).any() or not (self.windows or held.size == slots.size):
            raise IntegrityError(f"{name} holds a slot twice, or one that is none: {_show(slots)}")
        if allocator.num_slots_held(request) != held.size:
            told = allocator.num_slots_held(request)
            raise IntegrityError(f"{name}: num_slots_held says {told}, its {held.size} slots are {_show(slots)}")
        if request.num_computed_tokens > allocator.max_model_len:
            raise IntegrityError(f"{name} has more than max_model_len tokens: {request.num_computed_tokens}")
        return held

    def _check_accounts(self, held: Int64Array, num_live: int) -> None:
        allocator, cached = self.allocator, self.allocator.cached_slots()
        held = held[held < allocator.num_slots]  # beyond them lies a host tier, which counts for itself
        state, free, rounding = num_live * allocator.state_slots, allocator.free_slots, allocator.rounding_slots
        if free + held.size + state + rounding != allocator.usable_slots or min(free, rounding) < 0:
            raise IntegrityError(
                f"{free} slots free, {held.size} held, {state} of state, {rounding} of rounding: not the {allocator.usable_slots} "
                f"usable ones; held: {_show(held)}"
            )
        if not num_live and free != allocator.usable_slots:
            raise IntegrityError(f"nobody holds anything, but {free} of {allocator.usable_slots} slots are free")
        if cached.size != allocator.num_cached_slots:
            raise IntegrityError(f"{cached.size} cached slots, but the allocator counts {allocator.num_cached_slots}")
        inside = cached[cached < allocator.num_slots]
        if np.unique(cached).size != cached.size or np.isin(cached, held).any() or inside.size > free or (cached < 0).any():
            raise IntegrityError(f"cached slots {_show(cached)}: held, twice or more than {free} free; held: {_show(held)}")

    def _hold(self, request: KVRequest, identities: Int64Array) -> tuple[Int64Array, ...]:
        """Return what `request` must find, by group; a request unknown so far is held from now on."""
        known = self.identities.get(request)
        if known is None:
            others = range(1, self.allocator.num_groups)
            known = self.identities[request] = (identities, *(identities + group * _GROUP_STEP % 2**63 for group in others))
        return known

    def _compare(self, request: KVRequest, group: int, slots: Int64Array, expected: Int64Array, num_tokens: int) -> None:
        try:
            if self.contents[slots[:num_tokens]].tobytes() == expected[:num_tokens].tobytes():
                return
        except IndexError:
            self._extend(slots)
        name = f"request {request.request_id!r}"
        if slots.size < num_tokens:
            raise IntegrityError(f"{name} has {num_tokens} computed tokens, but its slots in group {group} are {_show(slots)}")
        places = slots[:num_tokens]
        left = (places == NO_SLOT) & self.windows
        wrong = np.flatnonzero(~left & (self.contents[places] != expected[:num_tokens]))
        if wrong.size:
            raise IntegrityError(f"{name}: slot {places[wrong[0]]} of its token {wrong[0]}, group {group}, holds something else")
        if num_tokens and left[-1]:
            raise IntegrityError(f"{name}: its last computed token, {num_tokens - 1}, has no slot in group {group}")

    def _copy(self, copies: Int64Array) -> None:
        self._extend(copies)
        for source, destination in copies.tolist():
            self.contents[destination] = self.contents[source]

    def _extend(self, slots: Int64Array) -> None:
        missing = int(slots.max(initial=0)) + 1 - self.contents.size
        if missing > 0:
            self.contents = np.concatenate((self.contents, np.zeros(missing, np.int64)))


def state_of(root: object) -> list[object]:
    """Return all that `root` consists of, as one flat list that can be compared: attributes as ".name", arrays as lists.

    Objects met again, cycles too, are told by their number. Functions and classes count by identity. O(size of the state).
    """
    flat: list[object] = []
    seen: dict[int, tuple[int, object]] = {}  # the thing too: while it is kept, nothing else can get its id
    stack: list[object] = [root]
    while stack:
        thing = stack.pop()
        if thing is None or isinstance(thing, int | float | str | bytes | np.generic):
            flat.append(thing)
        elif id(thing) in seen:
            flat.append(("again", seen[id(thing)][0]))
        else:
            seen[id(thing)] = len(seen), thing
            parts = _parts(thing)
            flat += (type(thing), len(parts))
            if isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
                flat += parts  # numbers, or tuples of them: most of a state, and nothing to look into
            else:
                stack += reversed(parts)
    return flat


def _parts(thing: object) -> list[object]:
    if isinstance(thing, np.ndarray):
        return [thing.dtype.str, str(thing.shape), *thing.ravel().tolist()]
    if isinstance(thing, dict):
        return [part for item in thing.items() for part in item]
    if isinstance(thing, list | tuple | deque):
        return list(thing)
    if isinstance(thing, set | frozenset):
        return sorted(thing, key=lambda part: (type(part).__name__, part if isinstance(part, int | str) else id(part)))
    if callable(thing):
        return [id(thing)]
    kind: Any = type(thing)  # which mypy does not take to be hashable
    names = [*_slots_of(kind), *getattr(thing, "__dict__", ())]
    if not names:
        return [repr(thing)]
    return [part for name in names if hasattr(thing, name) for part in (f".{name}", getattr(thing, name))]


@cache
def _slots_of(kind: type) -> list[str]:
    return [name for each in kind.__mro__ for name in getattr(each, "__slots__", ()) if not name.startswith("__")]


def check_unchanged(before: list[object], after: list[object]) -> None:
    """Raise IntegrityError if two states differ, naming the attribute at or before the first difference."""
    if before == after:
        return
    i = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), min(len(before), len(after)))
    name = next((part[1:] for part in before[:i][::-1] if isinstance(part, str) and part.startswith(".")), "")
    near = slice(max(i - 3, 0), i + 9)
    raise IntegrityError(f"a call that failed changed the state, near {name!r}: {before[near]} became {after[near]}")


def _names(requests: Sequence[KVRequest]) -> list[int | str]:
    return [request.request_id for request in requests]


def _show(slots: Int64Array) -> str:
    return np.array2string(slots, threshold=200, max_line_width=10**6, separator=", ")
