"""A step over any allocator, which is asked entry by entry: compiled functions for the parts in between."""

from collections.abc import Iterator

from pagedkv.errors import ConfigError
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.scheduling.completion import complete_step
from pagedkv.scheduling.requests import NO_ROW, RequestArrays
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.step import BLOCKERS, Step
from pagedkv.scheduling.step_path import StepArrays
from pagedkv.scheduling.vllm_step import SchedulerLimits, add_entry
from pagedkv.scheduling.waiting import (
    NUM_RUNNING,
    NUM_WAITING,
    WAITING_HEAD,
    SchedulerArrays,
    blocker_of,
    drop_head,
    start_running,
)
from pagedkv.step_allocation import StepAllocator
from pagedkv.step_batch import StepBatch


@lean_jit
def plan_step(state: SchedulerArrays, requests: RequestArrays, limits: SchedulerLimits, batch: StepBatch) -> tuple[int, int]:
    """Write into `batch` what the token budget allows: running requests in order, then the head of the queue.

    O(entries). Nothing but `batch` changes.

    Returns:
        (entries of running requests, entries in all).
    """
    num_running, num_waiting = state.counts[NUM_RUNNING], state.counts[NUM_WAITING]
    budget = limits.max_num_batched_tokens
    threshold = limits.long_prefill_token_threshold if num_running + num_waiting > 1 else 0
    entries = 0
    for i in range(num_running):
        if budget == 0:
            break
        request = state.running[i]
        tokens = requests["num_known_tokens"][request] - requests["num_computed_tokens"][request]
        if threshold > 0:
            tokens = min(tokens, threshold)
        tokens = min(tokens, budget)
        add_entry(batch, entries, requests, request, requests["row"][request], tokens)
        entries += 1
        budget -= tokens
    running_entries = entries
    for k in range(min(num_waiting, state.running.size - num_running)):
        if budget == 0:
            break
        request = state.waiting[(state.counts[WAITING_HEAD] + k) % state.waiting.size]
        tokens = requests["num_known_tokens"][request]
        if threshold > 0:
            tokens = min(tokens, threshold)
        if tokens > budget:
            if not limits.enable_chunked_prefill:
                break
            tokens = budget
        add_entry(batch, entries, requests, request, state.free_rows[num_running + k], tokens)
        entries += 1
        budget -= tokens
    return running_entries, entries


@lean_jit
def admit(state: SchedulerArrays, requests: RequestArrays, batch: StepBatch, first: int, last: int) -> None:
    """Move the requests of entries `first` to `last` from the head of the queue to the running ones. O(last - first)."""
    for i in range(first, last):
        request = batch["request"][i]
        drop_head(state, requests, False)  # noqa: FBT003 - fcfs
        requests["num_queried_tokens"][request] += requests["num_known_tokens"][request]
        start_running(state, requests, request, batch["row"][i])


# Their arguments have the same types in every scheduler.
_plan_step = fixed_types(plan_step)
_admit = fixed_types(admit)
_complete_step = fixed_types(complete_step)


class PlainPath:
    """First come, first served; without prefix caching, drafts and forks."""

    cached_slots = shared_slots = 0
    moved_blocks = 0, 0

    def __init__(self, roster: Roster, allocator: StepAllocator, limits: SchedulerLimits) -> None:
        """Decide for `roster`.

        Raises:
            ConfigError: If `limits` ask for what only paged memory has.
        """
        if limits.by_priority or limits.adaptive_threshold:
            policy = "priority" if limits.by_priority else "fcfs"
            raise ConfigError(f"policy {policy} and the adaptive threshold are for paged memory: {allocator.name} runs with fcfs")
        if limits.num_speculative_tokens:
            raise ConfigError(
                f"num-speculative-tokens is {limits.num_speculative_tokens}: drafts need paged memory, not {allocator.name}"
            )
        self._roster, self._allocator, self._limits = roster, allocator, limits

    def schedule(self, step: Step, arrays: StepArrays) -> None:
        """Decide a step and take its slots."""
        roster, allocator, batch = self._roster, self._allocator, arrays.batch
        state, requests = roster.arrays, roster.requests.arrays
        num_running, num_entries = _plan_step(state, requests, self._limits, batch)
        granted = allocator.allocate_slots(batch, 0, num_entries, num_running)
        num_preempted = 0
        while granted < num_running:  # the running ones do not all fit: the last of them makes room, be it the one that asks
            last = roster.num_running - 1
            arrays.preempted[num_preempted] = state.running[last]
            num_preempted += 1
            allocator.free(roster.stop(last))
            num_running = min(num_running, roster.num_running)
            granted = allocator.allocate_slots(batch, granted, num_running, num_running)
        if granted > num_running and not num_preempted:
            _admit(state, requests, batch, num_running, granted)
        step.num_running_before, step.num_entries, step.num_preempted = num_running, granted, num_preempted
        step.blocker = BLOCKERS[blocker_of(state, num_preempted > 0 or granted < num_entries)]

    def complete(self, step: Step, arrays: StepArrays) -> tuple[int, int, int]:
        """Apply a step, and give back what finished requests hold."""
        requests = self._roster.requests.arrays
        counted: tuple[int, int, int] = _complete_step(
            self._roster.arrays, requests, arrays.batch, step.num_entries, arrays.sampled, arrays.finished
        )
        for request in arrays.finished[: counted[2]]:
            self._allocator.free(int(requests["row"][request]))
            requests["row"][request] = NO_ROW
        return counted

    def forward_passes(self, step: Step, arrays: StepArrays) -> Iterator[StepBatch]:
        """Yield the step: it is computed as one."""
        yield arrays.batch[: step.num_entries]
