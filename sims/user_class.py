"""A class of users: how many there are, what they ask, how their conversations go on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pagedkv.sims.token_lengths import TokenLengths, sample_turns

_SESSIONS_AT_ONCE = 16
"""Drawn together: numpy takes as long for one as for many."""


class Turn(NamedTuple):
    """A request of a session, before anything of it is sent."""

    pause_s: float
    """Before it: since the answer before."""
    new_tokens: int
    """What it adds to the history."""
    output_tokens: int
    """What it is answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How many requests a session has."""

    mean: float
    """1 or more; a whole number if it is always the same."""
    varies: bool = False
    """Geometric with this mean: after each answer the session ends with the same probability."""

    def sample(self, rng: np.random.Generator, n: int) -> list[int]:
        """Draw for `n` sessions."""
        if not self.varies:
            return [int(self.mean)] * n
        drawn: list[int] = rng.geometric(1 / self.mean, size=n).tolist()
        return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class UserClass:
    """People, or programs, that behave alike."""

    name: str
    prompt: TokenLengths
    """First request of a session, without the system prompt."""
    output: TokenLengths
    """Every answer."""
    follow_up: TokenLengths
    """What each later request adds to the history, which it sends again."""
    turns: Turns
    think_time_s: float
    """Mean of the exponential pause before the first request of a session, and before later ones if there is no tool time."""
    tool_time_s: float | None = None
    """Mean of the exponential pause before later requests, in which a tool runs."""
    system_prompt_tokens: int = 0
    """In front of every session."""
    num_system_prompts: int = 1
    """How many different ones; each user has one of them."""
    users: int | None = None
    """How many there are, whatever --users says."""
    share: float | None = None
    """Their share of --users."""
    request_rate_per_s: float | None = None
    """Open loop: requests per second, if every session is held to its end."""
    model: str | None = None
    """The model that they ask; None: the server's one, or one of its several at random."""
    sessions: int | None = None
    """How many each user has before leaving; None: without end."""

    @property
    def pause_s(self) -> float:
        """Mean pause before later requests of a session."""
        return self.think_time_s if self.tool_time_s is None else self.tool_time_s

    @property
    def mean_pause_s(self) -> float:
        """Mean pause before a request."""
        return (self.think_time_s + (self.turns.mean - 1) * self.pause_s) / self.turns.mean

    @property
    def is_batch(self) -> bool:
        """Whether each of them sends one request at once, and leaves."""
        return self.request_rate_per_s is None and self.sessions == self.turns.mean == 1 and self.think_time_s == 0

    def draw_sessions(self, rng: np.random.Generator) -> Iterator[list[Turn]]:
        """Yield sessions without end. Each is drawn whole, so that what happens in one does not change those after it."""
        while True:
            numbers = self.turns.sample(rng, _SESSIONS_AT_ONCE)
            later = sum(numbers) - len(numbers)
            firsts = _turns(self.prompt, self.output, self.think_time_s, rng, len(numbers))
            follow_ups = iter(_turns(self.follow_up, self.output, self.pause_s, rng, later))
            for first, number in zip(firsts, numbers, strict=True):
                yield [first, *(next(follow_ups) for _ in range(number - 1))]


def _turns(new: TokenLengths, output: TokenLengths, pause_s: float, rng: np.random.Generator, n: int) -> list[Turn]:
    if n == 0:
        return []
    added, answered = sample_turns(new, output, rng, n)
    pauses_s = rng.exponential(pause_s, size=n)
    return list(map(Turn, pauses_s.tolist(), added.tolist(), answered.tolist()))
