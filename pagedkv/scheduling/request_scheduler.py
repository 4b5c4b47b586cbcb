"""A scheduler but for its decision: requests, queue, rows and the step, over an allocator that is asked request by request."""

from bisect import insort
from collections.abc import Iterator

import numpy as np

from pagedkv.allocation import Allocator
from pagedkv.arrays import Int64Array
from pagedkv.decode_run import ONE_STEP, DecodeRun, decodes_all, move_on, steps_to_an_end
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.scheduling.completion import complete_step
from pagedkv.scheduling.content import NO_SEGMENTS, Segments, check_segments
from pagedkv.scheduling.kv_rows import KVRows
from pagedkv.scheduling.requests import NO_ROW, REQUEST, RequestTable
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.scheduling.stream_tokens import token_ids
from pagedkv.scheduling.waiting import NUM_RUNNING, NUM_WAITING, SchedulerArrays, start_running
from pagedkv.step_batch import StepBatch, empty_batch

_COMPUTED, _KNOWN, _ADMISSION, _ROW = (
    (REQUEST.names or ()).index(name) for name in ("num_computed_tokens", "num_known_tokens", "admission_slots", "row")
)
"""Where they stand in a record: a tuple of it is read in a fifth of the time."""


class RequestScheduler:
    """What schedulers of other engines than vLLM have in common, with the surface of `pagedkv.scheduling.scheduler.Scheduler`.

    An engine's scheduler decides in `schedule`, between `_begin` and `_end`, by `_grant`, `_admit` and `_preempt`. The
    entries of a step are the head of the running list, in its order, admissions last; those who run but are left out follow them.
    """

    def __init__(self, allocator: Allocator, *, max_num_seqs: int, max_model_len: int, shares: bool) -> None:
        for name, value, room in (
            ("max-num-seqs", max_num_seqs, allocator.max_num_seqs),
            ("max-model-len", max_model_len, allocator.max_model_len),
        ):
            if value > room:
                raise ConfigError(f"{name} is {value}, the allocator was built for {room}")
        self.allocator = KVRows(allocator, num_rows=max_num_seqs)
        self.requests = RequestTable()
        self.arrays = SchedulerArrays.empty(max_num_seqs, waiting_capacity=1)
        """Who runs in which row, and how many wait: in what order, `queue` says."""
        self.queue: list[tuple[int, int]] = []
        """(priority, request) of those who wait, ascending."""
        self.max_model_len = max_model_len
        self._shares = shares
        self._waiting: dict[int, KVRequest] = {}
        self._step = Step(empty_batch(max_num_seqs))
        self._preempted: list[int] = []
        self._sampled, self._finished = np.zeros((2, max_num_seqs), np.int64)
        self._num_sampled = self._num_finished = self.num_output_tokens = 0

    @property
    def num_running(self) -> int:
        """Requests in the running batch."""
        return int(self.arrays.counts[NUM_RUNNING])

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self.queue)

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a preemption, have computed."""
        return self._shares

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""
        return self.allocator.cached_slots if self._shares else 0

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""
        return self.allocator.shared_slots if self._shares else 0

    @property
    def sampled(self) -> Int64Array:
        """Requests that got an output token in the step completed last, in scheduling order. A view."""
        return self._sampled[: self._num_sampled]

    @property
    def finished(self) -> Int64Array:
        """Those of them that are done. A view."""
        return self._finished[: self._num_finished]

    @property
    def preempted(self) -> Int64Array:
        """Requests preempted by the last `schedule`, in order."""
        return np.array(self._preempted, np.int64)

    @property
    def failed(self) -> Int64Array:
        """Requests that the last `schedule` ended with an error: none, here whoever does not fit is preempted or refused."""
        return np.zeros(0, np.int64)

    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Put a request into the queue and return its index; None if it is refused, because it could never run here.

        Args:
            prompt_tokens: Length of the prompt.
            output_tokens: Tokens that it will generate.
            priority: The lower the sooner it is its turn.
            content: What it shares with others, from its start on; the rest is its own. Not looked at where nothing is shared.

        Raises:
            ConfigError: If a length is below 1, or the content is out of order.
        """
        if prompt_tokens < 1 or output_tokens < 1:
            raise ConfigError(f"a request needs 1 or more prompt and output tokens, not {prompt_tokens} and {output_tokens}")
        if content is None or not self._shares:
            content = NO_SEGMENTS
        check_segments(content)
        admission_slots = self.allocator.allocator.admission_slots(prompt_tokens, output_tokens)
        if admission_slots is None or prompt_tokens + output_tokens > self.max_model_len:
            return None
        request = self.requests.add(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            admission_slots=admission_slots,
            priority=priority,
            content=content,
        )
        self._wait(request)
        return request

    def forward_passes(self) -> Iterator[StepBatch]:
        """Yield what the step decided last computes together: one batch, unless an engine cuts it."""
        yield self._step.batch[: self._step.num_entries]

    def decode_run(self) -> DecodeRun:
        """Return how often the step decided last would be decided again, for every request one token further on."""
        step = self._step
        batch = step.batch[: step.num_entries]
        if step.num_preempted or step.num_running_before < batch.size or not decodes_all(batch, self.num_running):
            return ONE_STEP
        if not self._goes_on(step):
            return ONE_STEP
        return self.allocator.decode_run(batch, steps_to_an_end(self.requests.arrays, batch))

    def repeat(self, num_steps: int) -> None:
        """Take the slots of `num_steps` more steps of a decode run, which are completed in `requests` but for the last of them."""
        batch = self._step.batch[: self._step.num_entries]
        self.allocator.grow_in_turn(batch, num_steps)
        move_on(batch, num_steps)

    def _goes_on(self, step: Step) -> bool:
        """Whether `step`, in which all who run made a token, would be decided again if memory sufficed and nobody came or ended.

        No, where an engine does not say so.
        """
        del step
        return False

    def complete(self) -> None:
        """Apply the step decided last: its tokens are computed, `sampled` and `finished` say what came out, memory is freed."""
        requests, step = self.requests.arrays, self._step
        self._num_sampled, self.num_output_tokens, self._num_finished = complete_step(
            self.arrays, requests, step.batch, step.num_entries, self._sampled, self._finished
        )
        entries = step.batch[: step.num_entries]
        for row, known in zip(entries["row"].tolist(), requests["num_known_tokens"][entries["request"]].tolist(), strict=True):
            self.allocator.note_computed(row, known)
        for request in self.finished.tolist():
            self.allocator.free(int(requests["row"][request]))
            requests["row"][request] = NO_ROW

    def drop_head(self) -> int:
        """Take the head of the queue out for good and return it: the way out when nothing runs and it still does not fit."""
        _, request = self.queue[0]
        self._leave_queue(request)
        return request

    def waiting(self) -> Int64Array:
        """Return the queue, its head first. O(waiting)."""
        return np.array([request for _, request in self.queue], np.int64)

    def running(self) -> list[int]:
        """Return the requests that run, in the order of the last step."""
        running: list[int] = self.arrays.running[: self.num_running].tolist()
        return running

    def num_remaining(self, request: int) -> int:
        """Return how many known tokens of `request` are not computed yet."""
        requests = self.requests.arrays
        return int(requests["num_known_tokens"][request] - requests["num_computed_tokens"][request])

    def is_running(self, request: int) -> bool:
        """Return whether `request` has a row."""
        return bool(self.requests.arrays["row"][request] != NO_ROW)

    def kv_request(self, request: int) -> KVRequest:
        """Return what the allocator knows of `request`: for one that waits, all that an admission would bring."""
        requests = self.requests.arrays
        if self.is_running(request):
            return self.allocator.of(int(requests["row"][request]))
        kv = self._waiting.get(request)
        if kv is None:
            kv = self._waiting[request] = KVRequest(request_id=request, num_tokens=0)
            kv.admission_slots = int(requests["admission_slots"][request])
            if self._shares:
                _, first, last = self.segments_of(request)
                num_tokens = int(requests["prompt_tokens"][request] + requests["output_tokens"][request])
                kv.token_ids = token_ids(self.requests.segments[first:last], request, num_tokens)
        kv.num_tokens = int(requests["num_known_tokens"][request])
        return kv

    def segments_of(self, request: int) -> tuple[Segments, int, int]:
        """Return all segments, and where those of `request` begin and end."""
        record = self.requests.arrays[request]
        first = int(record["first_segment"])
        return self.requests.segments, first, first + int(record["num_segments"])

    def _begin(self) -> None:
        self._step.num_entries = self._step.num_running_before = 0
        self._preempted = []

    def _grant(self, request: int, num_tokens: int) -> bool:
        """Let a running `request` compute `num_tokens` more in this step, if they get slots."""
        if not self.allocator.grow(int(self.requests.arrays["row"][request]), num_tokens):
            return False
        self._enter(request, num_tokens)
        self._step.num_running_before += 1
        return True

    def _admit(self, request: int, num_tokens: int) -> bool:
        """Let a waiting `request` run, with `num_tokens` behind its cached ones, if they get slots."""
        requests, kv, row = self.requests.arrays, self.kv_request(request), int(self.arrays.free_rows[self.num_running])
        num_cached = self.allocator.admit(row, kv, num_tokens)
        if num_cached is None:
            return False
        self._leave_queue(request)
        requests["num_computed_tokens"][request] = num_cached
        if requests["num_queried_tokens"][request] == 0:
            requests["num_cached_tokens"][request] = num_cached
        requests["num_queried_tokens"][request] += kv.num_tokens
        requests["num_hit_tokens"][request] += num_cached
        start_running(self.arrays, requests, request, row)
        self._enter(request, num_tokens)
        return True

    def _preempt(self, request: int) -> None:
        """Let a running `request` give its slots back. It is in no queue until `_end`."""
        requests = self.requests.arrays
        self._stop(request)
        requests["num_computed_tokens"][request] = 0
        requests["num_preemptions"][request] += 1
        self._preempted.append(request)

    def _end(self, blocker: Blocker) -> Step:
        """Put the running list in order and return the step; `blocker` is what holds up the queue, if anybody is in it."""
        step = self._step
        for request in self._preempted:
            self._wait(request)
        entries = step.batch["request"][: step.num_entries].tolist()
        left_out = set(self.running()).difference(entries)
        self.arrays.running[: self.num_running] = [*entries, *sorted(left_out)]
        step.num_preempted = len(self._preempted)
        step.blocker = blocker if self.queue else Blocker.NONE
        return step

    def _enter(self, request: int, num_tokens: int) -> None:
        record, step = self.requests.arrays[request].item(), self._step
        step.batch[step.num_entries] = (
            request,
            num_tokens,
            record[_COMPUTED] + num_tokens,
            record[_KNOWN],
            record[_ADMISSION],
            0,
            record[_ROW],
        )
        step.num_entries += 1

    def _wait(self, request: int) -> None:
        insort(self.queue, (int(self.requests.arrays["priority"][request]), request))
        self.arrays.counts[NUM_WAITING] = len(self.queue)

    def _leave_queue(self, request: int) -> None:
        self.queue.remove((int(self.requests.arrays["priority"][request]), request))
        self.arrays.counts[NUM_WAITING] = len(self.queue)
        self._waiting.pop(request, None)

    def _stop(self, request: int) -> None:
        running, last, row = self.running(), self.num_running - 1, int(self.requests.arrays["row"][request])
        running.remove(request)
        self.allocator.free(row)
        self.arrays.running[:last], self.arrays.free_rows[last] = running, row
        self.arrays.counts[NUM_RUNNING] = last
        self.requests.arrays["row"][request] = NO_ROW

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows, queue and running batch fit together and every running request has its slots."""
        self.allocator.check_integrity()
        requests, running, waiting = self.requests.arrays, self.running(), self.waiting()
        rows, free_rows = requests["row"][running], self.arrays.free_rows[len(running) :]
        slots = self.allocator.units_held[rows]
        if (
            not np.array_equal(np.sort(np.concatenate((rows, free_rows))), np.arange(self.arrays.running.size))
            or np.unique([*running, *waiting]).size != len(running) + waiting.size
            or (requests["row"][waiting] != NO_ROW).any()
            or requests["num_computed_tokens"][waiting].any()
            or (slots < requests["num_computed_tokens"][running]).any()
            or self.queue != sorted(self.queue)
            or self.arrays.counts[NUM_WAITING] != len(self.queue)
            or not self._waiting.keys() <= set(waiting.tolist())
        ):
            raise IntegrityError(f"running {running} in rows {rows.tolist()} with {slots.tolist()} slots, waiting {self.queue}")
