"""A step over memory of a compiled kind: the whole decision, and the whole end, is one compiled function each."""

from pagedkv.decode_run import ONE_STEP, DecodeRun
from pagedkv.errors import ConfigError
from pagedkv.jit import fixed_types
from pagedkv.scheduling.completion import complete_and_free
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.step import BLOCKERS, Step
from pagedkv.scheduling.step_path import StepArrays
from pagedkv.scheduling.vllm_step import BLOCKER, ENTRIES, PREEMPTED, RAN_BEFORE, SchedulerLimits, schedule_step
from pagedkv.step_allocation import CompiledMemory


class CompiledPath:
    """Prefix caching, priority, preemption, drafts and forks, all of them compiled, as far as the memory has them."""

    def __init__(self, roster: Roster, allocator: CompiledMemory, limits: SchedulerLimits) -> None:
        """Decide for `roster`.

        Raises:
            ConfigError: If `allocator` has no slots for the drafts.
        """
        if allocator.lookahead_slots < limits.num_speculative_tokens:
            raise ConfigError(
                f"num-speculative-tokens is {limits.num_speculative_tokens}: drafts need paged memory with as many "
                f"lookahead_slots; {allocator.name} has {allocator.lookahead_slots}"
            )
        self._roster, self._allocator, self._limits = roster, allocator, limits
        # Their arguments have the same types in every step.
        self._schedule_step, self._complete_and_free = fixed_types(schedule_step), fixed_types(complete_and_free)

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""
        return self._allocator.cached_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return self._allocator.shared_slots

    def schedule(self, step: Step, arrays: StepArrays) -> None:
        """Decide a step and take its slots."""
        roster, allocator, decision = self._roster, self._allocator, arrays.decision
        self._schedule_step(
            roster.arrays,
            roster.requests.arrays,
            allocator.arrays,
            roster.requests.segments,
            self._limits,
            allocator.rules,
            arrays.batch,
            arrays.preempted,
            decision,
        )
        decided = decision.tolist()
        step.num_running_before, step.num_entries = decided[RAN_BEFORE], decided[ENTRIES]
        step.num_preempted, step.blocker = decided[PREEMPTED], BLOCKERS[decided[BLOCKER]]

    def complete(self, step: Step, arrays: StepArrays) -> tuple[int, int, int]:
        """Apply a step, and give back what finished requests hold."""
        roster, allocator = self._roster, self._allocator
        batch, _, _, sampled, finished = arrays
        counted: tuple[int, int, int] = self._complete_and_free(
            roster.arrays, roster.requests.arrays, allocator.arrays, allocator.rules, batch, step.num_entries, sampled, finished
        )
        return counted

    def decode_run(self, step: Step) -> DecodeRun:
        """Return that the next step is one of its own: `pagedkv.sims.run_steps` runs many without asking."""
        del step
        return ONE_STEP

    def repeat(self, step: Step, num_steps: int) -> None:
        """Refuse: no run was offered."""
        raise AssertionError(f"{num_steps} steps more than {step.num_entries} entries were told")
