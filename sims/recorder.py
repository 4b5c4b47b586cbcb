"""Watches a run: the memory's state integrated over time, where time goes, when tokens come. It decides nothing."""

from collections.abc import Callable

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.heaps import HEAPS
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.jit import fixed_types
from pagedkv.offload_steps import OffloadStepAllocator
from pagedkv.scheduling.step import Step, StepScheduler
from pagedkv.scheduling.waiting import NUM_ACCEPTED, NUM_DRAFTED
from pagedkv.sims.recording import (
    ACCEPTED_TOKENS,
    BLOCKERS,
    COST_S,
    DRAFT_TOKENS,
    ITL_BINS,
    ITL_SUM_S,
    NUM_COUNTERS,
    NUM_GAUGES,
    NUM_SUMS,
    RUNNING_ELSEWHERE,
    RecorderArrays,
    gap_bin,
    record_copies,
    record_idle,
    record_longer,
    record_step,
    record_tokens,
    set_external,
    set_gauges,
    set_group_gauges,
)
from pagedkv.sims.records import Outcome, RequestLog, no_times
from pagedkv.sims.run_record import RunRecord
from pagedkv.sims.step_time import StepCost
from pagedkv.sims.timeline import TimelineArrays

# Its arguments have the same types whenever there are groups.
_set_group_gauges = fixed_types(set_group_gauges)


class Recorder(RunRecord):
    """Follows one scheduler to `end_s`. Statistics are over the window [`warmup_s`, `end_s`]."""

    def __init__(self, scheduler: StepScheduler, *, warmup_s: float, end_s: float) -> None:
        self.warmup_s = warmup_s
        self.end_s = end_s
        arrays = RecorderArrays(
            np.zeros(NUM_SUMS),
            np.zeros(ITL_BINS, np.int64),
            TimelineArrays.empty(NUM_GAUGES),
            no_times(1024),
            np.zeros(NUM_GAUGES, np.int64),
            np.zeros(NUM_COUNTERS, np.int64),
            np.array([warmup_s, end_s]),
        )
        offloads = isinstance(scheduler.allocator, OffloadStepAllocator) and scheduler.caches_prefixes
        super().__init__(arrays, caches_prefixes=scheduler.caches_prefixes, offloads=offloads)
        self.running_elsewhere: Callable[[], int] | None = None
        """Tells how many requests run on other replicas; None if there are none."""
        self._scheduler = scheduler
        self.needs_extent = scheduler.allocator.placement in (*HEAPS.names(), "growing")
        """Whoever waits for memory finds every free extent of a heap too small: that is external fragmentation."""
        self._rejected: list[tuple[float, int, int, int]] = []
        self._user_class: dict[int, int] = {}
        """By request, where it is not 0."""
        self._failed: list[int] = []
        self._num_arrived = 0
        self._closed_s = np.inf

    def expect(self, first: int, arrival_s: Float64Array) -> None:
        """Note when the requests from `first` on will arrive; they count once `arrived` says so."""
        last = first + arrival_s.size
        if last > self.arrays.times.size:
            grown = no_times(last)
            grown[:first] = self.arrays.times[:first]
            self.arrays = self.arrays._replace(times=grown)
        self.arrays.times["arrival_s"][first:last] = arrival_s

    def arrived(self, number: int) -> None:
        """Note that the first `number` requests have joined the queue."""
        self._num_arrived = number

    def arrival(self, request: int, now_s: float, user_class: int = 0) -> None:
        """Note that `request` joined the queue."""
        if user_class:
            self._user_class[request] = user_class
        if request == self.arrays.times.size:
            self.arrays = self.arrays._replace(times=np.concatenate((self.arrays.times, no_times(request))))
        self.arrays.times["arrival_s"][request] = now_s
        self._num_arrived = request + 1

    def rejection(self, prompt_tokens: int, output_tokens: int, now_s: float, user_class: int = 0) -> None:
        """Note that a request is refused at its arrival, now or later."""
        self._rejected.append((now_s, prompt_tokens, output_tokens, user_class))

    def failure(self, request: int) -> None:
        """Note that the engine gave `request` up."""
        self._failed.append(request)

    def look_elsewhere(self) -> None:
        """Note how many requests run on the other replicas: before a step, or several while nothing happens there."""
        if self.running_elsewhere is not None:
            self.arrays.counters[RUNNING_ELSEWHERE] = self.running_elsewhere()

    def step(self, step: Step, start_s: float, cost: StepCost) -> None:
        """Note a step that was launched at `start_s`."""
        scheduler, allocator, gauges = self._scheduler, self._scheduler.allocator, self.arrays.gauges
        free, cached, shared = allocator.free_slots, scheduler.cached_slots, scheduler.shared_slots
        set_gauges(
            gauges,
            scheduler.arrays,
            scheduler.requests.arrays,
            step.batch,
            step.num_entries,
            allocator.units_held,
            allocator.unit_slots,
            allocator.state_units,
            free,
            cached,
            shared,
        )
        if isinstance(allocator, HybridStepAllocator):
            _set_group_gauges(
                gauges,
                scheduler.arrays,
                scheduler.requests.arrays,
                step.batch,
                step.num_entries,
                allocator.arrays,
                allocator.rules,
            )
        blocker = BLOCKERS.index(step.blocker)
        set_external(gauges, allocator.rounding_slots, self.needs_extent, blocker)
        record_step(
            self.arrays,
            step.batch,
            step.num_running_before,
            step.num_entries,
            step.num_preempted,
            blocker,
            start_s,
            (*cost,),
        )
        loaded, offloaded = scheduler.moved_blocks
        record_copies(self.arrays, loaded * allocator.unit_slots, offloaded * allocator.unit_slots, start_s, (*cost,))

    def linger(self, start_s: float, end_s: float) -> None:
        """Note that the step recorded last takes until `end_s` instead of `start_s`: other processes have the machine too."""
        if end_s > start_s:
            record_longer(self.arrays, start_s, end_s)

    def worked(self, alone_end_s: float, cost: StepCost, measured_s: float) -> None:
        """Note that `measured_s` of the step recorded last were done in the window: alone, it would have lasted to `alone_end_s`.

        It was recorded as if the machine did it at once. With others it goes on longer, and at the window's edges that is not the
        part of it that falls inside.
        """
        as_if_alone_s = min(alone_end_s, self.end_s) - max(alone_end_s - cost.total_s, self.warmup_s)
        if cost.total_s > 0:
            share = (measured_s - max(as_if_alone_s, 0.0)) / cost.total_s
            self.arrays.sums[COST_S:ITL_SUM_S] += share * np.array(cost)

    def idle(self, start_s: float, end_s: float) -> None:
        """Note that nobody was there from `start_s` to `end_s`."""
        record_idle(self.arrays, start_s, end_s, self._scheduler.allocator.free_slots, self._scheduler.cached_slots)

    def tokens(self, now_s: float) -> None:
        """Note the tokens of the step that has just been completed."""
        sampled = self._scheduler.sampled
        record_tokens(self.arrays, sampled, sampled.size, self._scheduler.num_output_tokens, self._scheduler.finished.size, now_s)

    def crash(self, now_s: float) -> None:
        """End at `now_s`, when the process dies: whoever has not got all tokens has failed, and waits for no more of them."""
        self._closed_s = now_s
        self._count_drafts()
        self.arrays.gauges[:] = 0
        requests = self._scheduler.requests.arrays[: self._num_arrived]
        unfinished = requests["num_known_tokens"] < requests["prompt_tokens"] + requests["output_tokens"]
        self._failed = np.flatnonzero(unfinished).tolist()

    def _count_drafts(self) -> None:
        counts = self._scheduler.arrays.counts
        self.arrays.counters[DRAFT_TOKENS], self.arrays.counters[ACCEPTED_TOKENS] = counts[NUM_DRAFTED], counts[NUM_ACCEPTED]

    def close(self, end_s: float) -> None:
        """End the run: for measured requests that still generate, the time since their last token is a lower bound of a gap."""
        self._closed_s = end_s
        self._count_drafts()
        size, requests = self._num_arrived, self._scheduler.requests.arrays
        generating = np.arange(size)[
            (requests["num_known_tokens"] > requests["prompt_tokens"])[:size]
            & (requests["num_known_tokens"] < requests["prompt_tokens"] + requests["output_tokens"])[:size]
            & (self.arrays.times["arrival_s"][:size] >= self.warmup_s)
        ]
        for request in generating[~np.isin(generating, self._failed)]:  # who was given up waits no more
            gap_s = end_s - self.arrays.times["last_token_s"][request]
            self.arrays.itl_bins[gap_bin(gap_s)] += 1
            self.arrays.sums[ITL_SUM_S] += gap_s

    def log(self) -> RequestLog:
        """Return what happened to every request, once the run is over: as far as it can, views of what was recorded."""
        size, times = self._num_arrived, self.arrays.times[: self._num_arrived]
        requests = self._scheduler.requests.arrays[:size]
        outcome = np.full(size, Outcome.UNFINISHED, np.int8)
        num_output = requests["num_known_tokens"] - requests["prompt_tokens"]
        outcome[num_output == requests["output_tokens"]] = Outcome.FINISHED
        outcome[self._failed] = Outcome.FAILED
        user_class = np.zeros(size, np.int64)
        user_class[list(self._user_class)] = list(self._user_class.values())
        served = RequestLog(
            arrival_s=times["arrival_s"],
            scheduled_s=times["scheduled_s"],
            first_token_s=times["first_token_s"],
            last_token_s=times["last_token_s"],
            prompt_tokens=requests["prompt_tokens"],
            output_tokens=requests["output_tokens"],
            num_output_tokens=num_output,
            num_cached_tokens=requests["num_cached_tokens"],
            num_preemptions=requests["num_preemptions"],
            outcome=outcome,
            user_class=user_class,
            model=np.zeros(size, np.int64),
        )
        rejected = np.array([entry for entry in self._rejected if entry[0] <= self._closed_s]).reshape(-1, 4)
        if not rejected.size:
            return served
        refused = RequestLog.refused(rejected[:, 0], rejected[:, 1:].astype(np.int64), Outcome.REJECTED)
        return RequestLog.joined((served, refused))
