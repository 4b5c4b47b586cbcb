"""How a step is decided and applied, over memory of one kind: what `Scheduler` asks of it, and what a step leaves behind."""

from typing import NamedTuple, Protocol

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.decode_run import DecodeRun
from pagedkv.scheduling.step import Step
from pagedkv.step_batch import StepBatch, empty_batch


class StepArrays(NamedTuple):
    """What a step leaves behind, for compiled code."""

    batch: StepBatch
    preempted: Int64Array
    """Requests preempted by the decision, in order."""
    decision: Int64Array
    """See `pagedkv.scheduling.vllm_step`."""
    sampled: Int64Array
    """Requests that got an output token, in scheduling order."""
    finished: Int64Array
    """Those of them that are done."""

    @classmethod
    def empty(cls, max_num_seqs: int) -> "StepArrays":
        """Return those of a scheduler that has decided nothing."""
        preempted, sampled, finished = (np.zeros(max_num_seqs, np.int64) for _ in range(3))
        return cls(empty_batch(max_num_seqs), preempted, np.zeros(4, np.int64), sampled, finished)


class StepPath(Protocol):
    """The part of a scheduler that depends on its memory."""

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""

    def schedule(self, step: Step, arrays: StepArrays) -> None:
        """Decide a step and take its slots: write it into both, whose batch is the same."""

    def complete(self, step: Step, arrays: StepArrays) -> tuple[int, int, int]:
        """Apply a step, give back what finished requests hold; return (number sampled, tokens that they got, number finished)."""

    def decode_run(self, step: Step) -> DecodeRun:
        """Return how often a step that was decided would be decided again, for every request one token further on."""

    def repeat(self, step: Step, num_steps: int) -> None:
        """Take the slots of so many more steps of a decode run."""
