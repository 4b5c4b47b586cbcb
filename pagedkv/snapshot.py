"""Where the KV memory is at one moment: what a memory map draws, for any allocator of the contract."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.allocation import NO_SLOT
from pagedkv.arrays import Int8Array, Int32Array, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.kv_request import KVRequest

NOBODY = -1
"""The owner of a unit that no request holds."""


class Mapped(Protocol):
    """Memory of which a map can be drawn: what of `Allocator` it takes."""

    @property
    def placement(self) -> str:
        """How it finds room."""

    @property
    def unit_slots(self) -> int:
        """Slots that are taken and given back together."""

    @property
    def num_slots(self) -> int:
        """Slot ids are 0 to num_slots - 1."""

    @property
    def usable_slots(self) -> int:
        """Slots that requests can get."""

    @property
    def state_slots(self) -> int:
        """Slots' worth of state of each running request."""

    @property
    def num_groups(self) -> int:
        """Layer groups that keep slots of their own."""

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds, cached ones included."""

    @property
    def rounding_slots(self) -> int:
        """Slots lost to a heap's rounding."""

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold slots."""

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots taken for the tokens of `request`."""

    def cached_slots(self) -> Int64Array:
        """Return the slots that nobody holds but that keep content for reuse."""


@runtime_checkable
class TellsAllTaken(Protocol):
    """An allocator that tells where state and rounding lie too."""

    def taken_slots(self) -> Int64Array:
        """Return the slots that somebody has, for tokens or whatever else, each once."""


class UnitState(IntEnum):
    """What a unit is for."""

    FREE = 0
    """Nobody holds it, and nothing is in it."""
    CACHED = 1
    """Nobody holds it, but it keeps content for reuse: free for anyone who needs it."""
    HELD = 2
    """A live request holds it, or some of its slots, for its tokens."""
    SET_ASIDE = 3
    """Never handed out (a null block, the rest behind the last whole unit), a request's state, or a heap's rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """The usable slots of a pool, each in one part."""

    tokens: int
    """Slots that hold a computed token of a live request; shared ones count once."""
    unfilled: int
    """Other slots held for tokens. Whether they will ever be filled only hindsight tells."""
    state: int
    """Slots' worth of state of the live requests."""
    cached: int
    """Slots kept for reuse that nobody holds."""
    free: int
    """Slots that nobody holds and that keep nothing."""
    rounding: int
    """Slots lost to a heap's rounding."""

    @property
    def usable(self) -> int:
        """Slots in all parts: the allocator's usable_slots."""
        return self.tokens + self.unfilled + self.state + self.cached + self.free + self.rounding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemorySnapshot:
    """A pool unit by unit, and who holds what. All arrays are its own: what happens later does not change them.

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> from pagedkv.allocators import ALLOCATORS
        >>> allocator = ALLOCATORS.load("paged")(KVPoolSettings(num_blocks=5, block_size=4, max_model_len=16))
        >>> request = KVRequest(request_id="a", num_tokens=6)
        >>> _ = allocator.allocate_slots(request, 6)
        >>> request.num_computed_tokens = 6
        >>> now = snapshot(allocator)
        >>> [UnitState(state).name for state in now.states]
        ['SET_ASIDE', 'HELD', 'HELD', 'FREE', 'FREE']
        >>> now.tokens.tolist(), now.unfilled.tolist()
        ([0, 4, 2, 0, 0], [0, 0, 2, 0, 0])
        >>> now.parts.tokens, now.parts.unfilled, now.parts.free
        (6, 2, 8)
    """

    unit_slots: int
    """Slots in a unit; unit u is the slots from u * unit_slots on, the last one perhaps fewer."""
    num_slots: int
    """Slots in the pool."""
    requests: tuple[int | str, ...]
    """Names of the live requests, in order of admission: their places here are what `owners` and `tables` speak of."""
    states: Int8Array
    """By unit: its `UnitState`. With several kinds of slots in a unit, held goes before cached before set aside."""
    ref_counts: Int32Array
    """By unit: live requests that hold it, or slots in it."""
    owners: Int32Array
    """By unit: the first of them, NOBODY if there is none."""
    tokens: Int32Array
    """By unit: slots that hold a computed token of a live request."""
    unfilled: Int32Array
    """By unit: other slots held."""
    tables: tuple[tuple[Int64Array, ...], ...]
    """By request and layer group: the units it holds for its tokens, in the order of the tokens."""
    parts: MemoryParts
    """The whole pool in slots."""
    unplaced_slots: int
    """Slots of state or rounding of which the allocator does not tell where they lie: as many slots shown as free are not."""


def snapshot(allocator: Mapped, unit_slots: int | None = None) -> MemorySnapshot:
    """Return where the memory of `allocator` is now; changes nothing. O(num_slots + slots held).

    Args:
        allocator: Any. Computed tokens are what its requests' num_computed_tokens says.
        unit_slots: Slots in a unit of the map. By default what the allocator takes and gives back together.

    Raises:
        ConfigError: If `unit_slots` is below 1.
    """
    unit_slots = allocator.unit_slots if unit_slots is None else unit_slots
    if unit_slots < 1:
        raise ConfigError(f"a memory map in units of {unit_slots} slots: needs 1 or more")
    num_slots, requests = allocator.num_slots, tuple(allocator.live_requests())
    num_units = -(-num_slots // unit_slots)
    ref_counts, owners = np.zeros(num_units, np.int32), np.full(num_units, NOBODY, np.int32)
    held, filled = np.zeros(num_slots, np.bool_), np.zeros(num_slots, np.bool_)
    tables = []
    for i, request in enumerate(requests):
        table = []
        for slots, computed in _slots_by_group(allocator, request):
            held[slots] = filled[computed] = True
            table.append(_distinct(slots // unit_slots))
        units = np.unique(np.concatenate(table))
        ref_counts[units] += 1
        owners[units[owners[units] == NOBODY]] = i
        tables.append(tuple(table))
    cached, aside = np.zeros(num_slots, np.bool_), np.zeros(num_slots, np.bool_)
    kept = allocator.cached_slots()
    cached[kept[kept < num_slots]] = True
    aside[_never_handed_out(allocator)] = True
    if tells_all := isinstance(allocator, TellsAllTaken):
        taken = allocator.taken_slots()
        aside[taken[~held[taken]]] = True
    tokens, unfilled = _by_unit(held & filled, unit_slots), _by_unit(held & ~filled, unit_slots)
    states = np.select(
        [ref_counts > 0, _by_unit(cached, unit_slots) > 0, _by_unit(aside, unit_slots) > 0],
        [UnitState.HELD, UnitState.CACHED, UnitState.SET_ASIDE],
        UnitState.FREE,
    ).astype(np.int8)
    parts = MemoryParts(
        tokens=int(tokens.sum()),
        unfilled=int(unfilled.sum()),
        state=len(requests) * allocator.state_slots,
        cached=int(cached.sum()),
        free=allocator.free_slots - int(cached.sum()),
        rounding=allocator.rounding_slots,
    )
    return MemorySnapshot(
        unit_slots=unit_slots,
        num_slots=num_slots,
        requests=tuple(request.request_id for request in requests),
        states=states,
        ref_counts=ref_counts,
        owners=owners,
        tokens=tokens,
        unfilled=unfilled,
        tables=tuple(tables),
        parts=parts,
        unplaced_slots=0 if tells_all else parts.state + parts.rounding,
    )


def _slots_by_group(allocator: Mapped, request: KVRequest) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Yield, for each layer group, the slots that `request` holds in the pool, and those of them that hold a computed token."""
    for group in range(allocator.num_groups):
        slots = allocator.slots_held(request, group)
        inside = (slots != NO_SLOT) & (slots < allocator.num_slots)
        computed = slots[: request.num_computed_tokens]
        yield slots[inside], computed[inside[: request.num_computed_tokens]]


def _never_handed_out(allocator: Mapped) -> Int64Array:
    """Return the slots that no request can get: the null block at the beginning, or what is left over at the end."""
    num_slots, num_reserved = allocator.num_slots, allocator.num_slots - allocator.usable_slots
    first = 0 if allocator.placement == "block" else num_slots - num_reserved
    return np.arange(first, first + num_reserved)


def _distinct(units: Int64Array) -> Int64Array:
    """Return `units` without repetitions, in order of first appearance."""
    runs = units[np.flatnonzero(np.diff(units, prepend=NO_SLOT))]
    distinct: Int64Array = runs[np.sort(np.unique(runs, return_index=True)[1])]
    return distinct


def _by_unit(slots: npt.NDArray[np.bool_], unit_slots: int) -> Int32Array:
    """Return how many of each unit's slots are marked."""
    starts = np.arange(0, slots.size, unit_slots)
    return np.add.reduceat(slots, starts, dtype=np.int32) if slots.size else np.zeros(0, np.int32)
