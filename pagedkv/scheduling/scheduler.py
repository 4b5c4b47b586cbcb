"""Continuous batching with vLLM's order of decisions, over any allocator."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import BoolArray, Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.decode_run import ONE_STEP, DecodeRun, decodes_all, move_on, steps_to_an_end
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.free_queue import NUM_KEYED, NUM_SHARES
from pagedkv.jit import fixed_types
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.completion import complete_paged_step, complete_step
from pagedkv.scheduling.content import NO_SEGMENTS, Contents, Segments, content_of, keyed_segments
from pagedkv.scheduling.plain_step import admit, plan_step
from pagedkv.scheduling.requests import NO_ROW, RequestTable
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import BLOCKERS, Blocker, Step
from pagedkv.scheduling.vllm_step import BLOCKER, ENTRIES, PREEMPTED, RAN_BEFORE, SchedulerLimits, schedule_step
from pagedkv.scheduling.waiting import (
    NUM_RUNNING,
    NUM_WAITING,
    WAITING_HEAD,
    SchedulerArrays,
    blocker_of,
    drop_head,
    goes_before,
    leave_running,
    push_waiting,
    return_waiting,
    start_running,
    stop_running,
    withdraw_waiting,
)
from pagedkv.step_allocation import RequestByRequest, StepAllocator
from pagedkv.step_batch import StepBatch, empty_batch

# Their arguments have the same types in every scheduler.
_schedule_step = fixed_types(schedule_step)
_complete_paged_step = fixed_types(complete_paged_step)
_push_waiting = fixed_types(push_waiting)
_withdraw_waiting = fixed_types(withdraw_waiting)
_plan_step = fixed_types(plan_step)
_admit = fixed_types(admit)
_complete_step = fixed_types(complete_step)
_return_waiting = fixed_types(return_waiting)
_start_running = fixed_types(start_running)


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


class Scheduler:
    """Decides step by step which requests compute how many tokens, and asks `allocator` for their slots.

    `schedule()` gives the next step, `complete()` says that it was computed. Semantics of vLLM v1: running
    requests first, in order of admission; when one does not fit the last of them is preempted and will recompute; the queue is
    served only in steps without preemption, and its first request that does not fit ends the step.

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> from pagedkv.step_allocation import step_allocator
        >>> allocator = step_allocator("paged", KVPoolSettings(num_blocks=9, block_size=4, max_model_len=32))
        >>> scheduler = Scheduler(SchedulerSettings(max_model_len=32), allocator)
        >>> scheduler.add(prompt_tokens=10, output_tokens=2)
        0
        >>> scheduler.schedule().num_entries, allocator.free_slots
        (1, 20)
        >>> scheduler.complete(); scheduler.sampled.tolist(), scheduler.finished.tolist()
        ([0], [])
    """

    def __init__(self, settings: SchedulerSettings, allocator: StepAllocator) -> None:
        for name, room in (("max_num_seqs", allocator.units_held.size), ("max_model_len", allocator.max_model_len)):
            if getattr(settings, name) > room:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(settings, name)}, the allocator was built for {room}")
        self.settings = settings
        self.allocator = allocator
        self.requests = RequestTable()
        self.arrays = SchedulerArrays.empty(settings.max_num_seqs, waiting_capacity=256)
        self.limits = SchedulerLimits(
            int(settings.max_num_batched_tokens),
            int(settings.long_prefill_token_threshold),
            bool(settings.adaptive_long_prefill_threshold),
            bool(settings.enable_chunked_prefill),
            settings.policy == "priority",
            int(settings.num_speculative_tokens),
            int(settings.max_model_len),
        )
        self._paged = allocator if isinstance(allocator, PagedStepAllocator) else None
        if self._paged is None and (settings.policy != "fcfs" or settings.adaptive_long_prefill_threshold):
            raise ConfigError(
                f"policy {settings.policy} and the adaptive threshold are for paged memory: {allocator.name} runs with fcfs"
            )
        if settings.num_speculative_tokens and (
            self._paged is None or self._paged.lookahead_slots < settings.num_speculative_tokens
        ):
            raise ConfigError(
                f"num-speculative-tokens is {settings.num_speculative_tokens}: drafts need paged memory with as many "
                f"lookahead_slots, not {allocator.name}"
            )
        self._caches = self._paged is not None and self._paged.pool.enable_caching
        self._preempted = np.zeros(settings.max_num_seqs, np.int64)
        self._decision = np.zeros(4, np.int64)
        self._step = Step(empty_batch(settings.max_num_seqs))
        self.step_arrays = StepArrays(
            self._step.batch, self._preempted, self._decision, *(np.zeros(settings.max_num_seqs, np.int64) for _ in range(2))
        )
        self._num_sampled = self._num_finished = self.num_output_tokens = 0
        self._nobody: Int64Array = np.zeros(0, np.int64)
        self._keys_follow = set[int]()
        """Requests whose keys come as their tokens do."""
        self._in_flight = False
        """A step is decided and not completed."""
        self._unkeyed = False
        """Blocks may carry keys that are made of a request's index."""

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a preemption, have computed."""
        return self._caches

    @property
    def num_running(self) -> int:
        """Requests in the running batch."""
        return int(self.arrays.counts[NUM_RUNNING])

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return int(self.arrays.counts[NUM_WAITING])

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""
        return 0 if self._paged is None else int(self._paged.pool.queue[NUM_KEYED]) * self._paged.unit_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return 0 if self._paged is None else int(self._paged.pool.queue[NUM_SHARES]) * self._paged.unit_slots

    @property
    def failed(self) -> Int64Array:
        """Nobody: this engine preempts, or refuses at arrival."""
        return self._nobody

    @property
    def sampled(self) -> Int64Array:
        """Requests that got an output token in the step completed last, in scheduling order. A view."""
        return self.step_arrays.sampled[: self._num_sampled]

    @property
    def finished(self) -> Int64Array:
        """Those of them that are done. A view."""
        return self.step_arrays.finished[: self._num_finished]

    def add(
        self,
        *,
        prompt_tokens: int,
        output_tokens: int,
        priority: int = 0,
        content: Segments | None = None,
        keys: BlockKeys | None = None,
        keys_follow: bool = False,
    ) -> int | None:
        """Put a request into the queue and return its index; None if it could never run here.

        Args:
            prompt_tokens: Length of the prompt.
            output_tokens: Tokens that it will generate.
            priority: Its urgency under policy priority.
            content: What it shares with others, from its start on; the rest is its own, and only it will find that when it comes
                back after a preemption. Not looked at without prefix caching.
            keys: In place of `content`, keys of all its blocks that will ever be full: (prompt + output - 1) // block_size of them.
            keys_follow: The keys are those of the prompt's full blocks: `add_keys` gives the others when their tokens are known.

        Raises:
            ConfigError: If a length is below 1, the content is out of order, or keys are given that cannot be used.
        """
        if prompt_tokens < 1 or output_tokens < 1:
            raise ConfigError(f"a request needs 1 or more prompt and output tokens, not {prompt_tokens} and {output_tokens}")
        if prompt_tokens + output_tokens > self.settings.max_model_len:
            return None
        admission_slots = self.allocator.admission_slots(prompt_tokens, output_tokens)
        if admission_slots is None:
            return None
        keys_follow = keys_follow and self._caches
        self._unkeyed |= self._caches and keys is None
        content = content_of(
            content,
            keys,
            num_tokens=prompt_tokens + (1 if keys_follow else output_tokens),
            block_size=self.allocator.unit_slots,
            caches_prefixes=self._caches,
        )
        request = self.requests.add(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            admission_slots=admission_slots,
            priority=priority,
            content=content,
            room=(prompt_tokens + output_tokens - 1) // self.allocator.unit_slots if keys_follow else 0,
        )
        if keys_follow:
            self._keys_follow.add(request)
        # Preempted requests come back to the queue: there must be room for everyone who runs.
        if self.num_waiting + self.num_running + 1 >= self.arrays.waiting.size:
            self._grow_queue()
        _push_waiting(self.arrays, self.requests.arrays, request, self.limits.by_priority)
        return request

    def add_keys(self, request: int, keys: BlockKeys) -> None:
        """Tell the keys of the next blocks of `request` that are full, in order: of each before it is scheduled to its last token.

        A block that is computed without one is found by this request alone, when it comes back after a preemption.

        Raises:
            ConfigError: If it is done or was not added with `keys_follow`, or there are more keys than full blocks.
        """
        if request not in self._keys_follow:
            raise ConfigError(f"keys for request {request}: needs one that was added with keys_follow, and is not done")
        known, segments = self.requests.arrays["num_known_tokens"][request], keyed_segments(keys, self.allocator.unit_slots)
        first = int(self.requests.arrays["num_segments"][request])
        if (first + len(keys)) * self.allocator.unit_slots > known:
            raise ConfigError(f"keys of {first} + {len(keys)} blocks for a request of {known} known tokens: needs full blocks")
        segments["end_token"] += first * self.allocator.unit_slots
        self.requests.add_segments(request, segments)

    def fork(self, parent: int, *, content: Segments | None = None, keys: BlockKeys | None = None) -> int:
        """Let a new request go on from what `parent` has computed, with a last token of its own; return its index.

        It runs at once, behind the others, if a row is free: the two share blocks, and who writes first into one that is not full
        gets a copy (`PagedStepAllocator.copies`). Else it waits in front, and computes anew what the prefix cache has lost.
        O(blocks shared).

        Args:
            parent: A running request whose known tokens are computed but for the last; not within a step.
            content: What the new request shares with others, as in `add`.
            keys: In its place, if the parent was added with `keys_follow`: keys of its blocks that are full.

        Raises:
            ConfigError: If the parent is not such a request, memory is not paged, or keys do not fit; nothing has changed then.
        """
        paged = self._expect_decoding(parent)
        self._expect_keys(parent, keys)
        segments = keyed_segments(keys, self.allocator.unit_slots) if keys is not None else content
        child = self.requests.fork(
            parent,
            segments if self._caches and segments is not None else NO_SEGMENTS,
            self._num_full(parent) if parent in self._keys_follow else 0,
        )
        if parent in self._keys_follow:
            self._keys_follow.add(child)
        requests, num_running = self.requests.arrays, self.num_running
        if num_running == self.settings.max_num_seqs:
            if self.num_waiting + num_running + 1 >= self.arrays.waiting.size:
                self._grow_queue()
            _return_waiting(self.arrays, requests, child, self.limits.by_priority)
            return child
        row, known = int(self.arrays.free_rows[num_running]), int(requests["num_known_tokens"][parent])
        paged.fork(int(requests["row"][parent]), row, known - 1)
        _start_running(self.arrays, requests, child, row)
        for name in ("num_computed_tokens", "num_cached_tokens", "num_hit_tokens"):
            requests[name][child] = known - 1
        requests["num_queried_tokens"][child] = known
        return child

    def take_over(self, request: int, parent: int, *, keys: BlockKeys | None = None) -> None:
        """Let `request`, a beam that is dropped, give up what it has and go on from what `parent` has computed, as a fork would.

        O(blocks given back and shared).

        Args:
            request: Running, of the same prompt, with as many tokens known and computed.
            parent: As in `fork`, and added as `request` was.
            keys: If they were added with `keys_follow`: keys of the full blocks of what `request` is from now on.

        Raises:
            ConfigError: If the requests are not such, memory is not paged, or keys do not fit; nothing has changed then.
        """
        self._expect_decoding(request)
        paged, requests = self._expect_decoding(parent), self.requests.arrays
        names = ["num_known_tokens", "prompt_tokens", "output_tokens"]
        alike = (request in self._keys_follow) == (parent in self._keys_follow)
        if request == parent or not alike or any(requests[name][request] != requests[name][parent] for name in names):
            raise ConfigError(f"request {request} cannot go on from {parent}: needs another of the same prompt, and as far")
        self._expect_keys(parent, keys)
        row = int(requests["row"][request])
        paged.free(row)
        paged.fork(int(requests["row"][parent]), row, int(requests["num_computed_tokens"][parent]))
        if keys is not None:
            requests["num_segments"][request] = 0
            self.requests.add_segments(request, keyed_segments(keys, self.allocator.unit_slots))

    def requeue(self, requests: Sequence[int]) -> None:
        """Let these wait in front of all others, in this order; who runs is preempted. fcfs only, not within a step. O(all).

        Raises:
            ConfigError: Under another policy, within a step, or if one of them neither runs nor waits; nothing has changed then.
        """
        running, waiting = self.arrays.running[: self.num_running].tolist(), self.waiting().tolist()
        if self._in_flight or self.limits.by_priority or not set(requests) <= {*running, *waiting}:
            raise ConfigError(f"requests {[*requests]} cannot queue anew: needs fcfs, and requests that are there, between steps")
        known = self.requests.arrays
        for request in reversed(requests):
            if request in waiting:
                _withdraw_waiting(self.arrays, known, request, False)  # noqa: FBT003
                _return_waiting(self.arrays, known, request, False)  # noqa: FBT003
            else:
                place = int(np.flatnonzero(self.arrays.running[: self.num_running] == request)[0])
                self.allocator.free(stop_running(self.arrays, known, place, False))  # noqa: FBT003

    def _expect_decoding(self, request: int) -> PagedStepAllocator:
        """Return the memory, if `request` is one that can be forked."""
        requests = self.requests.arrays
        if self._paged is None or self._paged.state_units:
            raise ConfigError(f"requests cannot be forked over {self.allocator.name} with a state: needs paged memory without")
        runs = not self._in_flight and 0 <= request < self.requests.size and requests["row"][request] != NO_ROW
        known = requests["num_known_tokens"][request] if runs else 0
        if not runs or requests["num_computed_tokens"][request] != known - 1 or known <= requests["prompt_tokens"][request]:
            raise ConfigError(f"request {request} cannot be forked: needs one that decodes, between steps")
        return self._paged

    def _expect_keys(self, parent: int, keys: BlockKeys | None) -> None:
        full = int(self.requests.arrays["num_known_tokens"][parent]) // self.allocator.unit_slots
        if (keys is not None) != (parent in self._keys_follow) or (keys is not None and len(keys) > full):
            given = "no keys" if keys is None else f"{len(keys)} keys"
            raise ConfigError(f"{given} for a fork of request {parent}: needs them if its keys follow, up to {full}, and else none")

    def _num_full(self, request: int) -> int:
        """Return how many blocks `request` will ever fill."""
        known = self.requests.arrays[request]
        return int(known["prompt_tokens"] + known["output_tokens"] - 1) // self.allocator.unit_slots

    def end_after(self, request: int, num_output_tokens: int) -> None:
        """Let `request` generate no more than so many tokens, fewer than it was added with: the last one ends its text.

        For the token that comes next, say so before `complete()`.

        Raises:
            ConfigError: If it has as many already, or was to generate fewer.
        """
        known = self.requests.arrays[request]
        sofar, most = int(known["num_known_tokens"] - known["prompt_tokens"]), int(known["output_tokens"])
        if not sofar < num_output_tokens <= most:
            raise ConfigError(f"request {request} cannot end after {num_output_tokens} tokens: needs {sofar + 1} to {most}")
        self.requests.arrays["output_tokens"][request] = num_output_tokens

    def abort(self, request: int) -> bool:
        """Take `request` out for good, give back what it holds at once, and return whether it was there; not within a step.

        Of its blocks those that are full stay findable. O(running + waiting).

        Raises:
            ConfigError: If a step is decided and not completed: its forward pass uses these blocks.
        """
        if self._in_flight:
            raise ConfigError(f"request {request} cannot be aborted within a step: call complete() first")
        self._keys_follow.discard(request)
        requests, running = self.requests.arrays, self.arrays.running[: self.num_running]
        if (place := np.flatnonzero(running == request)).size:
            self.allocator.free(leave_running(self.arrays, requests, int(place[0])))
            return True
        return bool(_withdraw_waiting(self.arrays, requests, request, self.limits.by_priority))

    def forget_done(self) -> Int64Array:
        """Forget requests that are done or were taken out, so that a server can run for good; not within a step.

        Return the old numbers of the others, ascending: the i-th of them is request i from now on. What happens to them, and what
        is found of those that are forgotten, stays the same; keys that follow must have come before their blocks were computed.
        O(running + waiting).

        Raises:
            ConfigError: Within a step, or if prefixes are cached and a request came without keys: its blocks are known by its
                number, which would be another's.
        """
        if self._in_flight or self._unkeyed:
            why = "a step is not completed" if self._in_flight else "some came without block keys, and prefix caching is on"
            raise ConfigError(f"requests cannot be forgotten: {why}")
        running, waiting = self.arrays.running[: self.num_running], self.waiting()
        kept = np.sort(np.concatenate((running, waiting)))
        records = self.requests.arrays[kept]
        full = (records["prompt_tokens"] + records["output_tokens"] - 1) // self.allocator.unit_slots
        self.requests.keep(kept, np.where([request in self._keys_follow for request in kept.tolist()], full, 0))
        running[:] = np.searchsorted(kept, running)
        ring, places = self.arrays.waiting, self.arrays.counts[WAITING_HEAD] + np.arange(self.num_waiting)
        ring[places % ring.size] = np.searchsorted(kept, waiting)
        self._keys_follow = set(np.searchsorted(kept, sorted(self._keys_follow)).tolist())
        self._num_sampled = self._num_finished = self._step.num_preempted = 0
        return kept

    def add_all(self, prompt_tokens: Int64Array, output_tokens: Int64Array, *, contents: Contents | None = None) -> BoolArray:
        """Make requests known that will arrive later, in this order; return which of them can run here. Paged memory only.

        Raises:
            ConfigError: If a length is below 1, or there are not as many `contents`.
        """
        if self._paged is None:
            raise ConfigError(f"only paged memory takes requests all at once: add those for {self.allocator.name} one by one")
        if prompt_tokens.size and min(prompt_tokens.min(), output_tokens.min()) < 1:
            raise ConfigError("requests need 1 or more prompt and output tokens")
        self._unkeyed |= self._caches
        accepted = self._paged.can_ever_fit(prompt_tokens, output_tokens)
        accepted &= prompt_tokens + output_tokens <= self.settings.max_model_len
        if contents is not None and contents.first_segment.size != prompt_tokens.size:
            raise ConfigError(f"{contents.first_segment.size} contents for {prompt_tokens.size} requests")
        if contents is not None and self._caches:
            contents = contents._replace(
                first_segment=contents.first_segment[accepted], num_segments=contents.num_segments[accepted]
            )
        else:
            contents = None
        self.requests.extend(prompt_tokens[accepted], output_tokens[accepted], contents)
        while self.requests.size + 1 >= self.arrays.waiting.size:
            self._grow_queue()
        return accepted

    def schedule(self) -> Step:
        """Decide the next step and take its slots. The returned object is overwritten by the next call."""
        step = self._schedule_one_by_one() if self._paged is None else self._schedule_paged(self._paged)
        self._in_flight = step.num_entries > 0
        return step

    def _schedule_one_by_one(self) -> Step:
        state, requests, batch = self.arrays, self.requests.arrays, self._step.batch
        num_running, num_entries = _plan_step(state, requests, self.limits, batch)
        granted = self.allocator.allocate_slots(batch, 0, num_entries, num_running)
        num_preempted = 0
        while granted < num_running:  # the running ones do not all fit: the last of them makes room, be it the one that asks
            last = self.num_running - 1
            self._preempted[num_preempted] = state.running[last]
            num_preempted += 1
            self.allocator.free(stop_running(state, requests, last, False))  # noqa: FBT003
            num_running = min(num_running, self.num_running)
            granted = self.allocator.allocate_slots(batch, granted, num_running, num_running)
        if granted > num_running and not num_preempted:
            _admit(state, requests, batch, num_running, granted)
        step = self._step
        step.num_running_before, step.num_entries, step.num_preempted = num_running, granted, num_preempted
        step.blocker = BLOCKERS[blocker_of(state, num_preempted > 0 or granted < num_entries)]
        return step

    def _schedule_paged(self, paged: PagedStepAllocator) -> Step:
        step, requests, decision = self._step, self.requests, self._decision
        _schedule_step(
            self.arrays,
            requests.arrays,
            paged.arrays,
            requests.segments,
            self.limits,
            paged.rules,
            step.batch,
            self._preempted,
            decision,
        )
        decided = decision.tolist()
        step.num_running_before, step.num_entries = decided[RAN_BEFORE], decided[ENTRIES]
        step.num_preempted, step.blocker = decided[PREEMPTED], BLOCKERS[decided[BLOCKER]]
        return step

    @property
    def preempted(self) -> Int64Array:
        """Requests preempted in the step decided last, in order. A view."""
        return self._preempted[: self._step.num_preempted]

    def forward_passes(self) -> Iterator[StepBatch]:
        """Yield the step decided last: it is computed as one."""
        yield self._step.batch[: self._step.num_entries]

    def decode_run(self) -> DecodeRun:
        """Return how often the step decided last would be decided again, for every request one token further on.

        Over paged memory `pagedkv.sims.run_steps` need not ask.
        """
        step, allocator = self._step, self.allocator
        batch = step.batch[: step.num_entries]
        if not isinstance(allocator, RequestByRequest) or step.num_preempted or step.num_running_before < batch.size:
            return ONE_STEP
        if not decodes_all(batch, self.num_running) or step.blocker is Blocker.TOKEN_BUDGET:
            return ONE_STEP
        return allocator.decode_run(batch, steps_to_an_end(self.requests.arrays, batch))

    def repeat(self, num_steps: int) -> None:
        """Take the slots of `num_steps` more steps of a decode run, which are completed in `requests` but for the last of them."""
        assert isinstance(self.allocator, RequestByRequest)
        batch = self._step.batch[: self._step.num_entries]
        self.allocator.grow_in_turn(batch, num_steps)
        move_on(batch, num_steps)

    def complete(self) -> None:
        """Apply the step decided last: its tokens are computed, `sampled` and `finished` say what came out, memory is freed."""
        requests, (batch, _, _, sampled, finished) = self.requests.arrays, self.step_arrays
        self._in_flight = False
        if self._paged is not None:
            pool, rules = self._paged.arrays, self._paged.rules
            self._num_sampled, self.num_output_tokens, self._num_finished = _complete_paged_step(
                self.arrays, requests, pool, rules, batch, self._step.num_entries, sampled, finished
            )
            if self._keys_follow:
                self._keys_follow.difference_update(self.finished.tolist())
            return
        self._num_sampled, self.num_output_tokens, self._num_finished = _complete_step(
            self.arrays, requests, batch, self._step.num_entries, sampled, finished
        )
        for request in self.finished:
            self.allocator.free(int(requests["row"][request]))
            requests["row"][request] = NO_ROW

    def drop_head(self) -> int:
        """Take the head of the queue out for good and return it: the way out when nothing runs and it still does not fit."""
        return int(drop_head(self.arrays, self.requests.arrays, self.limits.by_priority))

    def _grow_queue(self) -> None:
        waiting, head = self.arrays.waiting, self.arrays.counts[WAITING_HEAD]  # a heap begins at 0
        self.arrays = self.arrays._replace(waiting=np.concatenate((np.roll(waiting, -head), np.zeros_like(waiting))))
        self.arrays.counts[WAITING_HEAD] = 0

    def waiting(self) -> Int64Array:
        """Return the queue, its head first; under policy priority the others in no order. O(waiting)."""
        ring, places = self.arrays.waiting, self.arrays.counts[WAITING_HEAD] + np.arange(self.num_waiting)
        queue: Int64Array = ring[places % ring.size]
        return queue

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows, queue and running batch fit together and every running request has its slots."""
        self.allocator.check_integrity()
        requests, running, waiting = self.requests.arrays, self.arrays.running[: self.num_running], self.waiting()
        rows = requests["row"][running]
        free_rows = self.arrays.free_rows[self.num_running :]
        slots = self.allocator.units_held[rows].astype(np.int64) * self.allocator.unit_slots
        if (
            not np.array_equal(np.sort(np.concatenate((rows, free_rows))), np.arange(self.settings.max_num_seqs))
            or np.unique(np.concatenate((running, waiting))).size != running.size + waiting.size
            or (requests["row"][waiting] != NO_ROW).any()
            or requests["num_computed_tokens"][waiting].any()
            or (slots < requests["num_computed_tokens"][running]).any()
            or self.allocator.units_held[free_rows].any()
            or (
                self.limits.by_priority
                and any(goes_before(requests, waiting[i], waiting[(i - 1) // 2]) for i in range(1, waiting.size))
            )
        ):
            raise IntegrityError(
                f"running {running.tolist()} in rows {rows.tolist()} with {slots.tolist()} slots, waiting {waiting.tolist()}"
            )
