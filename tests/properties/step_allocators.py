"""Allocators a step at a time with rows that hold something, and oracles that know what each step grants."""

from collections.abc import Callable
from typing import Any

from pagedkv.allocation import KVPoolSettings
from pagedkv.heaps import HEAPS
from pagedkv.interval_steps import IntervalStepAllocator
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.step_allocation import StepAllocator, step_allocator
from pagedkv.step_batch import StepBatch, empty_batch

MAX_NUM_SEQS = 5

MAX_MODEL_LEN = 24


class PagedOracle:
    """vLLM's block pool without prefix caching: the free queue is a list, the next block to hand out first."""

    def __init__(self, pool: KVPoolSettings) -> None:
        self.pool = pool
        self.queue = list(range(1, pool.num_blocks))
        self.tables: dict[int, list[int]] = {}
        self.states: dict[int, list[int]] = {}

    def blocks(self, tokens: int) -> int:
        return (tokens + self.pool.block_size - 1) // self.pool.block_size

    def grant(self, batch: StepBatch, i: int, *, admission: bool) -> bool:
        table = self.tables.get(int(batch["row"][i]), [])
        state = self.blocks(self.pool.state_slots) if admission else 0
        kept_free = state + (int(self.pool.watermark * self.pool.num_blocks) if admission and i > 0 else 0)
        if admission and self.pool.reserve_full_isl and self.blocks(batch["num_known_tokens"][i]) + kept_free > len(self.queue):
            return False
        need = self.blocks(batch["num_slots_needed"][i]) - len(table)
        if need + kept_free > len(self.queue):
            return False
        self.tables[int(batch["row"][i])] = table + self.taken(need)
        if admission:
            self.states[int(batch["row"][i])] = self.taken(state)
        return True

    def taken(self, count: int) -> list[int]:
        blocks, self.queue = self.queue[:count], self.queue[count:]
        return blocks

    def free(self, row: int) -> None:
        self.queue = self.states.pop(row)[::-1] + self.tables.pop(row)[::-1] + self.queue

    def agrees_with(self, allocator: PagedStepAllocator) -> None:
        assert allocator.pool.free_queue().tolist() == self.queue
        held = [block for table in (*self.tables.values(), *self.states.values()) for block in table]
        assert sorted(held + self.queue) == list(range(1, self.pool.num_blocks))
        assert allocator.pool.ref_cnt.tolist() == [held.count(block) for block in range(self.pool.num_blocks)]
        for row in range(self.pool.max_num_seqs):
            assert allocator.tables.of(row).tolist() == self.tables.get(row, [])
        for row, state in self.states.items():
            assert allocator.state_tables[row].tolist() == state
        assert allocator.rounding_slots == 0


RESERVATIONS: dict[str, Callable[[int, int], int]] = {
    "contiguous-max": lambda prompt, output: MAX_MODEL_LEN,
    "contiguous-oracle": lambda prompt, output: prompt + output,
    "contiguous-pow2": lambda prompt, output: min(prompt + next(2**k for k in range(9) if 2**k >= output), MAX_MODEL_LEN),
}


class ContiguousOracle:
    """One interval per row, placed by a second heap of the same kind."""

    def __init__(self, pool: KVPoolSettings) -> None:
        self.heap = HEAPS.load(pool.contiguous_heap)(pool.num_slots)
        self.state = pool.state_slots
        self.intervals: dict[int, tuple[int, int]] = {}

    def grant(self, batch: StepBatch, i: int, *, admission: bool) -> bool:
        if admission:
            size = int(batch["admission_slots"][i])
            address = self.heap.reserve(size + self.state)
            if address is None:
                return False
            self.intervals[int(batch["row"][i])] = (address, size)
        return True

    def free(self, row: int) -> None:
        self.heap.release(self.intervals.pop(row)[0])

    def agrees_with(self, allocator: IntervalStepAllocator) -> None:
        sizes = [self.intervals.get(row, (0, 0))[1] for row in range(MAX_NUM_SEQS)]
        assert allocator.units_held.tolist() == sizes
        for row, (address, size) in self.intervals.items():
            assert allocator.slots_of_row(row).tolist() == list(range(address, address + size))
        asked = {address: size + self.state for address, size in self.intervals.values()}
        slots = [slot for address, size in asked.items() for slot in range(address, address + self.heap.rounded(size))]
        assert sorted(slots) == allocator.taken_slots().tolist()
        assert len(set(slots)) == len(slots)
        assert allocator.free_slots == allocator.usable_slots - len(slots)
        assert allocator.rounding_slots == len(slots) - sum(asked.values())


POOL = KVPoolSettings(num_blocks=8, block_size=4, max_num_seqs=3, max_model_len=16)


def admitted(
    name: str,
    *slots: int,
    pool: KVPoolSettings = POOL,
    new: Callable[[str, KVPoolSettings], StepAllocator] = step_allocator,
) -> Any:
    """An allocator in which row i holds slots[i]."""
    allocator = new(name, pool)
    batch = empty_batch(POOL.max_num_seqs)
    batch["row"][:] = range(POOL.max_num_seqs)
    for i, n in enumerate(slots):
        batch["num_slots_needed"][i] = batch["num_known_tokens"][i] = batch["admission_slots"][i] = batch["num_scheduled_tokens"][
            i
        ] = n
    assert allocator.allocate_slots(batch, 0, len(slots), 0) == len(slots)
    allocator.check_integrity()
    return allocator
