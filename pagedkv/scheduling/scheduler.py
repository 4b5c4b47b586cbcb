"""Continuous batching with vLLM's order of decisions, over any allocator."""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import BoolArray, Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import ConfigError
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.compiled_path import CompiledPath
from pagedkv.scheduling.content import Contents, Segments, content_of
from pagedkv.scheduling.following_keys import FollowingKeys
from pagedkv.scheduling.forks import Forks
from pagedkv.scheduling.plain_path import PlainPath
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step_path import StepArrays
from pagedkv.scheduling.vllm_step import SchedulerLimits
from pagedkv.step_allocation import CompiledMemory, StepAllocator


class Scheduler(BatchScheduler):
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

    allocator: StepAllocator

    def __init__(self, settings: SchedulerSettings, allocator: StepAllocator) -> None:
        for name, room in (("max_num_seqs", allocator.units_held.size), ("max_model_len", allocator.max_model_len)):
            if getattr(settings, name) > room:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(settings, name)}, the allocator was built for {room}")
        self.settings, limits = settings, SchedulerLimits.of(settings)
        roster = Roster(max_num_seqs=settings.max_num_seqs, by_priority=limits.by_priority)
        super().__init__(
            roster,
            allocator,
            _compiled_path(roster, allocator, limits)
            if isinstance(allocator, CompiledMemory)
            else PlainPath(roster, allocator, limits),
            StepArrays.empty(settings.max_num_seqs),
            max_model_len=settings.max_model_len,
        )
        self._caches, self._hash_block_size = False, allocator.unit_slots
        if isinstance(allocator, PagedStepAllocator | HybridStepAllocator):
            self._caches, self._hash_block_size = allocator.pool.enable_caching, allocator.hash_block_size
        self._keys = FollowingKeys(self._roster.requests, self._hash_block_size)
        self._forks = Forks(self._roster, allocator, self._keys)
        self._unkeyed = False
        """Blocks may carry keys that are made of a request's index."""

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a preemption, have computed."""
        return self._caches

    def complete(self) -> None:
        """Apply the step decided last: its tokens are computed, `sampled` and `finished` say what came out, memory is freed."""
        super().complete()
        if self._num_finished and self._keys:
            self._keys.end(self.finished.tolist())

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
        if prompt_tokens + output_tokens > self.max_model_len:
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
            block_size=self._hash_block_size,
            caches_prefixes=self._caches,
        )
        request = self.requests.add(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            admission_slots=admission_slots,
            priority=priority,
            content=content,
            room=(prompt_tokens + output_tokens - 1) // self._hash_block_size if keys_follow else 0,
        )
        if keys_follow:
            self._keys.begin(request)
        self._roster.queue(request)
        return request

    def add_all(self, prompt_tokens: Int64Array, output_tokens: Int64Array, *, contents: Contents | None = None) -> BoolArray:
        """Make requests known that will arrive later, in this order: see `BatchScheduler.add_all`."""
        self._unkeyed |= self._caches
        return super().add_all(prompt_tokens, output_tokens, contents=contents)

    def add_keys(self, request: int, keys: BlockKeys) -> None:
        """Tell the keys of the next blocks of `request` that are full, in order: of each before it is scheduled to its last token.

        A block that is computed without one is found by this request alone, when it comes back after a preemption.

        Raises:
            ConfigError: If it is done or was not added with `keys_follow`, or there are more keys than full blocks.
        """
        self._keys.add(request, keys)

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
        child = self._forks.fork(parent, content=content, keys=keys)
        self._unkeyed |= self._caches and keys is None
        return child

    def take_over(self, request: int, parent: int, *, keys: BlockKeys | None = None) -> None:
        """Let `request`, a beam that is dropped, give up what it has and go on from what `parent` has computed, as a fork would.

        O(blocks given back and shared).

        Args:
            request: Running, of the same prompt, with as many tokens known and computed.
            parent: As in `fork`, and added as `request` was.
            keys: If they were added with `keys_follow`: keys of the full blocks of what `request` is from now on.

        Raises:
            ConfigError: If the requests are not such, memory is not paged, keys do not fit, or prefixes are cached and no keys
                follow, so that it would find blocks of what it gives up as its own. Nothing has changed then.
        """
        self._forks.take_over(request, parent, keys=keys)

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
        if self._roster.in_step:
            raise ConfigError(f"request {request} cannot be aborted within a step: call complete() first")
        self._keys.end((request,))
        if (row := self._roster.leave(request)) is not None:
            self.allocator.free(row)
            return True
        return self._roster.withdraw(request)

    def requeue(self, requests: Sequence[int]) -> None:
        """Let these wait in front of all others, in this order; who runs is preempted. fcfs only, not within a step. O(all).

        Raises:
            ConfigError: Under another policy, within a step, or if one of them neither runs nor waits; nothing has changed then.
        """
        roster = self._roster
        if roster.in_step or roster.by_priority or not set(requests) <= set(roster.present().tolist()):
            raise ConfigError(f"requests {[*requests]} cannot queue anew: needs fcfs, and requests that are there, between steps")
        for request in reversed(requests):
            if (row := roster.to_front(request)) is not None:
                self.allocator.free(row)

    def forget_done(self) -> Int64Array:
        """Forget requests that are done or were taken out, so that a server can run for good; not within a step.

        Return the old numbers of the others, ascending: the i-th of them is request i from now on. What happens to them, and what
        is found of those that are forgotten, stays the same; keys that follow must have come before their blocks were computed.
        O(running + waiting).

        Raises:
            ConfigError: Within a step, or if prefixes are cached and a request came without keys: its blocks are known by its
                number, which would be another's.
        """
        if self._roster.in_step or self._unkeyed:
            why = "a step is not completed" if self._roster.in_step else "some came without block keys, and prefix caching is on"
            raise ConfigError(f"requests cannot be forgotten: {why}")
        kept = self._roster.present()
        self._roster.keep(kept, np.array([self._keys.room(request) for request in kept.tolist()], np.int64))
        self._keys.renumber(kept)
        self._num_sampled = self._num_finished = self._step.num_preempted = 0
        return kept


def _compiled_path(roster: Roster, memory: CompiledMemory, limits: SchedulerLimits) -> CompiledPath:
    if memory.lookahead_slots < limits.num_speculative_tokens:
        raise ConfigError(
            f"num-speculative-tokens is {limits.num_speculative_tokens}: drafts need paged memory with as many lookahead_slots; "
            f"{memory.name} has {memory.lookahead_slots}"
        )
    return CompiledPath(roster, memory, limits)
