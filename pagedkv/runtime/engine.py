"""A serving engine: the scheduler and the allocator that the simulator runs, with a real model behind them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pagedkv.block_hash import BlockHashChain
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.runtime.beam_room import beams_fit, check_search, longest_beam
from pagedkv.runtime.beam_search import BeamParams, BeamSearch
from pagedkv.runtime.engine_memory import engine_memory
from pagedkv.runtime.model_pair import ModelPair
from pagedkv.runtime.sampling import GREEDY, Sampler, SamplingParams
from pagedkv.runtime.step_observer import StepObserver
from pagedkv.runtime.text_table import TextTable
from pagedkv.runtime.texts import Generation, NewToken, Text
from pagedkv.runtime.token_choice import TokenChoice, choose_tokens
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Step
from pagedkv.step_batch import HELD


class LLMEngine:
    """Serves requests in continuous batches: chunked prefill, prefix caching, preemption by recompute, speculation, forks.

    Who computes what, and in which blocks, decides `Scheduler` over `PagedStepAllocator`, or over `HybridStepAllocator` if layers
    have windows, and so block tables of their own: the code that the simulator runs. Given the same arrivals by step, both come to
    the same batches and block tables.

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
        enable_prefix_caching: bool | None = None,
        enable_chunked_prefill: bool = True,
        policy: str = "fcfs",
        watermark: float = 0.0,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        speculative_model: Any = None,
        num_speculative_tokens: int = 0,
        disable_hybrid_kv_cache_manager: bool = False,
        observer: StepObserver | None = None,
    ) -> None:
        """Take the memory, and let `model` attend over it.

        Args:
            model: A decoder-only model of transformers; its configuration says what layers cache, its weights which type.
            num_blocks: Blocks of the pool, of which one is never used; or else `budget_bytes`.
            budget_bytes: Take as many blocks as fit into so many bytes, beside the states of linear attention of all rows.
            block_size: Tokens per block.
            max_num_seqs: Most requests that run at once.
            max_num_batched_tokens: Most tokens of a step.
            max_model_len: Longest prompt + output; None: what the model takes, and the pool holds.
            enable_prefix_caching: Keep full blocks, and give them to requests that begin alike; None: yes, but for models with
                layers of linear attention, whose states nobody keeps for others.
            enable_chunked_prefill: Let a prompt be computed in several steps.
            policy: "fcfs", or "priority" (the lower the number the more urgent).
            watermark: Share of the blocks that an admission must leave free while something runs.
            dtype: Element type of the storage, see `PagedKVStorage`; None: the model's.
            backend: Which kernel attends, see `pagedkv.kernels.paged_attention`.
            speculative_model: A smaller model of the same vocabulary, type and device, that drafts tokens for `model` to verify.
                Its keys and values lie in the same blocks, which are larger for it.
            num_speculative_tokens: Drafts of a text that decodes, per step.
            disable_hybrid_kv_cache_manager: One block table for all layers, in which windowed ones keep all tokens, as vLLM's flag
                of this name has it; so it is with a draft model anyway.
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
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            backend=backend,
            layers_apart=not disable_hybrid_kv_cache_manager,
        )
        self.storage = self.models.storage
        self.allocator = engine_memory(
            self.models,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            watermark=watermark,
            lookahead_slots=num_speculative_tokens,
        )
        self.scheduler = Scheduler(
            SchedulerSettings(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=self.allocator.max_model_len,
                enable_chunked_prefill=enable_chunked_prefill,
                num_speculative_tokens=num_speculative_tokens,
                policy=policy,
            ),
            self.allocator,
        )
        self.observer = observer
        self.texts = TextTable(self.scheduler, self.models.runner.fork_state)

    @property
    def num_unfinished(self) -> int:
        """Texts that are not done, of requests that run or wait; beams count as one each."""
        return len(self.texts)

    def add_request(
        self,
        prompt: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        max_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        sampling: SamplingParams = GREEDY,
        n: int = 1,
        beams: BeamParams | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> int | None:
        """Put a request into the queue and return its number; None if it could never run here: it is too long.

        Args:
            prompt: Token ids.
            max_tokens: Most tokens to generate.
            eos_token_id: Tokens that end the text.
            sampling: How tokens are drawn.
            n: Texts to generate. They share the prompt's blocks, the last one until they write to it, and each has a copy of the
                states of linear attention; text i is drawn by seed + i.
            beams: Search so: then the `n` best texts come at its end, all tokens at once.
            priority: Its urgency under policy "priority".
            salt: Only requests of the same salt share blocks.

        Raises:
            ConfigError: If there is no prompt, max_tokens or n is below 1, a token id is not the model's, or beams cannot be
                searched here.
        """
        chain = BlockHashChain(block_size=self.allocator.hash_block_size, salt=salt)
        chain.extend(prompt)
        ids = chain.token_ids
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.models.vocab_size:
            raise ConfigError(f"token ids {ids.min()} to {ids.max()}: the model has 0 to {self.models.vocab_size - 1}")
        if n < 1:
            raise ConfigError(f"n is {n}: needs 1 or more texts")
        ends = frozenset(() if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id)
        search = None
        if beams is not None:
            search = BeamSearch(params=beams, ends=ends, max_tokens=max_tokens)
            check_search(search, self.scheduler, self.models, sampling=sampling, n=n)
            if not beams_fit(beams.width, chain.num_tokens + max_tokens, self.allocator):
                return None
        request = self.scheduler.add(
            prompt_tokens=chain.num_tokens,
            output_tokens=max_tokens,
            priority=priority,
            keys=chain.keys if self.scheduler.caches_prefixes else None,
            keys_follow=True,
        )
        if request is not None:
            text = Text(
                owner=request,
                chain=chain,
                prompt_tokens=chain.num_tokens,
                last_at=chain.num_tokens + max_tokens,
                ends=ends,
                sampler=Sampler(sampling),
                search=search,
                num_results=n,
            )
            if search is not None:
                search.members = [request]
            else:
                text.siblings = {place: Sampler(replace(sampling, seed=sampling.seed + place)) for place in range(1, n)}
            self.texts.add(request, text)
        return request

    def step(self) -> list[NewToken]:
        """Decide a step, compute it, and return the tokens that came out; nothing if nobody is there."""
        scheduler, observer = self.scheduler, self.observer
        step = scheduler.schedule()
        if not step.num_entries:
            if self.num_unfinished:
                raise IntegrityError(f"nobody of {self.num_unfinished} texts can go on")
            return []
        if observer is not None:
            observer.launched(step)
        choice = self._compute(step)
        if observer is not None:
            observer.computed(step)
        for request in choice.ending:
            text = self.texts[request]
            scheduler.end_after(request, text.chain.num_tokens - text.prompt_tokens + len(choice.tokens[request]))
        scheduler.complete()
        requests, count = list(choice.tokens), sum(map(len, choice.tokens.values()))
        if scheduler.sampled.tolist() != requests or scheduler.num_output_tokens != count:
            wanted = f"{scheduler.num_output_tokens} for {scheduler.sampled.tolist()}"
            raise IntegrityError(f"{count} tokens for requests {requests}, the scheduler wants {wanted}")
        if observer is not None:
            observer.completed()
        new = self.texts.apply(choice, observer)
        if step.num_entries == len(choice.held) == step.num_running_before:
            self.texts.untangle()
        return new

    def abort(self, request: int, text: int | None = None) -> bool:
        """Take a request out, running or waiting, with all its texts, or one of these; not within a step.

        What nobody else holds of its blocks is free at once.

        Args:
            request: Its number.
            text: Which of its texts; None: all of them.

        Returns:
            Whether it was there.

        Raises:
            ConfigError: If it is one text of a beam search, whose texts are not known before its end.
        """
        return self.texts.abort(request, text)

    def forget_done(self) -> dict[int, int]:
        """Forget requests that are done, so that a server can run for good; return the others' new numbers by their old ones."""
        return self.texts.renumber({old: i for i, old in enumerate(self.scheduler.forget_done().tolist())})

    def generate(
        self,
        prompts: Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]],
        *,
        max_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        sampling: SamplingParams = GREEDY,
        n: int = 1,
        beams: BeamParams | None = None,
    ) -> list[Generation]:
        """Serve `prompts` all at once, with whoever is there already, and return their texts in order, `n` for each prompt.

        Raises:
            ConfigError: If one could never run here: it is too long, with what fits; nothing has been computed then.
        """
        numbers: list[int] = []
        for i, prompt in enumerate(prompts):
            request = self.add_request(
                prompt, max_tokens=max_tokens, eos_token_id=eos_token_id, sampling=sampling, n=n, beams=beams
            )
            if request is None:
                for other in numbers:
                    self.abort(other)
                width = 1 if beams is None else beams.width
                raise ConfigError(self.too_long(len(prompt), max_tokens, f"prompt {i}", num_beams=width))
            numbers.append(request)
        tokens: dict[tuple[int, int], list[int]] = {(number, place): [] for number in numbers for place in range(n)}
        done: dict[tuple[int, int], Generation] = {}
        while len(done) < len(tokens):
            for new in self.step():
                key = new.request, new.text
                if key in tokens:
                    tokens[key].append(new.token)
                    if new.finish_reason is not None:
                        done[key] = Generation(tokens[key], new.finish_reason, new.score)
        return [done[key] for key in tokens]

    def too_long(self, prompt_tokens: int, max_tokens: int, what: str = "a request", *, num_beams: int = 1) -> str:
        """Return what to say of a request that `add_request` refused."""
        most, allocator = self.scheduler.settings.max_model_len, self.allocator
        room = allocator.most_tokens(allocator.usable_slots // allocator.unit_slots)
        most = most if most <= room else min(most, room + 1 - allocator.lookahead_slots)
        if num_beams > 1:
            most = min(most, longest_beam(num_beams, allocator))
        beams = f" in each of {num_beams} beams" if num_beams > 1 else ""
        return f"{what} of {prompt_tokens} tokens and {max_tokens} new ones: prompt and output have room for {most} together{beams}"

    def _compute(self, step: Step) -> TokenChoice:
        """Copy what forks write to, compute, and choose tokens; how many were accepted is written to the step's batch."""
        batch = step.batch[: step.num_entries]
        requests: list[int] = batch["request"].tolist()
        texts = [self.texts[request] for request in requests]
        for text in texts[step.num_running_before :]:
            text.draft_lag = 0  # an admission begins with what both models have computed
        self.storage.copy_blocks(self.allocator.copies)
        choice = choose_tokens(texts, requests, self.models.compute(texts, batch, self.allocator.padded_tables(batch["row"])))
        accepted = batch["num_accepted_tokens"]
        for i, request in enumerate(requests):
            accepted[i] = len(choice.tokens[request]) - 1 if request in choice.tokens else 0
        accepted[choice.held] = HELD
        return choice
