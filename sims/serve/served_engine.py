"""What the server's loop asks of an engine, simulated or real."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.sims.serve.errors import BAD_REQUEST, ApiError

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"
"""Why an answer ended. Source: the finish reasons of vLLM's engine, vllm/v1/engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One or more answers to a prompt that are asked for, checked."""

    prompt: list[int]
    """Token ids."""
    n: int = 1
    """How many answers."""
    max_tokens: int | None
    """Most tokens of the answer; None: the client does not say."""
    min_tokens: int = 0
    """Fewest tokens of the answer."""
    ignore_eos: bool = False
    """Go on behind tokens that end a text."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Draw from the likeliest so many; 0: all."""
    top_p: float = 1.0
    """Draw from the likeliest that together reach this probability."""
    seed: int | None = None
    """Same seed, same answer; the i-th of several draws by seed + i; None: nobody cares."""
    steered_by: tuple[str, ...] = ()
    """Fields of the request that want other tokens than the prompt and chance alone give: penalties, a bias, a grammar."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    include_stop: bool = False
    """End behind the text instead."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, besides those that end every text."""
    cache_salt: str = ""
    """Only requests of the same salt share blocks."""

    def apart(self) -> "list[Ask]":
        """Return an ask for each of the answers, of the same prompt."""
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n)]
        return [replace(self, n=1, seed=seed) for seed in seeds]


class Output(NamedTuple):
    """What a step gave one answer."""

    request: int
    """The number that `ServedEngine.add` gave it."""
    tokens: list[int]
    """New token ids; none if the engine has given it up."""
    finish_reason: str | None
    """STOP, LENGTH or ERROR if nothing more comes."""
    place: int = 0
    """Which of the request's answers."""


class Admission(NamedTuple):
    """A request that a step took from the queue."""

    request: int
    num_known_tokens: int
    """Its prompt, and what it had generated before a preemption."""
    num_hit_tokens: int
    """Those of them that the prefix cache had."""


class StepReport(NamedTuple):
    """A step that is over."""

    began_s: float
    ended_s: float
    """On the engine's clock."""
    admitted: list[Admission]
    num_preempted: int
    outputs: list[Output]


class Decoder(Protocol):
    """Makes a text of one request's tokens, as they come."""

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        """Return what `tokens` add to the text; what the next token may still change comes later, unless this is the last."""


class Tokenizer(Protocol):
    """Between texts and token ids. It may be called from any one thread."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            ApiError: If there is no tokenizer.
        """

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids of a conversation, (role, content) each, up to where the answer begins.

        Raises:
            ApiError: If that cannot be: there is no chat template, or it refuses the conversation.
        """

    def decoder(self) -> Decoder:
        """Return a decoder with nothing in it."""


class ServedEngine(Protocol):
    """Schedules and computes. The loop calls `add`, `abort` and `step` one after the other, and `now` and `check` at any time."""

    scheduler: Scheduler

    @property
    def can_fork(self) -> bool:
        """Whether one request can have several answers, which share its prompt's blocks."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Between texts and token ids."""

    def now(self) -> float:
        """Return the time on the engine's clock, in seconds from any moment on; never behind the end of the step in flight."""

    def check(self, ask: Ask) -> None:
        """Refuse what can never be answered here. It changes nothing.

        Raises:
            ApiError: With why.
        """

    def add(self, ask: Ask, arrived_s: float) -> int:
        """Put into the queue what `check` lets pass, and return its number. Of several answers only if it can fork."""

    def abort(self, request: int, place: int) -> None:
        """Take an answer out, running or waiting; what only it held is free at once. Not within a step."""

    def forget_done(self) -> dict[int, int]:
        """Forget requests that are done; return the others' new numbers by their old ones. Not within a step."""

    async def step(self) -> StepReport:
        """Decide a step, let it be computed, and return what came out; somebody must be there."""

    def close(self) -> None:
        """Free what threads it has. No step is in flight."""


def longest_output(scheduler: Scheduler, prompt_tokens: int) -> int:
    """Return the most output tokens for which a prompt has room, 0 if it has none. O(log max_model_len)."""
    most, allocator = scheduler.settings.max_model_len - prompt_tokens, scheduler.allocator

    def beyond(output_tokens: int) -> bool:
        return allocator.admission_slots(prompt_tokens, output_tokens) is None

    return bisect_left(range(1, most + 1), 1, key=beyond) if most > 0 and beyond(most) else max(most, 0)


def check_room(scheduler: Scheduler, prompt_tokens: int, output_tokens: int) -> None:
    """Refuse a request that has no room.

    Raises:
        ApiError: If it is too long.
    """
    most = scheduler.settings.max_model_len
    if prompt_tokens + output_tokens > most:
        longest, what = most, "the longest that is served (--max-model-len)"
    elif scheduler.allocator.admission_slots(prompt_tokens, output_tokens) is None:
        longest, what = 1 + longest_output(scheduler, 1), "what the KV cache holds"
    else:
        return
    message = f"{prompt_tokens} tokens of prompt and {output_tokens} of output are more than {longest} in all, {what}"
    raise ApiError(BAD_REQUEST, message, code="context_length_exceeded")
