"""TensorRT-LLM's block manager for a whole step at once, in compiled code."""

import numpy as np

import pagedkv.scheduling.reuse_grants  # noqa: F401 - what compiled code does with this kind of memory
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit
from pagedkv.reuse_rows import ReuseArrays, ReuseRules, admit_row, find_nothing, grow_row, release_row
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import NEVER, slots_of


@lean_jit
def _allocate_slots(memory: ReuseArrays, rules: ReuseRules, batch: StepBatch, first: int, last: int) -> int:
    for i in range(first, last):
        row, slots = batch["row"][i], batch["num_slots_needed"][i]
        if memory.num_blocks[row] > 0:
            fits = grow_row(memory, rules, row, slots)
        else:
            find_nothing(memory)
            fits = admit_row(memory, rules, row, slots, batch["num_known_tokens"][i], rules.watermark_blocks if i > 0 else 0)
        if not fits:
            return i
    return last


class ReuseStepAllocator:
    """What `allocator` does request by request, row by row, in its pool.

    What requests share is for a compiled scheduler (`pagedkv.scheduling.tensorrt_llm_step`), not for the calls of this class.
    """

    rounding_slots = lookahead_slots = 0

    def __init__(self, allocator: TensorRTLLMAllocator) -> None:
        self.memory = memory = allocator.memory
        self.name, self.placement = allocator.name, allocator.placement
        self.num_slots, self.usable_slots = allocator.num_slots, allocator.usable_slots
        self.max_model_len = allocator.max_model_len
        self.unit_slots, self.state_units = allocator.unit_slots, allocator.state_slots // allocator.unit_slots
        self.admission_slots = allocator.admission_slots
        self.arrays, self.rules = memory.arrays, memory.rules
        self.units_held = self.arrays.num_blocks

    def all_admission_slots(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> Int64Array:
        """Return `admission_slots` for many requests at once, NEVER where it is None."""
        tokens = prompt_tokens + output_tokens - 1
        blocks = -(-tokens // self.unit_slots) + self.state_units
        return np.where((blocks * self.unit_slots <= self.num_slots) & (tokens <= self.max_model_len), 0, NEVER)

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Take blocks in order until one entry does not fit; return its index. O(entries + blocks * log blocks)."""
        del num_running
        return int(_allocate_slots(self.arrays, self.rules, batch, first, last))

    def free(self, row: int) -> None:
        """Give the blocks of `row` back."""
        release_row(self.arrays, row)

    def slots_of_row(self, row: int) -> Int64Array:
        """Return the slots of the blocks in the table of `row`."""
        return self.memory.slots_of_row(row)

    def taken_slots(self) -> Int64Array:
        """Return the slots of blocks that somebody holds, be it for state."""
        return self.memory.taken_slots()

    @property
    def free_slots(self) -> int:
        """Slots of the blocks on the GPU that nobody holds."""
        return self.memory.free_slots

    @property
    def cached_slots(self) -> int:
        """Free slots that keep content for reuse."""
        return self.memory.num_cached_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return int(slots_of(self.arrays, self.rules)[2])

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pool and tree fit together, and with what rows hold. O(blocks + nodes)."""
        self.memory.check_rows(np.flatnonzero(self.units_held).tolist())
