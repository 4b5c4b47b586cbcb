"""A step over memory of a compiled kind: the whole decision, and the whole end, is one compiled function each."""

from collections.abc import Iterator
from typing import Any

from pagedkv.engine_step import BLOCKER, ENTRIES, FAILED, PREEMPTED, RAN_BEFORE, apply_step, decide_step, forward_passes
from pagedkv.jit import fixed_types
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.step import BLOCKERS, Step
from pagedkv.scheduling.step_path import StepArrays
from pagedkv.step_allocation import CompiledMemory
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import moved_blocks


class CompiledPath:
    """Decides by the rules of `engine`, of a kind that `pagedkv.engine_step` knows, as `pagedkv.sims.run_steps` does."""

    def __init__(self, roster: Roster, memory: CompiledMemory, engine: Any) -> None:
        self.engine, self.memory = engine, memory
        self._roster = roster
        # Their arguments have the same types in every step.
        self._decide, self._apply = fixed_types(decide_step.of(engine)), fixed_types(apply_step.of(engine))
        self._passes = fixed_types(forward_passes.of(engine))
        self._moved = fixed_types(moved_blocks.of(memory.arrays))

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""
        return self.memory.cached_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return self.memory.shared_slots

    @property
    def moved_blocks(self) -> tuple[int, int]:
        """Blocks that the step decided last copies from a second tier of the memory, and to it."""
        moved: tuple[int, int] = self._moved(self.memory.arrays, self.memory.rules)
        return moved

    def schedule(self, step: Step, arrays: StepArrays) -> None:
        """Decide a step and take its slots."""
        roster, memory = self._roster, self.memory
        self._decide(
            self.engine,
            roster.arrays,
            roster.requests.arrays,
            memory.arrays,
            memory.rules,
            roster.requests.segments,
            arrays.batch,
            arrays.preempted,
            arrays.failed,
            arrays.decision,
        )
        decided = arrays.decision.tolist()
        step.num_running_before, step.num_entries = decided[RAN_BEFORE], decided[ENTRIES]
        step.num_preempted, step.num_failed, step.blocker = decided[PREEMPTED], decided[FAILED], BLOCKERS[decided[BLOCKER]]

    def complete(self, step: Step, arrays: StepArrays) -> tuple[int, int, int]:
        """Apply a step, and give back what finished requests hold."""
        roster, memory = self._roster, self.memory
        counted: tuple[int, int, int] = self._apply(
            self.engine,
            roster.arrays,
            roster.requests.arrays,
            memory.arrays,
            memory.rules,
            roster.requests.segments,
            arrays.batch,
            step.num_entries,
            arrays.sampled,
            arrays.finished,
        )
        return counted

    def forward_passes(self, step: Step, arrays: StepArrays) -> Iterator[StepBatch]:
        """Yield what is computed together."""
        roster = self._roster
        number = self._passes(
            self.engine, roster.arrays, roster.requests.arrays, arrays.batch, step.num_entries, arrays.passes, arrays.ends
        )
        if not number:
            yield step.batch[: step.num_entries]
        first = 0
        for last in arrays.ends[:number].tolist():
            yield arrays.passes[first:last]
            first = last
