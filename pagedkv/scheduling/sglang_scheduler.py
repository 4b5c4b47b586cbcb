"""SGLang's scheduler: prefill first, admission by expectation, retraction when that was wrong. Over a radix tree.

Source: behaviour of SGLang 0.5.23 without overlap: a step is decided when the one before it is done.
"""

from collections.abc import Iterator

import numpy as np

from pagedkv.arrays import NO_TOKENS, Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.decode_run import ONE_STEP, DecodeRun, move_on, steps_to_an_end
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.scheduling.content import Segments, content_of
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.requests import NO_ROW, RequestTable
from pagedkv.scheduling.sglang_prefill import fits_alone
from pagedkv.scheduling.sglang_queue import Permutation
from pagedkv.scheduling.sglang_request import SGLangRequest
from pagedkv.scheduling.sglang_settings import SGLangSettings
from pagedkv.scheduling.sglang_step import SGLangStep
from pagedkv.scheduling.step import Step
from pagedkv.scheduling.waiting import NUM_ACCEPTED, NUM_DRAFTED, NUM_RUNNING, NUM_WAITING, SchedulerArrays
from pagedkv.step_batch import StepBatch, empty_batch


class SGLangScheduler:
    """Decides step by step who computes what, with the surface of `pagedkv.scheduling.scheduler.Scheduler`.

    A step prefills waiting requests if it admits any, and else decodes every running one; with mixed chunks it does both. Who is
    retracted waits behind the others and will recompute.

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> allocator = RadixRows(KVPoolSettings(num_blocks=65, block_size=1, max_model_len=32, enable_prefix_caching=True))
        >>> scheduler = SGLangScheduler(SGLangSettings(max_model_len=32), allocator)
        >>> scheduler.add(prompt_tokens=10, output_tokens=2)
        0
        >>> scheduler.schedule().num_entries, allocator.free_slots
        (1, 54)
        >>> scheduler.complete(); scheduler.sampled.tolist(), scheduler.finished.tolist()
        ([0], [])
    """

    def __init__(self, settings: SGLangSettings, allocator: RadixRows, *, permutation: Permutation | None = None) -> None:
        """Begin with nobody; policy random needs `permutation`, such as that of a numpy Generator.

        Raises:
            ConfigError: If settings and allocator do not fit together.
        """
        settings.check_memory(
            num_rows=allocator.units_held.size,
            max_model_len=allocator.max_model_len,
            block_size=allocator.unit_slots,
            caches_prefixes=allocator.enable_caching,
        )
        if settings.schedule_policy == "random" and permutation is None:
            raise ConfigError("schedule-policy random needs a source of chance: pass permutation, e.g. that of a numpy Generator")
        self.settings, self.allocator = settings, allocator
        self.arrays = SchedulerArrays.empty(settings.max_running_requests, waiting_capacity=1)
        """Who runs, those in the step first, and counts. The queue is in `waiting`."""
        self._batch = SGLangStep(settings, allocator, permutation)
        self._step = Step(empty_batch(settings.max_running_requests))
        self._sampled: Int64Array = np.zeros(0, np.int64)
        self._finished = self._sampled
        self.num_output_tokens = 0

    @property
    def requests(self) -> RequestTable:
        """All requests since the start."""
        return self._batch.requests.table

    @property
    def new_token_ratio(self) -> float:
        """Which share of their possible output running requests are expected to make."""
        return self._batch.ratio.current

    @property
    def num_running(self) -> int:
        """Requests that hold memory."""
        return int(self.arrays.counts[NUM_RUNNING])

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._batch.requests.waiting)

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a retraction, have computed."""
        return self.allocator.enable_caching

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""
        return self.allocator.cached_slots

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return self.allocator.shared_slots

    @property
    def preempted(self) -> Int64Array:
        """Requests retracted in the step decided last, in order."""
        return np.array([request.index for request in self._batch.retracted], np.int64)

    @property
    def failed(self) -> Int64Array:
        """Requests that the last `schedule` ended with an error, in order: they hold nothing and never come back."""
        return np.array([request.index for request in self._batch.failed], np.int64)

    @property
    def sampled(self) -> Int64Array:
        """Requests that got an output token in the step completed last, in scheduling order."""
        return self._sampled

    @property
    def finished(self) -> Int64Array:
        """Those of them that are done."""
        return self._finished

    def add(
        self,
        *,
        prompt_tokens: int,
        output_tokens: int,
        priority: int = 0,
        content: Segments | None = None,
        keys: BlockKeys | None = None,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
        namespace: str = "",
        routing_key: str = "",
    ) -> int | None:
        """Put a request into the queue and return its index; None if it could never run here.

        Args:
            prompt_tokens: Length of the prompt.
            output_tokens: Tokens that it will generate. No rule looks at it before they are there.
            priority: What it leaves in the cache is worth the more the higher this is, for eviction by priority.
            content: What it shares with others, from its start on. Not looked at without prefix caching.
            keys: In place of `content`, keys of all its blocks that will ever be full.
            max_new_tokens: Most that it may generate, which admission reckons with; None: `output_tokens`.
            ignore_eos: It will generate all of them, and admission knows.
            namespace: Requests of different ones share nothing.
            routing_key: What groups requests under policy routing-key.

        Raises:
            ConfigError: If a length is below 1, more is generated than may be, or content or keys cannot be.
        """
        most = output_tokens if max_new_tokens is None else max_new_tokens
        if prompt_tokens < 1 or output_tokens < 1:
            raise ConfigError(f"a request needs 1 or more prompt and output tokens, not {prompt_tokens} and {output_tokens}")
        if most < output_tokens:
            raise ConfigError(f"max-new-tokens is {most}, fewer than the {output_tokens} tokens that will be generated")
        requests, num_tokens = self._batch.requests, prompt_tokens + output_tokens
        allocator = self.allocator
        segments = content_of(
            content,
            keys,
            num_tokens=num_tokens,
            block_size=allocator.unit_slots,
            caches_prefixes=allocator.enable_caching,
        )
        request = SGLangRequest(
            index=requests.table.size,
            name=f"{requests.table.size:012}",
            tokens=NO_TOKENS,
            num_prompt_tokens=prompt_tokens,
            max_new_tokens=most,
            ignore_eos=ignore_eos,
            namespace=namespace,
            routing_key=routing_key,
            priority=priority,
        )
        memory = self.allocator
        if (
            num_tokens > self.settings.max_model_len
            or memory.admission_slots(prompt_tokens, output_tokens) is None
            or not fits_alone(request, self._batch.limits(0), usable_slots=memory.usable_slots, block_size=memory.unit_slots)
        ):
            return None
        requests.add(request, output_tokens=output_tokens, segments=segments)
        self.arrays.counts[NUM_WAITING] = self.num_waiting
        return request.index

    def schedule(self) -> Step:
        """Decide the next step and take its slots. The returned object is overwritten by the next call.

        A step without entries says that the head of the queue cannot run though nobody else does.
        """
        batch, step = self._batch, self._step
        batch.decide()
        decoding, requests, out = batch.decoding, self.requests.arrays, step.batch
        num_resumed, num_before = len(batch.resumed), len(batch.resumed) + decoding.size
        n = num_before + len(batch.admitted)
        out["request"][num_resumed:num_before] = decoding
        drafts = batch.num_drafts if self.settings.num_speculative_tokens and decoding.size else 0
        out["num_scheduled_tokens"][num_resumed:num_before] = 1 + drafts
        out["num_slots_needed"][num_resumed:num_before] = requests["num_computed_tokens"][decoding] + 1 + drafts
        out["num_accepted_tokens"][:n] = 0
        for i, prefill in (*enumerate(batch.resumed), *enumerate(batch.admitted, num_before)):
            out["request"][i], out["num_slots_needed"][i] = prefill.request.index, prefill.end
            out["num_scheduled_tokens"][i] = prefill.end - prefill.start
        index = out["request"][:n].copy()
        out["row"][:n], out["num_known_tokens"][:n] = requests["row"][index], requests["num_known_tokens"][index]
        step.num_entries, step.num_running_before = n, num_before
        step.num_preempted, step.blocker = len(batch.retracted), batch.blocker
        self._count(index)
        return step

    def forward_passes(self) -> Iterator[StepBatch]:
        """Yield the step decided last: it is computed as one."""
        yield self._step.batch[: self._step.num_entries]

    def decode_run(self) -> DecodeRun:
        """Return how often the step decided last would be decided again, for every request one token further on."""
        entries = self._step.batch[: self._step.num_entries]
        if self.settings.num_speculative_tokens or not self._batch.goes_on:
            return ONE_STEP
        return self.allocator.decode_run(entries, steps_to_an_end(self.requests.arrays, entries))

    def repeat(self, num_steps: int) -> None:
        """Take the slots of `num_steps` more steps of a decode run, which are completed in `requests` but for the last of them."""
        entries = self._step.batch[: self._step.num_entries]
        self.allocator.grow_in_turn(entries, num_steps)
        move_on(entries, num_steps)
        for _ in range(num_steps):
            self._batch.ratio.decay()

    def complete(self) -> None:
        """Apply the step decided last: its tokens are computed, `sampled` and `finished` say what came out, memory is freed."""
        batch, step = self._batch, self._step
        first = len(batch.resumed)
        entries = step.batch[first : first + batch.decoding.size]
        num_drafts = int(batch.num_drafts.sum()) if self.settings.num_speculative_tokens and batch.decoding.size else 0
        self._sampled, self._finished, self.num_output_tokens = batch.complete(entries["num_accepted_tokens"])
        self.arrays.counts[NUM_DRAFTED] += num_drafts
        self.arrays.counts[NUM_ACCEPTED] += self.num_output_tokens - self._sampled.size
        self._count(self._sampled[:0])

    def drop_head(self) -> int:
        """Take the head of the queue out for good and return it: the way out when nothing runs and it still does not fit."""
        index = self._batch.requests.drop_head().index
        self.arrays.counts[NUM_WAITING] = self.num_waiting
        return index

    def waiting(self) -> Int64Array:
        """Return the queue as it was sorted last, its head first, newcomers behind. O(waiting)."""
        return self._batch.requests.queue()

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows, queue and running batch fit together and every running request has its slots."""
        memory, requests = self.allocator, self.requests.arrays
        memory.check_integrity()
        running, waiting = self.arrays.running[: self.num_running], self.waiting()
        rows, free_rows = requests["row"][running], np.array(self._batch.free_rows, np.int64)
        slots = memory.units_held[rows].astype(np.int64) * memory.unit_slots
        if (
            not np.array_equal(np.sort(np.concatenate((rows, free_rows))), np.arange(self.settings.max_running_requests))
            or np.unique(np.concatenate((running, waiting))).size != running.size + waiting.size
            or (requests["row"][waiting] != NO_ROW).any()
            or requests["num_computed_tokens"][waiting].any()
            or (slots < requests["num_computed_tokens"][running]).any()
            or memory.units_held[free_rows].any()
        ):
            raise IntegrityError(
                f"running {running.tolist()} in rows {rows.tolist()} with {slots.tolist()} slots, waiting {waiting.tolist()}"
            )

    def _count(self, first: Int64Array) -> None:
        """Write down who runs, those of `first` first, and how many wait."""
        running = self._batch.holders()
        others = running[: running.size - first.size] if first.size in (0, running.size) else running[~np.isin(running, first)]
        self.arrays.running[: first.size] = first
        self.arrays.running[first.size : first.size + others.size] = others
        self.arrays.counts[NUM_RUNNING] = first.size + others.size
        self.arrays.counts[NUM_WAITING] = self.num_waiting
