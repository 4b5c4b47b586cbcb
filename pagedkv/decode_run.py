"""Runs of steps that are decided alike: between two events a scheduler need not be asked what it will say."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.step_batch import StepBatch


class DecodeRun(NamedTuple):
    """Steps in which the requests of the step decided last get one token more each, and nothing else is decided."""

    num_steps: int
    """How many at most, that step included. In the last of them a request may end; after one, the scheduler must be asked."""
    grain: int = 0
    """Units that a row takes when all that it holds is full; 0: that does not happen within these steps."""
    spare_slots: int = 0
    """Slots that rows can take so before memory is a question."""


ONE_STEP = DecodeRun(1)


def decodes_all(batch: StepBatch, num_running: int) -> bool:
    """Return whether each of `batch`, which is all who run, computes the one token that it lacks to make the next."""
    return (
        0 < batch.size == num_running
        and bool((batch["num_scheduled_tokens"] == 1).all())
        and bool((batch["num_slots_needed"] == batch["num_known_tokens"]).all())
    )


def steps_within(batch: StepBatch, slots_held: Int32Array) -> int:
    """Return how many steps the rows of `batch`, this one included, get through with the slots that they hold."""
    return 1 + int((slots_held[batch["row"]] - batch["num_slots_needed"]).min())


def steps_to_an_end(requests: RequestArrays, batch: StepBatch) -> int:
    """Return how many steps it takes, that of `batch` included, until the first of those in it may have all its tokens."""
    own = requests[batch["request"]]
    return int((own["prompt_tokens"] + own["output_tokens"] - batch["num_known_tokens"]).min())


def move_on(batch: StepBatch, num_steps: int) -> None:
    """Let those of `batch` who compute a token be `num_steps` further on."""
    computing = batch["num_scheduled_tokens"] > 0
    batch["num_slots_needed"][computing] += num_steps
    batch["num_known_tokens"][computing] += num_steps


def growth(batch: StepBatch, slots_held: Int64Array, grain_slots: int, num_steps: int) -> tuple[Int64Array, Int64Array]:
    """Return when which rows must grow in the `num_steps` steps after that of `batch`, in the order in which they are asked for.

    Args:
        batch: The step decided last, for which all rows have slots.
        slots_held: By entry of `batch`.
        grain_slots: How many a row takes at once.
        num_steps: How many steps follow.

    Returns:
        (step, from 1 on; entry of `batch`), by step, then by entry. O(n log n) in their number.

    Example:
        >>> from pagedkv.step_batch import empty_batch
        >>> batch = empty_batch(2)
        >>> batch["num_slots_needed"] = 15, 30
        >>> steps, entries = growth(batch, np.array([16, 32]), 16, 20)
        >>> steps.tolist(), entries.tolist()
        ([2, 3, 18, 19], [0, 1, 0, 1])
    """
    first = slots_held - batch["num_slots_needed"] + 1
    times = np.maximum(num_steps - first, -1) // grain_slots + 1
    entries = np.repeat(np.arange(batch.size), times)
    nth = np.arange(entries.size) - np.repeat(np.cumsum(times) - times, times)
    steps = first[entries] + nth * grain_slots
    order = np.lexsort((entries, steps))
    return steps[order], entries[order]
