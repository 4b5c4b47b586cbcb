"""What schedulers have in common whose requests are in a `Roster` and whose steps a `StepPath` decides."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from pagedkv.arrays import BoolArray, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.scheduling.compiled_path import CompiledPath
from pagedkv.scheduling.content import Contents, Segments
from pagedkv.scheduling.requests import RequestTable
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.step import Step
from pagedkv.scheduling.step_path import StepArrays, StepPath
from pagedkv.scheduling.waiting import SchedulerArrays
from pagedkv.step_allocation import RowMemory
from pagedkv.step_batch import StepBatch
from pagedkv.step_memory import NEVER


class BatchScheduler(ABC):
    """A `StepScheduler` but for `add`, which says what an engine takes."""

    def __init__(
        self, roster: Roster, allocator: RowMemory, path: StepPath, step_arrays: StepArrays, *, max_model_len: int
    ) -> None:
        self._roster, self._path, self.step_arrays = roster, path, step_arrays
        self.allocator: RowMemory = allocator
        self.max_model_len = max_model_len
        self._step = Step(step_arrays.batch)
        self._num_sampled = self._num_finished = self.num_output_tokens = 0

    @property
    def compiled(self) -> CompiledPath | None:
        """What decides, if it is compiled: then `pagedkv.sims.run_steps` can run steps without asking."""
        return self._path if isinstance(self._path, CompiledPath) else None

    @property
    def takes_future_requests(self) -> bool:
        """Whether `add_all` may be used: who is refused is known before it arrives."""
        return self.compiled is not None

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a preemption, have computed."""
        return False

    @property
    def requests(self) -> RequestTable:
        """All requests since the start, or since those that were done were forgotten."""
        return self._roster.requests

    @property
    def arrays(self) -> SchedulerArrays:
        """Who runs, who waits, and which rows are free."""
        return self._roster.arrays

    @property
    def num_running(self) -> int:
        """Requests in the running batch."""
        return self._roster.num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._roster.num_waiting

    def waiting(self) -> Int64Array:
        """Return the queue, its head first; under policy priority the others in no order. O(waiting)."""
        return self._roster.waiting()

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""
        return self._path.cached_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return self._path.shared_slots

    @property
    def moved_blocks(self) -> tuple[int, int]:
        """Blocks that the step decided last copies from a second tier of the memory, and to it."""
        return self._path.moved_blocks

    @property
    def preempted(self) -> Int64Array:
        """Requests preempted in the step decided last, in order. A view."""
        return self.step_arrays.preempted[: self._step.num_preempted]

    @property
    def failed(self) -> Int64Array:
        """Requests that the step decided last ended with an error, in order: they hold nothing and never come back. A view."""
        return self.step_arrays.failed[: self._step.num_failed]

    @property
    def sampled(self) -> Int64Array:
        """Requests that got an output token in the step completed last, in scheduling order. A view."""
        return self.step_arrays.sampled[: self._num_sampled]

    @property
    def finished(self) -> Int64Array:
        """Those of them that are done. A view."""
        return self.step_arrays.finished[: self._num_finished]

    @abstractmethod
    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Put a request into the queue and return its index; None if it is refused."""

    def can_take(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> BoolArray:
        """Return which requests of these lengths are not refused for their lengths."""
        fits: BoolArray = prompt_tokens + output_tokens <= self.max_model_len
        return fits

    def add_all(self, prompt_tokens: Int64Array, output_tokens: Int64Array, *, contents: Contents | None = None) -> BoolArray:
        """Make requests known that will arrive later, in this order; return which of them can run here.

        Raises:
            ConfigError: If it does not take such, a length is below 1, or there are not as many `contents`.
        """
        if self.compiled is None or not self.takes_future_requests:
            raise ConfigError(f"{self.allocator.name} does not take requests all at once: add them one by one")
        if prompt_tokens.size and min(prompt_tokens.min(), output_tokens.min()) < 1:
            raise ConfigError("requests need 1 or more prompt and output tokens")
        if contents is not None and contents.first_segment.size != prompt_tokens.size:
            raise ConfigError(f"{contents.first_segment.size} contents for {prompt_tokens.size} requests")
        admission_slots = self.compiled.memory.all_admission_slots(prompt_tokens, output_tokens)
        accepted: BoolArray = (admission_slots != NEVER) & self.can_take(prompt_tokens, output_tokens)
        if contents is not None and self.caches_prefixes:
            contents = contents._replace(
                first_segment=contents.first_segment[accepted], num_segments=contents.num_segments[accepted]
            )
        else:
            contents = None
        self.requests.extend(prompt_tokens[accepted], output_tokens[accepted], admission_slots[accepted], contents)
        self._roster.expect_all()
        return accepted

    def schedule(self) -> Step:
        """Decide the next step and take its slots. The returned object is overwritten by the next call."""
        step = self._step
        self._path.schedule(step, self.step_arrays)
        self._roster.in_step = step.num_entries > 0
        return step

    def forward_passes(self) -> Iterator[StepBatch]:
        """Yield what the step decided last computes together."""
        return self._path.forward_passes(self._step, self.step_arrays)

    def complete(self) -> None:
        """Apply the step decided last: its tokens are computed, `sampled` and `finished` say what came out, memory is freed."""
        self._roster.in_step = False
        self._num_sampled, self.num_output_tokens, self._num_finished = self._path.complete(self._step, self.step_arrays)

    def drop_head(self) -> int:
        """Take the head of the queue out for good and return it: the way out when nothing runs and it still does not fit."""
        return self._roster.drop_head()

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows, queue and running batch fit together and every running request has its slots."""
        self.allocator.check_integrity()
        allocator = self.allocator
        if isinstance(allocator, HybridStepAllocator):
            self._roster.check_integrity(allocator.tokens_within())
        else:
            self._roster.check_integrity(allocator.units_held.astype(np.int64) * allocator.unit_slots)
