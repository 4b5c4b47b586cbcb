"""What a step computes: the entries that a scheduler asks slots for and a step-time model puts a price on."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array


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
