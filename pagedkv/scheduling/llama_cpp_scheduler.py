"""The scheduler of llama.cpp's server, and of Ollama, which runs that server: requests wait for a server slot, never for memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from pagedkv.allocators.llama_cpp_split import SplitStreams
from pagedkv.allocators.llama_cpp_unified import LlamaCppUnified
from pagedkv.errors import ConfigError
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.request_scheduler import RequestScheduler
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.scheduling.ubatches import equal_split, simple_split
from pagedkv.step_batch import StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppSettings:
    """How the server batches, by its flags' names. Source of the defaults: llama.cpp, common_params."""

    n_batch: int = 2048
    """Most tokens of a batch, at least one per server slot: --batch-size."""
    n_ubatch: int = 512
    """Most tokens that are computed together: --ubatch-size."""
    cont_batching: bool = True
    """Let prompts join a batch in which others generate: --cont-batching."""
    cache_prompt: bool = True
    """Let slots keep what they computed, for which the allocator must cache prefixes: --cache-prompt."""
    max_queue: int | None = None
    """Most requests that may wait for a server slot; one more is turned away (Ollama: status 503). None: no limit."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: With the values that would work.
        """
        for name, least in (("n_batch", 1), ("n_ubatch", 1), ("max_queue", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: needs {least} or more")


OLLAMA = LlamaCppSettings(max_queue=512)
"""Source: Ollama, OLLAMA_MAX_QUEUE. What it reserves at load, context x parallel, is the allocator `ollama`."""


class LlamaCppScheduler(RequestScheduler):
    """Decides as llama-server does, with as many requests at once as `allocator` has server slots.

    A batch has one token of each slot that generates, then prompts, those begun before others, up to n_batch tokens. Who waits gets
    idle slots in order of arrival; which one, the allocator says when it computes its first tokens. If cells run short, idle slots
    are purged, then the batch is computed in parts: those of its first n_batch / 2, / 4, ... tokens that get cells, one step each,
    nobody joining in between. If not even one token gets a cell, all that have a slot end with an error (`failed`); what they
    computed is forgotten. Nobody is ever preempted.

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> pool = KVPoolSettings(num_blocks=16, block_size=1, max_num_seqs=2, max_model_len=16)
        >>> scheduler = LlamaCppScheduler(LlamaCppSettings(), LlamaCppUnified(pool))
        >>> scheduler.add(prompt_tokens=7, output_tokens=9), scheduler.add(prompt_tokens=7, output_tokens=9)
        (0, 1)
        >>> while not scheduler.failed.size:  # 16 cells for two requests that need 15 each
        ...     step = scheduler.schedule()
        ...     scheduler.complete()
        >>> scheduler.failed.tolist(), scheduler.requests.arrays["num_known_tokens"][:2].tolist()
        ([1, 0], [9, 9])
    """

    def __init__(self, settings: LlamaCppSettings, allocator: LlamaCppUnified | SplitStreams) -> None:
        num_slots = len(allocator.server_slots.slots)
        super().__init__(allocator, max_num_seqs=num_slots, max_model_len=allocator.max_model_len, shares=settings.cache_prompt)
        if settings.n_batch < num_slots:
            raise ConfigError(f"n_batch is {settings.n_batch}: needs {num_slots} or more, a token of each server slot")
        self.settings = settings
        self.num_turned_away = 0
        """Requests refused because too many waited."""
        self._server_slots = allocator.server_slots
        self._cells = allocator.cells if isinstance(allocator, LlamaCppUnified) else None
        self._batch: list[tuple[int, int]] = []
        """(request, tokens) of the batch that are still to be computed."""
        self._num_assigned = 0
        """How many at the head of the queue have been promised a server slot."""

    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Queue a request as `RequestScheduler.add` does, first come first served; None also if the queue is full.

        Raises:
            ConfigError: Also if it has a priority.
        """
        if priority:
            raise ConfigError(f"priority {priority}: llama.cpp serves in order of arrival, so it must be 0")
        num_idle = self.arrays.running.size - self.num_running
        if self.settings.max_queue is not None and self.num_waiting - num_idle >= self.settings.max_queue:
            self.num_turned_away += 1
            return None
        return super().add(prompt_tokens=prompt_tokens, output_tokens=output_tokens, content=content)

    def schedule(self) -> Step:
        """Decide the next step and take its cells. The returned object is overwritten by the next call.

        It is empty where `failed` is not.
        """
        self._begin()
        if not self._batch:
            self._fill_batch()
        if not self._batch:
            return self._end(Blocker.NONE)
        size = self.settings.n_batch
        while not self._fits(part := _head(self._batch, size)):
            size //= 2
        done = 0
        for request, num_tokens in part:
            if not (self._grant(request, num_tokens) if self.is_running(request) else self._assign(request, num_tokens)):
                break
            done += num_tokens
        if not done:
            self._fail_all()
            return self._end(Blocker.KV_MEMORY)
        self._batch = _tail(self._batch, done)
        return self._end(self._blocker(cut=bool(self._batch)))

    def forward_passes(self) -> Iterator[StepBatch]:
        """Yield the micro-batches of the step decided last, one after the other."""
        entries = self._step.batch[: self._step.num_entries]
        places = sorted(
            (not self._generates(request), self._slot(request), i) for i, request in enumerate(entries["request"].tolist())
        )
        entries = entries[[i for *_, i in places]]  # the order of the server's batch
        num_tokens = entries["num_scheduled_tokens"].tolist()
        if self._cells is not None:
            parts = simple_split(num_tokens, self.settings.n_ubatch)
        else:
            parts = equal_split(num_tokens, [slot for _, slot, _ in places], self.settings.n_ubatch)
        computed = (entries["num_slots_needed"] - entries["num_scheduled_tokens"]).tolist()
        for part in parts:
            batch = entries[[entry for entry, _ in part]]
            for i, (entry, size) in enumerate(part):
                computed[entry] += size
                batch["num_scheduled_tokens"][i], batch["num_slots_needed"][i] = size, computed[entry]
            yield batch

    def _goes_on(self, step: Step) -> bool:
        """Nobody joins while all server slots are taken, and a batch that was cut is finished first."""
        entries = step.batch["request"][: step.num_entries]
        requests = self.requests.arrays[entries]
        generate = bool((requests["num_known_tokens"] > requests["prompt_tokens"]).all())
        return generate and not self._batch and (not self.queue or self.num_running == self.arrays.running.size)

    def _fill_batch(self) -> None:
        running = sorted(self.running(), key=self._slot)
        self._batch = [(request, 1) for request in running if self._generates(request)]
        self._num_assigned = min(self.arrays.running.size - len(running), self.num_waiting)
        if self._batch and not self.settings.cont_batching:
            return
        room = self.settings.n_batch - len(self._batch)
        begun = [request for request in running if not self._generates(request)]
        for request in [*begun, *(request for _, request in self.queue[: self._num_assigned])]:
            if not room:
                break
            num_tokens = min(self.num_remaining(request) - self._num_cached(request), room)
            self._batch.append((request, num_tokens))
            room -= num_tokens

    def _fits(self, part: list[tuple[int, int]]) -> bool:
        """Whether cells can be had for `part`, if all idle slots may be purged but for those that it needs."""
        if self._cells is None:
            return True
        needed = sum(num_tokens + self._num_cached(request) for request, num_tokens in part)
        return needed <= self._cells.size - self._cells.num_held

    def _assign(self, request: int, num_tokens: int) -> bool:
        """Give `request` a server slot, and cells for `num_tokens` behind what the slot has of it, or for all that are left."""
        left = self.num_remaining(request) - self._num_cached(request)
        if not self._admit(request, min(num_tokens, left)):
            return False
        self._num_assigned -= 1
        return True

    def _fail_all(self) -> None:
        assigned = [request for _, request in self.queue[: self._num_assigned]]
        for request in [*sorted(self.running(), key=self._slot), *assigned]:
            self._fail(request)
        self._batch, self._num_assigned = [], 0

    def _blocker(self, *, cut: bool) -> Blocker:
        if cut:
            return Blocker.KV_MEMORY
        return Blocker.MAX_NUM_SEQS if self.num_running == self.arrays.running.size else Blocker.TOKEN_BUDGET

    def _num_cached(self, request: int) -> int:
        """Return what a waiting `request` would find in the slot that it would get now."""
        if not self._shares or self.is_running(request):
            return 0
        return self.allocator.allocator.get_computed_tokens(self.kv_request(request))

    def _generates(self, request: int) -> bool:
        record = self.requests.arrays[request]
        return bool(record["num_known_tokens"] > record["prompt_tokens"])

    def _slot(self, request: int) -> int:
        slot = self._server_slots.of(self.kv_request(request))
        assert slot is not None
        return slot.index


def _head(batch: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return the first `size` tokens of `batch`."""
    head = []
    for request, num_tokens in batch:
        if not size:
            break
        head.append((request, min(num_tokens, size)))
        size -= head[-1][1]
    return head


def _tail(batch: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return `batch` without its first `size` tokens."""
    tail = []
    for request, num_tokens in batch:
        gone = min(num_tokens, size)
        size -= gone
        if num_tokens > gone:
            tail.append((request, num_tokens - gone))
    return tail
