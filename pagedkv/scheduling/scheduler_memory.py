"""The memory under a scheduler as a memory map wants to see it: who runs, and where the tokens of each lie."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from pagedkv.allocators.hybrid import group_slots
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.block_table import block_slots
from pagedkv.errors import ConfigError
from pagedkv.growing_steps import GrowingStepAllocator
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.interval_steps import IntervalStepAllocator
from pagedkv.kv_request import KVRequest
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.reuse_steps import ReuseStepAllocator
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.slot_steps import SlotStepAllocator
from pagedkv.scheduling.step import StepScheduler
from pagedkv.snapshot import Mapped
from pagedkv.step_allocation import RequestByRequest, RowMemory
from pagedkv.virtual_steps import VirtualStepAllocator


def memory_of(scheduler: StepScheduler) -> Mapped:
    """Return the memory of the batch that `scheduler` runs now, request by request; tokens of a step in flight are not computed.

    Raises:
        ConfigError: If it is memory of a kind that cannot be looked at.
    """
    allocator = scheduler.allocator
    if isinstance(allocator, RequestByRequest):
        return allocator.up_to_date()
    if isinstance(allocator, PagedStepAllocator):
        return _PagedRows(scheduler, allocator)
    if isinstance(allocator, HybridStepAllocator):
        return _HybridRows(scheduler, allocator)
    if isinstance(allocator, RadixRows):
        return _RadixRows(scheduler, allocator)
    if isinstance(allocator, ReuseStepAllocator):
        return _ReuseRows(scheduler, allocator)
    if isinstance(allocator, GrowingStepAllocator | IntervalStepAllocator | VirtualStepAllocator):
        return _UnsharedRows(scheduler, allocator)
    if isinstance(allocator, SlotStepAllocator):
        return _SlotRows(scheduler, allocator)
    raise ConfigError(f"no memory map of {allocator.name}: it does not say where tokens lie")


class _Rows(ABC):
    """What all kinds of rows have in common."""

    num_groups = 1

    def __init__(self, scheduler: StepScheduler, allocator: RowMemory, *, num_slots: int) -> None:
        requests = scheduler.requests.arrays
        self.placement, self.unit_slots, self.rounding_slots = allocator.placement, allocator.unit_slots, allocator.rounding_slots
        self.usable_slots, self.free_slots, self.num_slots = allocator.usable_slots, allocator.free_slots, num_slots
        self.state_slots = allocator.state_units * self.unit_slots
        self._requests: list[KVRequest] = []
        self._rows: dict[KVRequest, int] = {}
        for index in scheduler.arrays.running[: scheduler.num_running].tolist():
            record = requests[index]
            request = KVRequest(request_id=index, num_tokens=int(record["num_known_tokens"]))
            request.num_computed_tokens = int(record["num_computed_tokens"])
            self._requests.append(request)
            self._rows[request] = int(record["row"])

    def live_requests(self) -> Sequence[KVRequest]:
        """Return who runs, in the order of the batch."""
        return self._requests

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the slots of its row."""
        return self._slots_of(self._rows[request], group)

    @abstractmethod
    def _slots_of(self, row: int, group: int) -> Int64Array:
        """Return the slots of `row` in a group of layers, in the order of its tokens."""


class _PoolRows(_Rows):
    """Rows over a pool of blocks."""

    def __init__(self, scheduler: StepScheduler, allocator: PagedStepAllocator | HybridStepAllocator) -> None:
        super().__init__(scheduler, allocator, num_slots=allocator.usable_slots + allocator.unit_slots)
        self._pool = allocator.pool

    def cached_slots(self) -> Int64Array:
        """Return the slots of free blocks that carry a key."""
        keyed = self._pool.cache.blocks()
        return block_slots(keyed[self._pool.ref_cnt[keyed] == 0], self.unit_slots)

    def taken_slots(self) -> Int64Array:
        """Return the slots of blocks that somebody holds, be it for state."""
        return block_slots(np.flatnonzero(self._pool.ref_cnt), self.unit_slots)


class _PagedRows(_PoolRows):
    def __init__(self, scheduler: StepScheduler, allocator: PagedStepAllocator) -> None:
        super().__init__(scheduler, allocator)
        self._allocator = allocator

    def _slots_of(self, row: int, group: int) -> Int64Array:
        return block_slots(self._allocator.tables.of(row), self.unit_slots)


class _HybridRows(_PoolRows):
    def __init__(self, scheduler: StepScheduler, allocator: HybridStepAllocator) -> None:
        super().__init__(scheduler, allocator)
        self._allocator, self.num_groups = allocator, allocator.num_groups

    def _slots_of(self, row: int, group: int) -> Int64Array:
        size = int(self._allocator.arrays.groups["block_size"][group])
        return group_slots(self._allocator.block_table(row, group), size, self.unit_slots)


class _RadixRows(_Rows):
    def __init__(self, scheduler: StepScheduler, allocator: RadixRows) -> None:
        super().__init__(scheduler, allocator, num_slots=allocator.usable_slots + allocator.unit_slots)
        self._allocator = allocator

    def cached_slots(self) -> Int64Array:
        """Return the slots of nodes that nobody locks."""
        return self._allocator.cache.cached_slots() if self._allocator.enable_caching else NO_SLOTS

    def _slots_of(self, row: int, group: int) -> Int64Array:
        return block_slots(self._allocator.tables[row, : self._allocator.units_held[row]], self.unit_slots)


class _ReuseRows(_Rows):
    def __init__(self, scheduler: StepScheduler, allocator: ReuseStepAllocator) -> None:
        super().__init__(scheduler, allocator, num_slots=allocator.num_slots)
        self._allocator = allocator

    def cached_slots(self) -> Int64Array:
        """Return the slots of stored blocks that nobody holds."""
        return self._allocator.memory.cached_slots()

    def taken_slots(self) -> Int64Array:
        """Return the slots of blocks that somebody holds, be it for state."""
        return self._allocator.taken_slots()

    def _slots_of(self, row: int, group: int) -> Int64Array:
        return self._allocator.slots_of_row(row)


class _UnsharedRows(_Rows):
    def __init__(
        self, scheduler: StepScheduler, allocator: GrowingStepAllocator | IntervalStepAllocator | VirtualStepAllocator
    ) -> None:
        super().__init__(scheduler, allocator, num_slots=allocator.num_slots)
        self._allocator = allocator

    def cached_slots(self) -> Int64Array:
        """Return none: nothing is kept for others."""
        return NO_SLOTS

    def taken_slots(self) -> Int64Array:
        """Return the slots that somebody holds, be it for state or rounding."""
        return self._allocator.taken_slots()

    def _slots_of(self, row: int, group: int) -> Int64Array:
        return self._allocator.slots_of_row(row)


class _SlotRows(_Rows):
    def __init__(self, scheduler: StepScheduler, allocator: SlotStepAllocator) -> None:
        super().__init__(scheduler, allocator, num_slots=allocator.num_slots)
        self._allocator = allocator

    def cached_slots(self) -> Int64Array:
        """Return the cells of what idle server slots remember."""
        return self._allocator.kept_slots()

    def _slots_of(self, row: int, group: int) -> Int64Array:
        return self._allocator.slots_of_row(row)
