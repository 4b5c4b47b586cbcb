"""A serving engine: the scheduler and the allocator that the simulator runs, with a real model behind them."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockHashChain
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.runtime.model_layers import check_model, model_layers
from pagedkv.runtime.model_runner import ModelRunner, StepInput
from pagedkv.runtime.sampling import GREEDY, Sampler, SamplingParams, sample
from pagedkv.runtime.storage import PagedKVStorage
from pagedkv.runtime.storage_layout import plan_storage
from pagedkv.runtime.texts import LENGTH, STOP, Generation, NewToken, Text
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Step


class StepObserver(Protocol):
    """Is told how steps go; the engine has no clock."""

    def launched(self, step: Step) -> None:
        """A step is decided, and about to be computed."""

    def computed(self, step: Step) -> None:
        """It is computed: the scheduler does not know its tokens yet."""

    def completed(self) -> None:
        """The scheduler knows them."""


class LLMEngine:
    """Serves requests in continuous batches: chunked prefill, prefix caching, preemption by recompute.

    Who computes what, and in which blocks, `Scheduler` over `PagedStepAllocator` decide: the code that the simulator runs. Given
    the same arrivals by step, both come to the same batches and block tables. A model's windowed layers keep all tokens.

    If a step is interrupted, or fails, the engine cannot go on: blocks may carry the keys of what was never computed.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_blocks: int | None = None,
        budget_bytes: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        policy: str = "fcfs",
        watermark: float = 0.0,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        observer: StepObserver | None = None,
    ) -> None:
        """Take the memory, and let `model` attend over it.

        Args:
            model: A decoder-only model of transformers; its configuration says what layers cache, its weights which type.
            num_blocks: Blocks of the pool, of which one is never used; or else `budget_bytes`.
            budget_bytes: Take as many blocks as fit into so many bytes.
            block_size: Tokens per block.
            max_num_seqs: Most requests that run at once.
            max_num_batched_tokens: Most tokens of a step.
            max_model_len: Longest prompt + output; None: what the model takes, and the pool holds.
            enable_prefix_caching: Keep full blocks, and give them to requests that begin alike.
            enable_chunked_prefill: Let a prompt be computed in several steps.
            policy: "fcfs", or "priority" (the lower the number the more urgent).
            watermark: Share of the blocks that an admission must leave free while something runs.
            dtype: Element type of the storage, see `PagedKVStorage`; None: the model's.
            backend: Which kernel attends, see `pagedkv.kernels.paged_attention`.
            observer: Is told how steps go: whoever has a clock.

        Raises:
            ConfigError: If the model is not supported, or numbers cannot be: with what would work.
        """
        check_model(model)
        layout = plan_storage(model_layers(model.config), block_size=block_size)
        self.storage = PagedKVStorage(
            layout,
            num_blocks=num_blocks,
            budget_bytes=budget_bytes,
            dtype=model.dtype if dtype is None else dtype,
            device=model.device,
        )
        room = (self.storage.num_blocks - 1) * block_size
        longest = getattr(model.config, "max_position_embeddings", None) or room
        max_model_len = min(longest, room + 1) if max_model_len is None else max_model_len
        if max_model_len > longest:
            raise ConfigError(f"max_model_len is {max_model_len}: the model takes {longest} tokens at most")
        self.allocator = PagedStepAllocator(
            KVPoolSettings(
                num_blocks=self.storage.num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                watermark=watermark,
                enable_prefix_caching=enable_prefix_caching,
            )
        )
        self.scheduler = Scheduler(
            SchedulerSettings(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                enable_chunked_prefill=enable_chunked_prefill,
                policy=policy,
            ),
            self.allocator,
        )
        self.runner = ModelRunner(model, self.storage, backend=backend)
        self.observer = observer
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._texts: dict[int, Text] = {}

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._texts)

    def add_request(
        self,
        prompt: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        max_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        sampling: SamplingParams = GREEDY,
        priority: int = 0,
        salt: str = "",
    ) -> int | None:
        """Put a request into the queue and return its number; None if it could never run here: it is too long.

        Args:
            prompt: Token ids.
            max_tokens: Most tokens to generate.
            eos_token_id: Tokens that end the text.
            sampling: How tokens are drawn.
            priority: Its urgency under policy "priority".
            salt: Only requests of the same salt share blocks.

        Raises:
            ConfigError: If there is no prompt, max_tokens is below 1, or a token id is not the model's.
        """
        chain = BlockHashChain(block_size=self.allocator.unit_slots, salt=salt)
        chain.extend(prompt)
        ids = chain.token_ids
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary:
            raise ConfigError(f"token ids {ids.min()} to {ids.max()}: the model has 0 to {self._vocabulary - 1}")
        request = self.scheduler.add(
            prompt_tokens=chain.num_tokens,
            output_tokens=max_tokens,
            priority=priority,
            keys=chain.keys if self.scheduler.caches_prefixes else None,
            keys_follow=True,
        )
        if request is not None:
            ends = frozenset(() if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id)
            self._texts[request] = Text(chain, chain.num_tokens, chain.num_tokens + max_tokens, ends, Sampler(sampling))
        return request

    def step(self) -> list[NewToken]:
        """Decide a step, compute it, and return the tokens that came out, in scheduling order; nothing if nobody is there."""
        scheduler, observer = self.scheduler, self.observer
        step = scheduler.schedule()
        if not step.num_entries:
            if self._texts:
                raise IntegrityError(f"nobody of {len(self._texts)} requests can go on")
            return []
        if observer is not None:
            observer.launched(step)
        requests, tokens = self._compute(step)
        if observer is not None:
            observer.computed(step)
        for request, token in zip(requests, tokens, strict=True):
            text = self._texts[request]
            if token in text.ends:
                scheduler.end_after(request, text.chain.num_tokens - text.prompt_tokens + 1)
        scheduler.complete()
        if scheduler.sampled.tolist() != requests:
            raise IntegrityError(f"tokens for requests {requests}, the scheduler wants some for {scheduler.sampled.tolist()}")
        new = [self._append(request, token) for request, token in zip(requests, tokens, strict=True)]
        if observer is not None:
            observer.completed()
        return new

    def abort(self, request: int) -> bool:
        """Take a request out, running or waiting; its blocks are free at once. Return whether it was there."""
        if self._texts.pop(request, None) is None:
            return False
        return self.scheduler.abort(request)

    def forget_done(self) -> dict[int, int]:
        """Forget requests that are done, so that a server can run for good; return the others' new numbers by their old ones."""
        new = {old: i for i, old in enumerate(self.scheduler.forget_done().tolist())}
        self._texts = {new[old]: text for old, text in self._texts.items()}
        return new

    def generate(
        self,
        prompts: Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]],
        *,
        max_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> list[Generation]:
        """Serve `prompts` all at once, with whoever is there already, and return their texts in order.

        Raises:
            ConfigError: If one could never run here: it is too long, with what fits; nothing has been computed then.
        """
        numbers: list[int] = []
        for i, prompt in enumerate(prompts):
            request = self.add_request(prompt, max_tokens=max_tokens, eos_token_id=eos_token_id, sampling=sampling)
            if request is None:
                for other in numbers:
                    self.abort(other)
                raise ConfigError(self.too_long(len(prompt), max_tokens, f"prompt {i}"))
            numbers.append(request)
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        reasons: dict[int, str] = {}
        while len(reasons) < len(numbers):
            for new in self.step():
                if new.request in tokens:
                    tokens[new.request].append(new.token)
                    if new.finish_reason is not None:
                        reasons[new.request] = new.finish_reason
        return [Generation(tokens[number], reasons[number]) for number in numbers]

    def too_long(self, prompt_tokens: int, max_tokens: int, what: str = "a request") -> str:
        """Return what to say of a request that `add_request` refused."""
        most = min(self.scheduler.settings.max_model_len, self.allocator.usable_slots + 1)
        return f"{what} of {prompt_tokens} tokens and {max_tokens} new ones: prompt and output have room for {most} together"

    def _compute(self, step: Step) -> tuple[list[int], list[int]]:
        """Return who gets a token, in scheduling order, and which."""
        batch, tables = step.batch[: step.num_entries], self.allocator.tables
        texts = [self._texts[request] for request in batch["request"].tolist()]
        given = StepInput.of(batch)
        held = tables.num_blocks[batch["row"]]
        blocks: Int32Array = tables.blocks[batch["row"], : held.max()]
        blocks[np.arange(blocks.shape[1]) >= held[:, None]] = -1
        logits = self.runner.logits(given, [text.chain.token_ids for text in texts], blocks)
        tokens = sample(logits, [texts[i].sampler for i in given.samples.tolist()])
        return batch["request"][given.samples].tolist(), tokens

    def _append(self, request: int, token: int) -> NewToken:
        """Let `token` be known; with it the key of a block may be."""
        text = self._texts[request]
        chain = text.chain
        num_keys = len(chain.keys)
        chain.extend([token])
        reason = STOP if token in text.ends else LENGTH if chain.num_tokens == text.last_at else None
        if reason is not None:
            del self._texts[request]
        elif self.scheduler.caches_prefixes and len(chain.keys) > num_keys:
            self.scheduler.add_keys(request, chain.keys[num_keys:])
        return NewToken(request, token, reason)
