"""Serving with `generate` of Hugging Face's transformers and no engine: one padded batch after another; nobody joins in between."""

from collections.abc import Iterator
from dataclasses import dataclass

from pagedkv.allocation import Allocator
from pagedkv.decode_run import ONE_STEP, DecodeRun, move_on, steps_to_an_end
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.request_scheduler import RequestScheduler
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.step_batch import StepBatch


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


class NaiveScheduler(RequestScheduler):
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
        >>> from pagedkv.allocators import ALLOCATORS
        >>> pool = KVPoolSettings(num_blocks=40, block_size=1, max_num_seqs=2, max_model_len=20)
        >>> allocator = ALLOCATORS.load("contiguous-growing")(pool)
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

    def __init__(self, settings: NaiveSettings, allocator: Allocator) -> None:
        super().__init__(allocator, max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len, shares=False)
        self.settings = settings
        self.num_columns = 0
        """Tokens of each row of the running batch, padding included: the slots that every row needs; 0 while nobody runs."""
        self._new_columns = 0

    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Queue a request as `RequestScheduler.add` does, first come first served; None also if its prompt is too long for a step.

        Raises:
            ConfigError: Also if it has a priority.
        """
        if priority:
            raise ConfigError(f"priority {priority}: batches are made in order of arrival, so it must be 0")
        most = self.settings.max_num_batched_tokens
        if most is not None and prompt_tokens > most:
            return None
        return super().add(prompt_tokens=prompt_tokens, output_tokens=output_tokens, content=content)

    def schedule(self) -> Step:
        """Decide the next step and take its slots. The returned object is overwritten by the next call.

        It is empty where `failed` is not.
        """
        self._begin()
        batch, asks = self.running(), self._grant
        self._new_columns = 1
        if not batch:
            batch, asks = self._next_batch(), self._admit
            prompts = self.requests.arrays["prompt_tokens"][batch]
            self._new_columns = int(prompts.max(initial=0))
        if not all(asks(request, self._new_columns) for request in batch):
            self._fail_all(batch)
            return self._end(Blocker.KV_MEMORY)
        self.num_columns += self._new_columns
        return self._end(Blocker.MAX_NUM_SEQS)

    def forward_passes(self) -> Iterator[StepBatch]:
        """Yield the step decided last as it is computed: padding and all."""
        padded = self._step.batch[: self._step.num_entries].copy()
        padded["num_scheduled_tokens"], padded["num_slots_needed"] = self._new_columns, self.num_columns
        yield padded

    def decode_run(self) -> DecodeRun:
        """Return how many steps it takes until a row of the running batch has all its tokens, or needs more slots."""
        step = self._step
        entries = step.batch[: step.num_entries]
        computing = entries[entries["num_scheduled_tokens"] > 0]
        if not computing.size or step.num_running_before < entries.size:
            return ONE_STEP
        return self.allocator.decode_run(next(self.forward_passes()), steps_to_an_end(self.requests.arrays, computing))

    def repeat(self, num_steps: int) -> None:
        """Take the slots of `num_steps` more steps of a decode run, which are completed in `requests` but for the last of them."""
        self.allocator.grow_in_turn(next(self.forward_passes()), num_steps)
        self.num_columns += num_steps
        move_on(self._step.batch[: self._step.num_entries], num_steps)

    def complete(self) -> None:
        """Apply the step decided last; if it was the last of its batch, all of the batch is finished and its memory is freed."""
        requests, entries = self.requests.arrays, self._step.batch[: self._step.num_entries]
        batch = entries["request"]
        requests["num_computed_tokens"][batch] += entries["num_scheduled_tokens"]
        for row in entries["row"].tolist():
            self.allocator.note_computed(row, self.num_columns + 1)
        final = requests["prompt_tokens"][batch] + requests["output_tokens"][batch]
        returns = bool((requests["num_computed_tokens"][batch] == final - 1).all())
        sampled = batch if returns else batch[requests["num_known_tokens"][batch] < final - 1]
        requests["num_known_tokens"][sampled] += 1
        self._num_sampled, self._num_finished = sampled.size, batch.size if returns else 0
        self.num_output_tokens = sampled.size
        self._sampled[: sampled.size] = sampled
        self._finished[: self._num_finished] = sampled[: self._num_finished]
        if returns:
            for request in batch.tolist():
                self._stop(request, forget=False)
            self.num_columns = 0

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all is as `RequestScheduler` wants it, and every running row has slots for all columns."""
        super().check_integrity()
        held = self.allocator.units_held[self.requests.arrays["row"][self.running()]]
        if (held < self.num_columns).any() or (self.num_columns > 0) != (self.num_running > 0):
            raise IntegrityError(f"{self.running()} hold {held.tolist()} slots for {self.num_columns} columns")

    def _next_batch(self) -> list[int]:
        batch: list[int] = []
        most_prompt = most_output = 0
        for _, request in self.queue[: self.settings.max_num_seqs]:
            record = self.requests.arrays[request]
            most_prompt = max(most_prompt, int(record["prompt_tokens"]))
            most_output = max(most_output, int(record["output_tokens"]))
            tokens, most_tokens = most_prompt * (len(batch) + 1), self.settings.max_num_batched_tokens
            if most_prompt + most_output > self.max_model_len or (most_tokens is not None and tokens > most_tokens):
                break
            batch.append(request)
        return batch

    def _fail_all(self, batch: list[int]) -> None:
        self._begin()
        for request in batch:
            self._fail(request)
        self.num_columns = self._new_columns = 0

    def _enter(self, request: int, num_tokens: int) -> None:
        """Write what is true of `request`, for which `num_tokens` slots were had: padding has no tokens."""
        del num_tokens
        super()._enter(request, self.num_remaining(request))
