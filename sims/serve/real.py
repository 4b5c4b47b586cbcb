"""A model that really runs: `pagedkv.runtime.LLMEngine`, handed in, with its steps in a thread of their own."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, Protocol

from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import Step
from pagedkv.sims.serve.errors import BAD_REQUEST, ApiError
from pagedkv.sims.serve.served_engine import Admission, Ask, Output, StepReport, Tokenizer, check_room, longest_output
from pagedkv.sims.serve.simulated import admissions

_SEED_BITS = 63


class LanguageModel(Protocol):
    """What computes: `pagedkv.runtime.LLMEngine`."""

    scheduler: Scheduler
    observer: Any

    def add_request(
        self, prompt: Sequence[int], *, max_tokens: int, eos_token_id: Any = None, sampling: Any = ..., n: int = 1, salt: str = ""
    ) -> int | None:
        """Put a request into the queue."""

    def step(self) -> Sequence[Any]:
        """Compute a step; return the tokens that came out, as `pagedkv.runtime.texts.NewToken`."""

    def abort(self, request: int, text: int | None = None) -> bool:
        """Take a request out, or one of its texts."""

    def forget_done(self) -> dict[int, int]:
        """Forget requests that are done; return the others' new numbers by their old ones."""


class RealEngine:
    """Serves by a model. The loop waits for a step in its thread; between steps nothing else touches the model."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        sampling: Callable[..., Any],
        end_tokens: tuple[int, ...],
        vocab_size: int,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Watch the steps of `model`.

        Args:
            model: Has nobody to serve, and serves nobody else.
            tokenizer: Between its texts and its ids.
            sampling: Makes what it draws by: `pagedkv.runtime.SamplingParams`.
            end_tokens: Ids that end a text.
            vocab_size: Ids are below it.
            now: The clock, in seconds.
        """
        self.scheduler, self.tokenizer, self.can_fork = model.scheduler, tokenizer, True
        self._model, self._sampling, self._ends, self._vocab_size = model, sampling, end_tokens, vocab_size
        self._now = now
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._admitted: list[Admission] = []
        self._num_preempted = 0
        self._ended_s = now()
        model.observer = self

    def now(self) -> float:
        """Return the time."""
        return self._now()

    def check(self, ask: Ask) -> None:
        """Refuse what can never be answered here.

        Raises:
            ApiError: With why.
        """
        if not ask.prompt:
            raise ApiError(BAD_REQUEST, "the prompt has no tokens", param="prompt")
        if not 0 <= min(ask.prompt) <= max(ask.prompt) < self._vocab_size:
            raise ApiError(BAD_REQUEST, f"token ids must be 0 to {self._vocab_size - 1}", param="prompt")
        if ask.min_tokens and self._ends_of(ask):
            message = "min_tokens needs ignore_eos, and no stop_token_ids, here: ends cannot be put off"
            raise ApiError(BAD_REQUEST, message, param="min_tokens")
        if ask.steered_by:
            names = ", ".join(ask.steered_by)
            raise ApiError(BAD_REQUEST, f"not supported by a real model here, leave it out: {names}", param=ask.steered_by[0])
        check_room(self.scheduler, len(ask.prompt), ask.max_tokens or 1)

    def add(self, ask: Ask, arrived_s: float) -> int:
        """Put a request into the queue and return its number."""
        del arrived_s
        params = self._sampling(
            temperature=ask.temperature,
            top_k=ask.top_k,
            top_p=ask.top_p,
            seed=secrets.randbits(_SEED_BITS) if ask.seed is None else ask.seed,
        )
        request = self._model.add_request(
            ask.prompt,
            max_tokens=longest_output(self.scheduler, len(ask.prompt)) if ask.max_tokens is None else ask.max_tokens,
            eos_token_id=self._ends_of(ask),
            sampling=params,
            n=ask.n,
            salt=ask.cache_salt,
        )
        assert request is not None, "check() said that there is room"
        return request

    def _ends_of(self, ask: Ask) -> frozenset[int]:
        """Return the tokens that end an answer."""
        return ask.stop_token_ids if ask.ignore_eos else ask.stop_token_ids.union(self._ends)

    def abort(self, request: int, place: int) -> None:
        """Take an answer out; what only it held is free at once."""
        self._model.abort(request, place)

    def forget_done(self) -> dict[int, int]:
        """Forget requests that are done; return the others' new numbers by their old ones."""
        return self._model.forget_done()

    async def step(self) -> StepReport:
        """Decide a step, compute it in the engine's thread, and return what came out."""
        began_s = self._now()
        new = await asyncio.get_running_loop().run_in_executor(self._thread, self._model.step)
        outputs = []
        for (request, place), tokens in groupby(new, lambda each: (each.request, each.text)):  # several where drafts were accepted
            given = list(tokens)
            outputs.append(Output(request, [each.token for each in given], given[-1].finish_reason, place))
        return StepReport(began_s, self._ended_s, self._admitted, self._num_preempted, outputs)

    def launched(self, step: Step) -> None:
        """Note whom a step takes from the queue: the arrays are its own no longer than it lasts."""
        self._admitted, self._num_preempted = admissions(step), step.num_preempted

    def computed(self, step: Step) -> None:
        """Note when it is computed."""
        del step
        self._ended_s = self._now()

    def completed(self) -> None:
        """Do nothing: the tokens are what `step` returns."""

    def forked(self, parent: int, child: int) -> None:
        """Do nothing: tokens say which of a request's answers they belong to."""
        del parent, child

    def close(self) -> None:
        """End the thread, behind the step that runs."""
        self._thread.shutdown()


def warm_up(model: LanguageModel, *, block_size: int) -> None:
    """Let all that is compiled at its first use be compiled, by a request that forks and fills a block that nobody else finds."""
    left = 2
    if model.add_request([0] * (2 * block_size - 1), max_tokens=3, n=left, salt="warm-up") is not None:
        while left:
            left -= sum(new.finish_reason is not None for new in model.step())
