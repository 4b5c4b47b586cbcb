"""Allocators that are correct, and allocators with one fault each: what a contract must accept, and what it must catch."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from allocator_contract import MAX_MODEL_LEN

from pagedkv.allocation import NO_SLOT, Grant, KVPoolSettings
from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError
from pagedkv.kv_request import KVRequest


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
