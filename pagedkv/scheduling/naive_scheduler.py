"""Serving with `generate` of Hugging Face's transformers and no engine: one padded batch after another; nobody joins in between."""

from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import BoolArray, Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.compiled_path import CompiledPath
from pagedkv.scheduling.content import Segments, check_segments
from pagedkv.scheduling.naive_step import NUM_COLUMNS, NaiveBatches
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.step_path import StepArrays
from pagedkv.step_allocation import CompiledMemory, StepAllocator

_NO_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveSettings:
    """What the loop around `generate` decides."""

    max_num_seqs: int = 1
    """Most requests of one call of `generate`; with 1 nothing is ever padded."""
    max_model_len: int
    """Longest prompt + output, padding included, in tokens: max_length."""
    max_num_batched_tokens: int | None = None
    """Most tokens of a batch's padded prompts, which are computed in one step: as many as there is memory for activations;
    None: no limit."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run.

        Raises:
            ConfigError: With the values that would work.
        """
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.replace('_', '-')} is {value}: needs 1 or more")


class NaiveScheduler(BatchScheduler):
    """Runs static batches: those at the head of the queue when nobody runs, held together until the longest output ends.

    Prompts are padded on the left to the longest of the batch and computed whole, in one step; then every row computes one more
    token per step. A row whose output is done goes on, as padding. Each row holds slots for all columns of the padded batch: those
    beyond its own tokens are never of use to anybody. A step's own batch has the true tokens, `forward_passes` the padded ones.

    Tokens are sampled as they are computed (a streamer hands them on), but the last of each request only at the end of its batch,
    when `generate` returns. If slots run short, at the start of a batch or later, all of the batch fails with it (torch's "out of
    memory"): what it computed is forgotten, and the queue goes on. Nobody is preempted, nothing is shared.

    `allocator` reserves max_model_len for a request (a static cache) or lets it grow (a dynamic cache).

    A batch takes max_num_seqs requests, less only where the next would make it longer than max_model_len, or its padded prompts
    more than max_num_batched_tokens: both are known before (max_new_tokens comes with a request).

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> from pagedkv.step_allocation import step_allocator
        >>> pool = KVPoolSettings(num_blocks=40, block_size=1, max_num_seqs=2, max_model_len=20)
        >>> allocator = step_allocator("contiguous-growing", pool)
        >>> scheduler = NaiveScheduler(NaiveSettings(max_num_seqs=2, max_model_len=20), allocator)
        >>> scheduler.add(prompt_tokens=7, output_tokens=2), scheduler.add(prompt_tokens=3, output_tokens=4)
        (0, 1)
        >>> while scheduler.num_waiting or scheduler.num_running:
        ...     step = scheduler.schedule()
        ...     slots = scheduler.allocator.units_held.tolist()  # 10 of the last 20 hold padding
        ...     scheduler.complete()
        ...     print(slots, scheduler.sampled.tolist(), scheduler.finished.tolist())
        [7, 7] [0, 1] []
        [8, 8] [1] []
        [9, 9] [1] []
        [10, 10] [0, 1] [0, 1]
    """

    allocator: StepAllocator

    def __init__(self, settings: NaiveSettings, allocator: StepAllocator) -> None:
        """Run batches over `allocator`.

        Raises:
            ConfigError: If it has no room for so many requests, or such long ones, or its memory is not of a compiled kind.
        """
        for name, value, room in (
            ("max-num-seqs", settings.max_num_seqs, allocator.units_held.size),
            ("max-model-len", settings.max_model_len, allocator.max_model_len),
        ):
            if value > room:
                raise ConfigError(f"{name} is {value}, the allocator was built for {room}")
        if not isinstance(allocator, CompiledMemory):
            raise ConfigError(f"static batches run over contiguous-growing or contiguous-max, not {allocator.name}")
        self.settings = settings
        self._most_prompt = _NO_LIMIT if settings.max_num_batched_tokens is None else settings.max_num_batched_tokens
        self._columns = np.zeros(2, np.int64)
        roster = Roster(max_num_seqs=settings.max_num_seqs, by_priority=False)
        super().__init__(
            roster,
            allocator,
            CompiledPath(roster, allocator, NaiveBatches(int(settings.max_model_len), int(self._most_prompt), self._columns)),
            StepArrays.empty(settings.max_num_seqs, max_pass_entries=settings.max_num_seqs, max_passes=1),
            max_model_len=settings.max_model_len,
        )

    @property
    def num_columns(self) -> int:
        """Tokens of each row of the running batch, padding included: the slots that every row needs; 0 while nobody runs."""
        return int(self._columns[NUM_COLUMNS])

    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Queue a request, first come first served, and return its index; None if it is refused, because it could never run here.

        Raises:
            ConfigError: If a length is below 1, the content is out of order, or it has a priority.
        """
        if prompt_tokens < 1 or output_tokens < 1:
            raise ConfigError(f"a request needs 1 or more prompt and output tokens, not {prompt_tokens} and {output_tokens}")
        if priority:
            raise ConfigError(f"priority {priority}: batches are made in order of arrival, so it must be 0")
        if content is not None:
            check_segments(content)
        admission_slots = self.allocator.admission_slots(prompt_tokens, output_tokens)
        too_long = prompt_tokens > self._most_prompt or prompt_tokens + output_tokens > self.max_model_len
        if admission_slots is None or too_long:
            return None
        request = self.requests.add(prompt_tokens=prompt_tokens, output_tokens=output_tokens, admission_slots=admission_slots)
        self._roster.queue(request)
        return request

    def can_take(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> BoolArray:
        """Return which requests of these lengths are not refused for their lengths: also those with prompts that fit a step."""
        return super().can_take(prompt_tokens, output_tokens) & (prompt_tokens <= self._most_prompt)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all is as `BatchScheduler` wants it, and every running row has slots for all columns."""
        super().check_integrity()
        running = self._roster.running()
        held = self.allocator.units_held[self.requests.arrays["row"][running]]
        if (held < self.num_columns).any() or (self.num_columns > 0) != (self.num_running > 0):
            raise IntegrityError(f"{running.tolist()} hold {held.tolist()} slots for {self.num_columns} columns")
