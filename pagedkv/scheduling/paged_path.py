"""A step over paged memory: the whole decision, and the whole end, is one compiled function each."""

from pagedkv.decode_run import ONE_STEP, DecodeRun
from pagedkv.errors import ConfigError
from pagedkv.free_queue import NUM_KEYED, NUM_SHARES
from pagedkv.jit import fixed_types
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.completion import complete_paged_step
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.step import BLOCKERS, Step
from pagedkv.scheduling.step_path import StepArrays
from pagedkv.scheduling.vllm_step import BLOCKER, ENTRIES, PREEMPTED, RAN_BEFORE, SchedulerLimits, schedule_step

# Their arguments have the same types in every scheduler.
_schedule_step = fixed_types(schedule_step)
_complete_paged_step = fixed_types(complete_paged_step)


class PagedPath:
    """Prefix caching, priority, preemption, drafts and forks, all of them compiled."""

    def __init__(self, roster: Roster, allocator: PagedStepAllocator, limits: SchedulerLimits) -> None:
        """Decide for `roster`.

        Raises:
            ConfigError: If `allocator` has no slots for the drafts.
        """
        if allocator.lookahead_slots < limits.num_speculative_tokens:
            raise ConfigError(
                f"num-speculative-tokens is {limits.num_speculative_tokens}: drafts need as many lookahead_slots, not "
                f"{allocator.lookahead_slots}"
            )
        self._roster, self._allocator, self._limits = roster, allocator, limits

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""
        return int(self._allocator.pool.queue[NUM_KEYED]) * self._allocator.unit_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return int(self._allocator.pool.queue[NUM_SHARES]) * self._allocator.unit_slots

    def schedule(self, step: Step, arrays: StepArrays) -> None:
        """Decide a step and take its slots."""
        roster, allocator, decision = self._roster, self._allocator, arrays.decision
        _schedule_step(
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
        counted: tuple[int, int, int] = _complete_paged_step(
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
