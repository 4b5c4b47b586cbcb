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
from pagedkv.runtime.model_pair import ModelPair
from pagedkv.runtime.sampling import GREEDY, Sampler, SamplingParams
from pagedkv.runtime.texts import LENGTH, STOP, Generation, NewToken, Text
from pagedkv.runtime.verification import verify
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Step


class StepObserver(Protocol):
    """Is told how steps go; the engine has no clock."""

    def launched(self, step: Step) -> None:
        """A step is decided, and about to be computed."""

    def computed(self, step: Step) -> None:
        """It is computed, and its batch says how many drafts were accepted: the scheduler does not know its tokens yet."""

    def completed(self) -> None:
        """The scheduler knows them."""


class LLMEngine:
    """Serves requests in continuous batches: chunked prefill, prefix caching, preemption by recompute, speculation.

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
        speculative_model: Any = None,
        num_speculative_tokens: int = 0,
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
            speculative_model: A smaller model of the same vocabulary, type and device, that drafts tokens for `model` to verify.
                Its keys and values lie in the same blocks, which are larger for it.
            num_speculative_tokens: Drafts of a text that decodes, per step.
            observer: Is told how steps go: whoever has a clock.

        Raises:
            ConfigError: If the model is not supported, or numbers cannot be: with what would work.
        """
        self.models = ModelPair(
            model,
            speculative_model,
            num_drafts=num_speculative_tokens,
            num_blocks=num_blocks,
            budget_bytes=budget_bytes,
            block_size=block_size,
            dtype=dtype,
            backend=backend,
        )
        self.storage = self.models.storage
        room = (self.storage.num_blocks - 1) * block_size
        longest = self.models.max_positions or room
        if max_model_len is None:  # the last token needs no slot, but drafts behind it do
            max_model_len = min(longest, room if num_speculative_tokens else room + 1)
        if max_model_len > longest:
            raise ConfigError(f"max_model_len is {max_model_len}: the model takes {longest} tokens at most")
        self.allocator = PagedStepAllocator(
            KVPoolSettings(
                num_blocks=self.storage.num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                watermark=watermark,
                lookahead_slots=num_speculative_tokens,
                enable_prefix_caching=enable_prefix_caching,
            )
        )
        self.scheduler = Scheduler(
            SchedulerSettings(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                enable_chunked_prefill=enable_chunked_prefill,
                num_speculative_tokens=num_speculative_tokens,
                policy=policy,
            ),
            self.allocator,
        )
        self.observer = observer
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
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.models.vocab_size:
            raise ConfigError(f"token ids {ids.min()} to {ids.max()}: the model has 0 to {self.models.vocab_size - 1}")
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
        texts = self._compute(step)
        for i, (_, tokens) in texts.items():
            step.batch["num_accepted_tokens"][i] = len(tokens) - 1
        if observer is not None:
            observer.computed(step)
        for request, tokens in texts.values():
            text = self._texts[request]
            if tokens[-1] in text.ends:
                scheduler.end_after(request, text.chain.num_tokens - text.prompt_tokens + len(tokens))
        scheduler.complete()
        requests, count = [request for request, _ in texts.values()], sum(len(tokens) for _, tokens in texts.values())
        if scheduler.sampled.tolist() != requests or scheduler.num_output_tokens != count:
            wanted = f"{scheduler.num_output_tokens} for {scheduler.sampled.tolist()}"
            raise IntegrityError(f"{count} tokens for requests {requests}, the scheduler wants {wanted}")
        new = [each for request, tokens in texts.values() for each in self._append(request, tokens)]
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
        most, usable = self.scheduler.settings.max_model_len, self.allocator.usable_slots
        most = most if most <= usable else min(most, usable + 1 - self.allocator.lookahead_slots)
        return f"{what} of {prompt_tokens} tokens and {max_tokens} new ones: prompt and output have room for {most} together"

    def _compute(self, step: Step) -> dict[int, tuple[int, list[int]]]:
        """Return by entry, of those that get tokens, whose they are and which."""
        batch, tables = step.batch[: step.num_entries], self.allocator.tables
        texts = [self._texts[request] for request in batch["request"].tolist()]
        held = tables.num_blocks[batch["row"]]
        blocks: Int32Array = tables.blocks[batch["row"], : held.max()]
        blocks[np.arange(blocks.shape[1]) >= held[:, None]] = -1
        for text in texts[step.num_running_before :]:
            text.draft_lag = 0  # an admission begins with what both models have computed
        entries, drafts, logits = self.models.compute(texts, batch, blocks)
        verified = verify(logits, drafts, [texts[i].sampler for i in entries])
        given = {}
        for i, drafted, new in zip(entries, drafts, verified, strict=True):
            texts[i].draft_lag = int(0 < len(drafted.tokens) == len(new) - 1)
            given[i] = int(batch["request"][i]), texts[i].cut(new)
        return given

    def _append(self, request: int, tokens: list[int]) -> list[NewToken]:
        """Let `tokens` be known; with them keys of blocks may be."""
        text = self._texts[request]
        chain = text.chain
        num_keys = len(chain.keys)
        chain.extend(tokens)
        reason = STOP if tokens[-1] in text.ends else LENGTH if chain.num_tokens == text.last_at else None
        if reason is not None:
            del self._texts[request]
        elif self.scheduler.caches_prefixes and len(chain.keys) > num_keys:
            self.scheduler.add_keys(request, chain.keys[num_keys:])
        return [*(NewToken(request, token, None) for token in tokens[:-1]), NewToken(request, tokens[-1], reason)]
