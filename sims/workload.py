"""A mixture of user classes as a load: people who hold conversations, agents, arrivals, batches, on one engine.

A conversation is a stream of its own behind its system prompt, and its answers are part of it: a request's content reaches to the
end of its output. So the blocks that turn k fills, its answer's too, are those that turn k + 1 begins with, in every cache alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from pagedkv.arrays import Int64Array
from pagedkv.scheduling.content import NO_SEGMENTS, Segments, shared_segments
from pagedkv.sims.engine import ServingEngine
from pagedkv.sims.load import PAUSE_AFTER_ERROR_S, Load, Process, model_choices
from pagedkv.sims.records import Outcome
from pagedkv.sims.user_class import Turn, UserClass

_SEED = 0x776F726B
_ARRIVALS_SEED = 0x61727276
_SESSION = 1 << 62
"""Set in the numbers of sessions' streams; those of system prompts lie below."""
_CLASS_BIT, _USER_BIT = 52, 32
MOST_CLASSES = 1 << (62 - _CLASS_BIT)
"""So that every session has a number of its own: class, user, session."""


def shares_of(users: int, shares: Sequence[float]) -> list[int]:
    """Return the class, by its place in `shares`, of each of `users` people, in the order in which they join. O(users × classes).

    The next one joins the class with the largest share / (2 × members + 1), the first of equals: so N + 1 people are the same N
    and one more. Source: the method of Webster and Sainte-Laguë, for seats in a parliament.
    """
    members, joined = [0] * len(shares), []
    for _ in range(users):
        claims = [share / (2 * number + 1) for share, number in zip(shares, members, strict=True)]
        chosen = claims.index(max(claims))
        members[chosen] += 1
        joined.append(chosen)
    return joined


@dataclass(slots=True)
class _Allowance:
    """How many requests all users together may still send."""

    left: float

    def take(self) -> bool:
        """Take one, if there is one."""
        if not self.left:
            return False
        self.left -= 1
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Users of several classes. Whoever gets an error ends the session, waits a second, and goes on with the next."""

    name: str
    """The workload's, or its file."""
    classes: tuple[UserClass, ...]
    users: int | None
    """How many people share the classes that have a share; None if there are none."""
    num_requests_asked: int | None = None
    """They stop after so many, all together; None: as their classes say."""
    max_model_len: int
    """A session ends before a follow-up that would be longer, prompt and output: the engine would refuse it."""
    drops_over_length: bool = False
    """Whether a session whose first request is longer is left out, instead of sent and refused."""
    models: tuple[int | None, ...] = ()
    """By class: the model that it asks, by its place among the server's; None: each user has one at random. Empty: there is one."""
    max_model_lens: tuple[int, ...] = ()
    """By class, where models differ: what holds for it instead of `max_model_len`."""
    num_models: int = 1
    """Of the server."""

    @property
    def num_requests(self) -> int | None:
        """What was asked for; else the expected number, rounded up, if everybody leaves in the end."""
        if self.num_requests_asked is not None:
            return self.num_requests_asked
        if any(user_class.sessions is None for user_class in self.classes):
            return None
        each = zip(self.classes, self.num_users, strict=True)
        return max(1, math.ceil(sum(number * (one.sessions or 0) * one.turns.mean for one, number in each)))

    @property
    def title(self) -> str:
        """E.g. "100 users of chat"."""
        number, plural = "the" if self.users is None else f"{self.users:,}", "" if self.users == 1 else "s"
        return f"{number} user{plural} of {Path(self.name).name}"

    @property
    def lengths_name(self) -> str:
        """Each class has its own."""
        return "of the workload"

    @property
    def num_users(self) -> list[int]:
        """By class: how many people it has; 0 for one whose requests arrive by themselves."""
        numbers = [user_class.users or 0 for user_class in self.classes]
        for place in self._joining():
            numbers[place] += 1
        return numbers

    @property
    def is_closed(self) -> bool:
        """Whether nobody asks before the answer before."""
        return all(user_class.request_rate_per_s is None for user_class in self.classes)

    @property
    def is_batch(self) -> bool:
        """Whether all is sent at once: that requests wait is then no sign of too many users."""
        return all(user_class.is_batch for user_class in self.classes)

    def mean_pause_s(self, user_class: Int64Array) -> float:
        """Return the mean pause before requests of these classes, by index; over all classes alike if there are none."""
        pauses_s = np.array([each.mean_pause_s for each in self.classes])
        return float(pauses_s[user_class].mean() if user_class.size else pauses_s.mean())

    def settings(self) -> dict[str, Any]:
        """Return users and number of requests; the classes say the rest."""
        return {"workload": self.name, "users": self.users, "num_prompts": self.num_requests_asked, "lengths": None}

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Start one process per user, and one per class that arrives. Each has its own random stream."""
        allowance = _Allowance(math.inf if self.num_requests_asked is None else self.num_requests_asked)
        members = [0] * len(self.classes)
        fixed = (place for place, user_class in enumerate(self.classes) for _ in range(user_class.users or 0))
        for place, drawn in zip((*fixed, *self._joining()), model_choices(self.num_models, seed), strict=False):
            rng = np.random.default_rng([_SEED, seed, place, members[place]])
            env.process(self._user(env, engine, rng, allowance, place, members[place], self._model(place, drawn)))
            members[place] += 1
        for place, user_class in enumerate(self.classes):
            if user_class.request_rate_per_s is not None:
                env.process(self._arrivals(env, engine, seed, allowance, place, user_class.request_rate_per_s))

    def _model(self, place: int, drawn: int) -> int:
        named = self.models[place] if self.models else None
        return drawn if named is None else named

    def _joining(self) -> list[int]:
        places = [place for place, user_class in enumerate(self.classes) if user_class.share is not None]
        return [places[i] for i in shares_of(self.users or 0, [self.classes[place].share or 0.0 for place in places])]

    def _user(
        self,
        env: simpy.Environment,
        engine: ServingEngine,
        rng: np.random.Generator,
        allowance: _Allowance,
        place: int,
        user: int,
        model: int,
    ) -> Process:
        user_class = self.classes[place]
        system_prompt = self._system_prompt(place, rng)
        for i, session in enumerate(islice(user_class.draw_sessions(rng), user_class.sessions)):
            stream = _SESSION | place << _CLASS_BIT | user << _USER_BIT | i
            yield from self._session(env, engine, session, allowance, place, system_prompt, stream, model)
            if not allowance.left:
                return

    def _arrivals(
        self, env: simpy.Environment, engine: ServingEngine, seed: int, allowance: _Allowance, place: int, requests_per_s: float
    ) -> Process:
        user_class, rng = self.classes[place], np.random.default_rng([_ARRIVALS_SEED, seed, place])
        models = model_choices(self.num_models, seed)
        for i, (session, drawn) in enumerate(zip(user_class.draw_sessions(rng), models, strict=False)):
            system_prompt = self._system_prompt(place, rng)
            yield env.timeout(rng.exponential(user_class.turns.mean / requests_per_s))
            if not allowance.left:
                return
            at_once = [session[0]._replace(pause_s=0.0), *session[1:]]
            stream = _SESSION | place << _CLASS_BIT | i
            model = self._model(place, drawn)
            env.process(self._session(env, engine, at_once, allowance, place, system_prompt, stream, model))

    def _system_prompt(self, place: int, rng: np.random.Generator) -> Segments:
        user_class = self.classes[place]
        if not user_class.system_prompt_tokens:
            return NO_SEGMENTS
        stream = place << _USER_BIT | int(rng.integers(user_class.num_system_prompts))
        return shared_segments(np.array([stream]), np.array([user_class.system_prompt_tokens]))

    def _session(
        self,
        env: simpy.Environment,
        engine: ServingEngine,
        session: list[Turn],
        allowance: _Allowance,
        place: int,
        system_prompt: Segments,
        stream: int,
        model: int,
    ) -> Process:
        history = self.classes[place].system_prompt_tokens
        most = self.max_model_lens[place] if self.max_model_lens else self.max_model_len
        for i, (pause_s, new_tokens, output_tokens) in enumerate(session):
            prompt_tokens = history + new_tokens
            history = prompt_tokens + output_tokens
            if history > most and (i > 0 or self.drops_over_length):
                return
            yield env.timeout(pause_s)
            if not allowance.take():
                return
            content = system_prompt
            if len(session) > 1:
                content = np.concatenate((system_prompt, shared_segments(np.array([stream]), np.array([history]))))
            answered = engine.submit(prompt_tokens, output_tokens, content=content, user_class=place, model=model)
            if answered is None or (yield answered) is Outcome.FAILED:
                yield env.timeout(PAUSE_AFTER_ERROR_S)
                return


def class_names(load: Load) -> tuple[str, ...]:
    """Return what the classes of `load` are called, which a request's `user_class` counts; none if it is no workload."""
    return tuple(user_class.name for user_class in load.classes) if isinstance(load, Workload) else ()
