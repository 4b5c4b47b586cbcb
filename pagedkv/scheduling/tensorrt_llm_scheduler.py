"""TensorRT-LLM's scheduler: a capacity policy says who has memory, the micro-batch scheduler how much of them a step computes."""

from dataclasses import dataclass
from heapq import merge

import numpy as np

from pagedkv.allocation import Allocator
from pagedkv.errors import ConfigError, expect_one_or_more, unknown_name
from pagedkv.scheduling.capacity_policy import CAPACITY_POLICIES
from pagedkv.scheduling.content import Segments, segment_of, stream_of
from pagedkv.scheduling.micro_batch import CHUNK_POLICIES, MicroBatchLimits, Work, micro_batch
from pagedkv.scheduling.request_scheduler import RequestScheduler
from pagedkv.scheduling.step import Blocker, Step


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


class TensorRTLLMScheduler(RequestScheduler):
    """Decides as TensorRT-LLM does, over an allocator that takes the blocks of a whole prompt at its admission.

    A paused request gives its blocks back and keeps its place in the queue; what it generated belongs to its prompt then.

    Example:
        >>> from pagedkv.allocation import KVPoolSettings
        >>> from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
        >>> allocator = TensorRTLLMAllocator(KVPoolSettings(num_blocks=8, block_size=4, max_num_seqs=4, max_model_len=32))
        >>> scheduler = TensorRTLLMScheduler(TensorRTLLMSettings(max_num_seqs=4, max_model_len=32), allocator)
        >>> scheduler.add(prompt_tokens=10, output_tokens=10), scheduler.add(prompt_tokens=10, output_tokens=10)
        (0, 1)
        >>> step = scheduler.schedule()  # 5 blocks are set aside for the first, which takes 3 of them: 3 are left for the second
        >>> step.num_entries, allocator.free_slots, step.blocker.value
        (1, 20, 'kv_memory')
    """

    def __init__(self, settings: TensorRTLLMSettings, allocator: Allocator) -> None:
        super().__init__(
            allocator,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            shares=settings.enable_block_reuse,
        )
        if settings.enable_chunked_prefill and settings.max_num_batched_tokens < allocator.unit_slots:
            raise ConfigError(
                f"max-num-batched-tokens is {settings.max_num_batched_tokens}: a chunk is a block of {allocator.unit_slots} tokens "
                "at least"
            )
        self.settings = settings
        self._block_size = allocator.unit_slots
        self._num_state_blocks = -(-allocator.state_slots // self._block_size)
        self._limits = MicroBatchLimits(
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            CHUNK_POLICIES[settings.chunk_policy] if settings.enable_chunked_prefill else None,
            self._block_size,
        )
        self._being_filled: set[tuple[int, int]] = set()

    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Queue a request as `RequestScheduler.add` does; None also if its reservation, or its prompt in one step, cannot be."""
        reserved = -(-self._final_tokens(prompt_tokens, output_tokens) // self._block_size) + self._num_state_blocks
        never_fits = reserved * self._block_size > self.allocator.usable_slots
        if never_fits and self.settings.capacity_policy != "max_utilization":
            return None
        if prompt_tokens > self.settings.max_num_batched_tokens and not self.settings.enable_chunked_prefill:
            return None
        return super().add(prompt_tokens=prompt_tokens, output_tokens=output_tokens, priority=priority, content=content)

    def schedule(self) -> Step:
        """Decide the next step and take its slots. The returned object is overwritten by the next call."""
        self._begin()
        running = np.sort(self.arrays.running[: self.num_running])
        started = sorted(zip(self.requests.arrays["priority"][running].tolist(), running.tolist(), strict=True))
        self._being_filled = set()
        left = self._tokens_left()
        for _, request in started:
            if left[request] > 1:
                self.is_delayed(request)
        active = (request for _, request in merge(started, self.queue))
        policy = CAPACITY_POLICIES[self.settings.capacity_policy]
        fitting, blocker = policy(self, active, [request for _, request in started], self.settings.max_num_seqs)
        chosen = micro_batch([self._work(request, left.get(request)) for request in fitting], self._limits)
        admissions = []
        for request, num_tokens in chosen:
            if not self.is_running(request):
                admissions.append((request, num_tokens))
            elif not self._grant(request, num_tokens):
                blocker = Blocker.KV_MEMORY
        for request, num_tokens in admissions:
            num_new = self._num_new(request, num_tokens)
            if num_new and not self._admit(request, num_new):
                blocker = Blocker.KV_MEMORY
                break
        return self._end(blocker)

    def _goes_on(self, step: Step) -> bool:
        """Whoever waits for blocks to its end waits on: running ones take no more than was set aside for them."""
        if not self.queue:
            return True
        waits_for_an_end = step.blocker in (Blocker.KV_MEMORY, Blocker.MAX_NUM_SEQS)
        return waits_for_an_end and self.settings.capacity_policy != "max_utilization"

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds now."""
        return self.allocator.free_slots // self._block_size

    def blocks_to_completion(self, request: int) -> int:
        """Return ceil((prompt + output) / block size), less those it holds; the last token counts, though it never gets a slot."""
        record = self.requests.arrays[request]
        final = self._final_tokens(int(record["prompt_tokens"]), int(record["output_tokens"]))
        return self._blocks_lacking(request, final)

    def blocks_for_step(self, request: int) -> int:
        """Return the blocks of all known tokens, less those it holds: 0 or 1 for one that generates."""
        return self._blocks_lacking(request, int(self.requests.arrays["num_known_tokens"][request]))

    def is_delayed(self, request: int) -> bool:
        """Return whether another request fills the first block that this one does not find cached; if not, this one fills it."""
        if not self._shares:
            return False
        runs, record = self.is_running(request), self.requests.arrays[request]
        if runs:
            first_new = int(record["num_computed_tokens"]) // self._block_size
        else:
            first_new = self.allocator.allocator.get_computed_tokens(self.kv_request(request)) // self._block_size
        end_token = (first_new + 1) * self._block_size
        if end_token > record["num_known_tokens"]:
            return False
        segments, first, last = self.segments_of(request)
        word_a, word_b = stream_of(segments, segment_of(segments, first, last, end_token), last, request)
        key = int(word_a) + first_new, int(word_b)
        if key in self._being_filled:
            return not runs
        self._being_filled.add(key)
        return False

    def pause(self, request: int) -> None:
        """Take the blocks of a started request away; it computes all its known tokens anew, but for those found cached."""
        self._preempt(request)

    def _tokens_left(self) -> dict[int, int]:
        """Return by running request its known tokens that are not computed yet."""
        running = self.arrays.running[: self.num_running]
        records = self.requests.arrays[running]
        left = records["num_known_tokens"] - records["num_computed_tokens"]
        return dict(zip(running.tolist(), left.tolist(), strict=True))

    def _work(self, request: int, left: int | None) -> Work:
        """Return what `request` has to compute, of one that runs the tokens that are `left`."""
        if left is None or not self.is_running(request):
            return Work(request, self.num_remaining(request), is_context=True)
        return Work(request, left, left > 1)

    def _num_new(self, request: int, num_tokens: int) -> int:
        """Return what an admission with `num_tokens` computes: nothing that is cached, and up to a block's end if it is cut."""
        known = int(self.requests.arrays["num_known_tokens"][request])
        num_cached = self.allocator.allocator.get_computed_tokens(self.kv_request(request)) if self._shares else 0
        if num_cached + num_tokens >= known:
            return known - num_cached
        return (num_cached + num_tokens) // self._block_size * self._block_size - num_cached

    def _blocks_lacking(self, request: int, num_tokens: int) -> int:
        needed = -(-num_tokens // self._block_size)
        if not self.is_running(request):
            return needed + self._num_state_blocks
        held = int(self.allocator.units_held[self.requests.arrays["row"][request]]) // self._block_size
        return max(needed - held, 0)

    def _final_tokens(self, prompt_tokens: int, output_tokens: int) -> int:
        return prompt_tokens + output_tokens if self.settings.max_tokens_given else self.max_model_len
