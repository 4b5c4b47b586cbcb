"""TensorRT-LLM's scheduler: a capacity policy says who has memory, the micro-batch scheduler how much of them a step computes."""

from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import BoolArray, Int64Array
from pagedkv.engine_step import queue_request
from pagedkv.errors import ConfigError, IntegrityError, expect_one_or_more, unknown_name
from pagedkv.jit import fixed_types
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.capacity_policy import CAPACITY_POLICIES, MAX_UTILIZATION, Capacity
from pagedkv.scheduling.compiled_path import CompiledPath
from pagedkv.scheduling.content import Segments, content_of
from pagedkv.scheduling.filled_blocks import FilledBlocks
from pagedkv.scheduling.micro_batch import CHUNK_POLICIES, WHOLE, MicroBatch, MicroBatchLimits
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.step_path import StepArrays
from pagedkv.scheduling.tensorrt_llm_step import TensorRTLLMEngine
from pagedkv.step_allocation import CompiledMemory
from pagedkv.step_memory import NEVER


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTLLMSettings:
    """Its limits and policies. Source of the defaults: TensorRT-LLM, BuildConfig and SchedulerConfig."""

    max_num_seqs: int = 2048
    """Most requests in a step: max_batch_size."""
    max_num_batched_tokens: int = 8192
    """Most tokens that a step computes: max_num_tokens."""
    max_model_len: int
    """Longest prompt + output, in tokens: max_seq_len."""
    capacity_policy: str = "guaranteed_no_evict"
    """Who has memory: a name in `CAPACITY_POLICIES`."""
    enable_chunked_prefill: bool = False
    """Let a prompt be computed in several steps, in chunks of whole blocks."""
    chunk_policy: str = "first_come_first_served"
    """How prompts share a step's tokens: a name in `CHUNK_POLICIES`."""
    max_tokens_given: bool = True
    """Whether requests say how many tokens they want; if not, all of max_model_len is reserved for each."""
    enable_block_reuse: bool = True
    """Whether blocks are shared, for which the allocator must cache prefixes."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run.

        Raises:
            ConfigError: With the values that would work.
        """
        expect_one_or_more(self, "max_num_seqs", "max_num_batched_tokens", "max_model_len")
        if self.capacity_policy not in CAPACITY_POLICIES:
            raise unknown_name("capacity-policy", self.capacity_policy, CAPACITY_POLICIES)
        if self.chunk_policy not in CHUNK_POLICIES:
            raise unknown_name("chunk-policy", self.chunk_policy, CHUNK_POLICIES)


class TensorRTLLMScheduler(BatchScheduler):
    """Decides as TensorRT-LLM does, over memory that takes the blocks of a whole prompt at its admission.

    A paused request gives its blocks back and keeps its place in the queue; what it generated belongs to its prompt then.

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
        >>> from pagedkv.reuse_steps import ReuseStepAllocator
        >>> allocator = TensorRTLLMAllocator(KVPoolSettings(num_blocks=8, block_size=4, max_num_seqs=4, max_model_len=32))
        >>> scheduler = TensorRTLLMScheduler(TensorRTLLMSettings(max_num_seqs=4, max_model_len=32), ReuseStepAllocator(allocator))
        >>> scheduler.add(prompt_tokens=10, output_tokens=10), scheduler.add(prompt_tokens=10, output_tokens=10)
        (0, 1)
        >>> step = scheduler.schedule()  # 5 blocks are set aside for the first, which takes 3 of them: 3 are left for the second
        >>> step.num_entries, allocator.free_slots, step.blocker.value
        (1, 20, 'kv_memory')
    """

    def __init__(self, settings: TensorRTLLMSettings, allocator: CompiledMemory) -> None:
        for name, room in (("max_num_seqs", allocator.units_held.size), ("max_model_len", allocator.max_model_len)):
            if getattr(settings, name) > room:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(settings, name)}, the allocator was built for {room}")
        if settings.enable_chunked_prefill and settings.max_num_batched_tokens < allocator.unit_slots:
            raise ConfigError(
                f"max-num-batched-tokens is {settings.max_num_batched_tokens}: a chunk is a block of {allocator.unit_slots} tokens "
                "at least"
            )
        self.settings = settings
        engine, roster = _engine(settings, allocator), Roster(max_num_seqs=settings.max_num_seqs, by_priority=False)
        super().__init__(
            roster,
            allocator,
            CompiledPath(roster, allocator, engine),
            StepArrays.empty(settings.max_num_seqs),
            max_model_len=settings.max_model_len,
        )
        self._memory, self._engine, self._queue = allocator, engine, fixed_types(queue_request.of(engine))

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a pause, have computed."""
        return self.settings.enable_block_reuse

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
        content = content_of(
            content,
            None,
            num_tokens=prompt_tokens + output_tokens,
            block_size=self.allocator.unit_slots,
            caches_prefixes=self.caches_prefixes,
        )
        lengths = np.array([prompt_tokens]), np.array([output_tokens])
        admission_slots = int(self._memory.all_admission_slots(*lengths)[0])
        if admission_slots == NEVER or not self.can_take(*lengths)[0]:
            return None
        request = self.requests.add(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            admission_slots=admission_slots,
            priority=priority,
            content=content,
        )
        self._roster.expect_all()
        self._queue(self._engine, self.arrays, self.requests.arrays, request)
        return request

    def can_take(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> BoolArray:
        """Return which requests of these lengths it takes: not those whose reservation, or prompt in one step, cannot be."""
        settings, memory = self.settings, self.allocator
        allowed = super().can_take(prompt_tokens, output_tokens)
        if self._engine.policy != MAX_UTILIZATION:
            given = settings.max_tokens_given
            final = prompt_tokens + output_tokens if given else np.full_like(prompt_tokens, self.max_model_len)
            reserved = -(-final // memory.unit_slots) + self._engine.capacity.state_blocks
            allowed &= reserved * memory.unit_slots <= memory.usable_slots
        if not settings.enable_chunked_prefill:
            allowed &= prompt_tokens <= settings.max_num_batched_tokens
        return allowed

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows, queue and running batch fit together and every running request has its slots."""
        super().check_integrity()
        waiting = self.waiting()
        places = list(zip(self.requests.arrays["priority"][waiting].tolist(), waiting.tolist(), strict=True))
        if places != sorted(places):
            raise IntegrityError(f"the queue of (priority, request) is out of order: {places}")


def _engine(settings: TensorRTLLMSettings, memory: CompiledMemory) -> TensorRTLLMEngine:
    capacity = Capacity(
        int(settings.max_num_seqs),
        int(settings.max_model_len),
        int(memory.unit_slots),
        int(memory.state_units),
        bool(settings.max_tokens_given),
        bool(settings.enable_block_reuse),
        np.zeros(settings.max_num_seqs, np.int64),
        FilledBlocks.empty(2 * settings.max_num_seqs + 1),
    )
    limits = MicroBatchLimits(
        int(settings.max_num_seqs),
        int(settings.max_num_batched_tokens),
        CHUNK_POLICIES[settings.chunk_policy] if settings.enable_chunked_prefill else WHOLE,
        int(memory.unit_slots),
    )
    return TensorRTLLMEngine(
        CAPACITY_POLICIES[settings.capacity_policy],
        capacity,
        limits,
        MicroBatch.empty(settings.max_num_seqs),
        np.zeros(memory.units_held.size, np.int64),
    )
