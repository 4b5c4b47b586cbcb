"""SGLang's scheduler: prefill first, admission by expectation, retraction when that was wrong. Over a radix tree.

Source: behaviour of SGLang 0.5.23 without overlap: a step is decided when the one before it is done.
"""

from bisect import bisect_left

import numpy as np

import pagedkv.scheduling.sglang_step  # noqa: F401 - how such an engine decides
from pagedkv.arrays import BoolArray, Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.engine_step import queue_request
from pagedkv.errors import ConfigError
from pagedkv.jit import fixed_types
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.compiled_path import CompiledPath
from pagedkv.scheduling.content import Contents, Segments, content_of
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.requests import REQUEST
from pagedkv.scheduling.roster import Roster
from pagedkv.scheduling.sglang_arrays import CHANCE, READY, WANTED, SGLangEngine
from pagedkv.scheduling.sglang_order import QueueArrays
from pagedkv.scheduling.sglang_pass import fits_alone
from pagedkv.scheduling.sglang_queue import Permutation, no_chance
from pagedkv.scheduling.sglang_request import SGLANG_REQUEST
from pagedkv.scheduling.sglang_settings import SGLangSettings
from pagedkv.scheduling.step import Step
from pagedkv.scheduling.step_path import StepArrays

_fits_alone = fixed_types(fits_alone)  # its arguments have the same types in every scheduler


class SGLangScheduler(BatchScheduler):
    """Decides step by step who computes what, with the surface of `pagedkv.scheduling.scheduler.Scheduler`.

    A step prefills waiting requests if it admits any, and else decodes every running one; with mixed chunks it does both. Who is
    retracted waits behind the others and will recompute. All of it is compiled: `pagedkv.scheduling.sglang_step`.

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

    allocator: RadixRows

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
        engine = SGLangEngine.of(
            settings,
            state_slots=allocator.state_units * allocator.unit_slots,
            caches_prefixes=allocator.enable_caching,
        )
        if engine.is_random and permutation is None:
            raise no_chance()
        self.settings, self._permutation = settings, permutation
        self._routing_keys = [""]
        self._queue_request = fixed_types(queue_request.of(engine))
        rows = settings.max_running_requests
        roster = Roster(max_num_seqs=rows, by_priority=False)
        self._compiled = CompiledPath(roster, allocator, engine)
        super().__init__(roster, allocator, self._compiled, StepArrays.empty(rows), max_model_len=settings.max_model_len)

    @property
    def compiled(self) -> CompiledPath | None:
        """What decides, as one that needs no chance from outside: under policy random it does."""
        return None if self._compiled.engine.is_random else self._compiled

    @property
    def new_token_ratio(self) -> float:
        """Which share of their possible output running requests are expected to make."""
        return float(self._compiled.engine.ratio[0])

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a retraction, have computed."""
        return self.allocator.enable_caching

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
        segments = content_of(
            content,
            keys,
            num_tokens=prompt_tokens + output_tokens,
            block_size=self.allocator.unit_slots,
            caches_prefixes=self.caches_prefixes,
        )
        alone = self._fit_alone(np.array([prompt_tokens]), np.array([most]), ignore_eos=ignore_eos)
        never = self.allocator.admission_slots(prompt_tokens, output_tokens) is None
        if never or prompt_tokens + output_tokens > self.max_model_len or not alone[0]:
            return None
        index = self.requests.add(
            prompt_tokens=prompt_tokens, output_tokens=output_tokens, admission_slots=0, priority=priority, content=segments
        )
        self._make_room(index + 1)
        records = self._compiled.engine.records
        records["max_new_tokens"][index], records["ignore_eos"][index], records["tie"][index] = most, ignore_eos, index
        records["namespace"][index] = self.allocator.cache.tree.namespace_number(namespace)
        if routing_key:
            records["routing"][index] = self._routing_place(routing_key)
        self._queue_request(self._compiled.engine, self.arrays, self.requests.arrays, index)
        return index

    def add_all(self, prompt_tokens: Int64Array, output_tokens: Int64Array, *, contents: Contents | None = None) -> BoolArray:
        """Make requests known that will arrive later, in this order; return which of them can run here: see `BatchScheduler`."""
        first = self.requests.size
        accepted = super().add_all(prompt_tokens, output_tokens, contents=contents)
        last = self.requests.size
        self._make_room(last)
        records = self._compiled.engine.records[first:last]
        records["max_new_tokens"], records["tie"] = output_tokens[accepted], np.arange(first, last)
        records["namespace"] = self.allocator.cache.tree.namespace_number("")
        return accepted

    def schedule(self) -> Step:
        """Decide the next step and take its slots. The returned object is overwritten by the next call.

        A step without entries says that the head of the queue cannot run though nobody else does.
        """
        step, engine = super().schedule(), self._compiled.engine
        while engine.counters[CHANCE] == WANTED:
            assert self._permutation is not None
            assert isinstance(engine.queue, QueueArrays)
            engine.queue.shuffle[: self.num_waiting] = self._permutation(self.num_waiting)
            engine.counters[CHANCE] = READY
            step = super().schedule()
        return step

    def can_take(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> BoolArray:
        """Return which requests of these lengths are not refused for their lengths: who would be admitted if nobody else came."""
        return super().can_take(prompt_tokens, output_tokens) & self._fit_alone(prompt_tokens, output_tokens, ignore_eos=False)

    def _fit_alone(self, prompt_tokens: Int64Array, max_new_tokens: Int64Array, *, ignore_eos: bool) -> BoolArray:
        """Return which of these requests would be admitted if nobody else were there."""
        memory, limits = self.allocator, self._compiled.engine.limits
        requests, records = np.zeros(prompt_tokens.size, REQUEST), np.zeros(prompt_tokens.size, SGLANG_REQUEST)
        requests["prompt_tokens"] = requests["num_known_tokens"] = prompt_tokens
        records["max_new_tokens"], records["ignore_eos"] = max_new_tokens, ignore_eos
        fits = (
            bool(_fits_alone(limits, requests, records, i, memory.usable_slots, memory.unit_slots))
            for i in range(prompt_tokens.size)
        )
        alone: BoolArray = np.fromiter(fits, np.bool_, prompt_tokens.size)
        return alone

    def _make_room(self, num_requests: int) -> None:
        """Have room for so many requests, of whom all may wait, in what compiled code works on."""
        self._roster.expect_all()
        waiting = self.arrays.waiting.size
        self._compiled.engine = self._compiled.engine.with_room(num_requests, waiting, self.requests.segments)

    def _routing_place(self, key: str) -> int:
        """Return the place of a routing key among all, in their order; those behind a new one move on."""
        place = bisect_left(self._routing_keys, key)
        if place == len(self._routing_keys) or self._routing_keys[place] != key:
            self._routing_keys.insert(place, key)
            routing = self._compiled.engine.records["routing"]
            routing[routing >= place] += 1
        return place
