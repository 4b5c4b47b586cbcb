"""The contract between a scheduler and an allocator: one batched call per step.

The scheduler writes what it would like to run into a `StepBatch`; the allocator grants slots in that order and stops at the first
entry that does not fit now. A slot is room for the keys and values of one token in every layer. A row is a place in the running
batch; a request owns one from admission until it finishes or is preempted.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import ConfigError


class StepBatch(NamedTuple):
    """What one step computes, in scheduling order: first running requests, then admissions. Arrays of length max_num_seqs."""

    request: Int64Array
    """Index of the request in the request table."""
    row: Int32Array
    """Row of the running batch that holds its block table."""
    num_scheduled_tokens: Int64Array
    """Tokens that the step computes for it."""
    num_slots_needed: Int64Array
    """Slots it must hold for the step: tokens computed before plus those scheduled now."""
    num_known_tokens: Int64Array
    """Prompt and outputs so far: what vLLM's full-prompt gate wants to fit at admission."""
    admission_slots: Int64Array
    """Slots that `Allocator.admission_slots` set for it at arrival."""

    @classmethod
    def empty(cls, max_num_seqs: int) -> "StepBatch":
        """Return a batch for up to `max_num_seqs` entries."""
        n = max_num_seqs
        ints = [np.zeros(n, np.int64) for _ in range(4)]
        return cls(np.zeros(n, np.int64), np.zeros(n, np.int32), *ints)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPoolSettings:
    """What an allocator is built from. Every allocator reads what concerns it."""

    num_blocks: int
    """Blocks in the pool, vLLM's null block included; every allocator divides the same num_blocks * block_size slots."""
    block_size: int = 16
    """Tokens per block."""
    max_num_seqs: int = 256
    """Rows of the running batch."""
    max_model_len: int
    """Longest prompt + output of a request, in tokens."""
    contiguous_heap: str = "buddy"
    """Which heap places contiguous reservations: a name in `pagedkv.heaps`."""
    watermark: float = 0.0
    """Share of the blocks that an admission must leave free while something runs."""
    reserve_full_isl: bool = True
    """Admit a request only if all its known tokens fit now (vLLM's scheduler_reserve_full_isl)."""

    state_slots: int = 0
    """Slots' worth of memory that each running request takes for state of fixed size (linear attention, Mamba)."""

    def __post_init__(self) -> None:
        """Refuse what no allocator can work with.

        Raises:
            ConfigError: With the values that would work.
        """
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}: needs 1 or more")
        if not 0 <= self.watermark < 1 or self.state_slots < 0:
            raise ConfigError(f"watermark {self.watermark} needs 0 or more, below 1; state_slots {self.state_slots} 0 or more")

    @property
    def num_slots(self) -> int:
        """Slots in the pool."""
        return self.num_blocks * self.block_size


class Allocator(Protocol):
    """Hands out KV slots. It has no clock and no randomness; a shortage is a value, and a refusal changes nothing."""

    name: str
    """Its name in the registry."""
    placement: str
    """How it finds room: "block", or the name of the heap."""
    usable_slots: int
    """Slots that requests can get: the denominator of every share."""
    max_model_len: int
    """Longest request, in tokens, that its tables have room for."""
    unit_slots: int
    """Slots in one unit of `units_held`: the block size, or 1."""
    units_held: Int32Array
    """Units that each row holds for tokens now, by row."""
    state_units: int
    """Units that each running request holds for its state besides."""

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return the slots to take in one piece at admission, 0 if the request grows step by step, None if it can never fit."""

    def allocate_slots(self, batch: StepBatch, first: int, last: int, num_running: int) -> int:
        """Grant slots to entries `first` to `last` of `batch`, in order, until one does not fit.

        Args:
            batch: The step; entries from `num_running` on are admissions.
            first: First entry to serve.
            last: One past the last entry to serve.
            num_running: How many entries run already.

        Returns:
            The index of the first entry not served: `last` if all were.
        """

    def free(self, row: int) -> None:
        """Take back all that `row` holds."""

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""

    @property
    def rounding_slots(self) -> int:
        """Slots lost to the heap's rounding of live reservations."""

    def check_integrity(self) -> None:
        """Raise IntegrityError, with the state dumped, if an invariant is broken."""
