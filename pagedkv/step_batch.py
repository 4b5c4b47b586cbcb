"""What a step computes: the entries that a scheduler asks slots for and a step-time model puts a price on."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

STEP_ENTRY = np.dtype(
    [
        ("request", "<i8"),
        ("num_scheduled_tokens", "<i8"),
        ("num_slots_needed", "<i8"),
        ("num_known_tokens", "<i8"),
        ("admission_slots", "<i8"),
        ("num_accepted_tokens", "<i8"),
        ("row", "<i4"),
    ],
    align=True,
)
"""One request of a step:

* request: its index in the request table;
* num_scheduled_tokens: tokens that the step computes for it;
* num_slots_needed: slots it must hold for the step: tokens computed before plus those scheduled now;
* num_known_tokens: prompt and outputs so far: what vLLM's full-prompt gate wants to fit at admission;
* admission_slots: what `Allocator.admission_slots` set for it at arrival;
* num_accepted_tokens: of the drafts that it verifies, those that the model would have generated too: known when the step is
  computed, so whoever owns the clock writes it before the step is completed (speculative decoding; else 0). `HELD`: it gets no
  token, not even the usual one, and computes its last one again: a beam that waits for the others of its search;
* row: the row of the running batch that holds its block table.
"""

HELD = -1
"""In num_accepted_tokens."""

StepBatch: TypeAlias = npt.NDArray[np.void]
"""`STEP_ENTRY` [max_num_seqs], in scheduling order: first running requests, then admissions."""


def empty_batch(max_num_seqs: int) -> StepBatch:
    """Return a batch for up to `max_num_seqs` entries."""
    return np.zeros(max_num_seqs, STEP_ENTRY)
