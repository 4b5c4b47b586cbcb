"""The scheduler of llama.cpp's server, and of Ollama, which runs that server: requests wait for a server slot, never for memory."""

from dataclasses import dataclass

import numpy as np

from pagedkv.allocators.llama_cpp_split import SplitStreams
from pagedkv.allocators.llama_cpp_unified import LlamaCppUnified
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.compiled_path import CompiledPath
from pagedkv.scheduling.content import Segments, content_of
from pagedkv.scheduling.llama_cpp_step import most_passes
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.server_batch import NUM_ASSIGNED, NUM_PENDING, ServerBatch
from pagedkv.scheduling.slot_steps import SlotStepAllocator
from pagedkv.scheduling.step_path import StepArrays


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


class LlamaCppScheduler(BatchScheduler):
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
        if settings.n_batch < num_slots:
            raise ConfigError(f"n_batch is {settings.n_batch}: needs {num_slots} or more, a token of each server slot")
        self.settings = settings
        self.num_turned_away = 0
        """Requests refused because too many waited."""
        self._server = ServerBatch.empty(
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            cont_batching=settings.cont_batching,
            equal_sequences=not isinstance(allocator, LlamaCppUnified),
            num_server_slots=num_slots,
        )
        self._memory, roster = SlotStepAllocator(allocator), Roster(max_num_seqs=num_slots, by_priority=False)
        self._caches = settings.cache_prompt and allocator.server_slots.remembers
        most = most_passes(self._server)
        super().__init__(
            roster,
            self._memory,
            CompiledPath(roster, self._memory, self._server),
            StepArrays.empty(num_slots, max_pass_entries=min(settings.n_batch, most * num_slots), max_passes=most),
            max_model_len=allocator.max_model_len,
        )

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what those before them in their slot have computed."""
        return self._caches

    @property
    def takes_future_requests(self) -> bool:
        """Whether `add_all` may be used: not if who comes may find the queue full."""
        return self.settings.max_queue is None

    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Put a request into the queue, first come first served, and return its index; None if it is refused.

        It is, if it could never run here, or if the queue is full.

        Args:
            prompt_tokens: Length of the prompt.
            output_tokens: Tokens that it will generate.
            priority: 0.
            content: What it shares with others, from its start on; the rest is its own. Not looked at where nothing is kept.

        Raises:
            ConfigError: If a length is below 1, it has a priority, or the content is out of order.
        """
        if priority:
            raise ConfigError(f"priority {priority}: llama.cpp serves in order of arrival, so it must be 0")
        num_idle = self.arrays.running.size - self.num_running
        if self.settings.max_queue is not None and self.num_waiting - num_idle >= self.settings.max_queue:
            self.num_turned_away += 1
            return None
        if prompt_tokens < 1 or output_tokens < 1:
            raise ConfigError(f"a request needs 1 or more prompt and output tokens, not {prompt_tokens} and {output_tokens}")
        content = content_of(content, None, num_tokens=prompt_tokens, block_size=1, caches_prefixes=self._caches)
        admission_slots = self._memory.admission_slots(prompt_tokens, output_tokens)
        if admission_slots is None or prompt_tokens + output_tokens > self.max_model_len:
            return None
        request = self.requests.add(
            prompt_tokens=prompt_tokens, output_tokens=output_tokens, admission_slots=admission_slots, content=content
        )
        self._roster.queue(request)
        return request

    def check_integrity(self) -> None:
        """Raise IntegrityError unless slots, queue, running and pending requests fit together, and each has its cells."""
        super().check_integrity()
        requests, slots, server = self.requests.arrays, self._memory.slots, self._server
        running, waiting = self._roster.running(), self.waiting()
        num_pending, num_assigned = server.counts[NUM_PENDING], server.counts[NUM_ASSIGNED]
        pending = server.requests[:num_pending]
        promised = waiting[:num_assigned]
        if (
            not np.array_equal(np.sort(running), np.sort(slots.requests[slots.runs > 0]))
            or not np.array_equal(slots.requests[requests["row"][running]], running)
            or not 0 <= num_assigned <= slots.runs.size - running.size
            or not np.isin(pending, [*running, *promised]).all()
            or (server.num_tokens[:num_pending] < 1).any()
        ):
            raise IntegrityError(
                f"running {running.tolist()}, waiting {waiting.tolist()}, pending {pending.tolist()}, {num_assigned} promised a "
                f"slot; slots {slots}"
            )
