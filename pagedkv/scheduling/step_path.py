"""How a step is decided and applied, over memory of one kind: what `Scheduler` asks of it, and what a step leaves behind."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.engine_step import NUM_DECIDED
from pagedkv.scheduling.step import Step
from pagedkv.step_batch import StepBatch, empty_batch


class StepArrays(NamedTuple):
    """What a step leaves behind, for compiled code."""

    batch: StepBatch
    preempted: Int64Array
    """Requests preempted by the decision, in order."""
    failed: Int64Array
    """Requests that the decision gave up, in order."""
    decision: Int64Array
    """See `pagedkv.engine_step`."""
    sampled: Int64Array
    """Requests that got an output token, in scheduling order."""
    finished: Int64Array
    """Those of them that are done."""
    passes: StepBatch
    """What is computed together, pass after pass, where that is not the batch."""
    ends: Int64Array
    """Where each pass ends in `passes`."""

    @classmethod
    def empty(cls, max_num_seqs: int, *, max_pass_entries: int = 0, max_passes: int = 0) -> "StepArrays":
        """Return those of a scheduler that has decided nothing, with room for passes."""
        preempted, failed, sampled, finished = (np.zeros(max_num_seqs, np.int64) for _ in range(4))
        return cls(
            batch=empty_batch(max_num_seqs),
            preempted=preempted,
            failed=failed,
            decision=np.zeros(NUM_DECIDED, np.int64),
            sampled=sampled,
            finished=finished,
            passes=empty_batch(max_pass_entries),
            ends=np.zeros(max_passes, np.int64),
        )


class StepPath(Protocol):
    """The part of a scheduler that depends on its memory."""

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""

    @property
    def moved_blocks(self) -> tuple[int, int]:
        """Blocks that the step decided last copies from a second tier of the memory, and to it."""

    def schedule(self, step: Step, arrays: StepArrays) -> None:
        """Decide a step and take its slots: write it into both, whose batch is the same."""

    def complete(self, step: Step, arrays: StepArrays) -> tuple[int, int, int]:
        """Apply a step, give back what finished requests hold; return (number sampled, tokens that they got, number finished)."""

    def forward_passes(self, step: Step, arrays: StepArrays) -> Iterator[StepBatch]:
        """Yield what a step that was decided computes together."""
