"""Who sends requests, and when: simpy processes over an engine. Random numbers come from a seed alone."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol, TypeAlias

import numpy as np
import simpy

from pagedkv.arrays import Int64Array
from pagedkv.scheduling.content import Contents, Segments, shared_segments
from pagedkv.sims.config import time_text
from pagedkv.sims.engine import ServingEngine
from pagedkv.sims.lengths import LengthDistribution, draws
from pagedkv.sims.limited_client import LimitedClient
from pagedkv.sims.records import Outcome
from pagedkv.sims.traces import Trace

Process: TypeAlias = Generator[simpy.Event, Any, None]

PAUSE_AFTER_ERROR_S = 1.0
_PREFIX_SEED = 0x70726566
_MODEL_SEED = 0x6D6F646C
_DRAWS_AT_ONCE = 64


class Load(Protocol):
    """A stream of requests."""

    @property
    def num_requests(self) -> int | None:
        """How many requests there are in all; None if they never end."""

    @property
    def title(self) -> str:
        """What a sentence calls it, in the plural."""

    @property
    def lengths_name(self) -> str:
        """Where the lengths come from."""

    def settings(self) -> dict[str, Any]:
        """Return the load's settings by field name of `LoadConfig`, defaults filled in."""

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Start the processes that submit requests to `engine`. The same seed gives the same requests to any engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixes:
    """What prompts begin with, such as a system prompt: one of several texts, as long as each other, drawn at random."""

    length: int
    """Tokens put before every prompt; 0: none."""
    number: int = 1
    """How many texts."""

    @property
    def title(self) -> str:
        """What stands behind the name of the lengths; nothing without a prefix."""
        if not self.length:
            return ""
        return f" behind {'a prefix' if self.number == 1 else f'one of {self.number:,} prefixes'} of {self.length:,} tokens"

    def settings(self) -> dict[str, Any]:
        """Return both, None without a prefix."""
        return {"prefix_len": self.length or None, "num_prefixes": self.number if self.length else None}

    def choices(self, seed: int) -> Iterator[int]:
        """Yield which of them each has, without end. Times and lengths, drawn apart, are the same with a prefix or without."""
        rng = np.random.default_rng([_PREFIX_SEED, seed])
        while True:
            yield from rng.integers(self.number, size=_DRAWS_AT_ONCE).tolist()

    def segments(self) -> Segments:
        """Return one of each text, none without a prefix."""
        number = self.number if self.length else 0
        return shared_segments(np.arange(number), np.full(number, self.length))


NO_PREFIX = SharedPrefixes(length=0)


def model_choices(number: int, seed: int) -> Iterator[int]:
    """Yield which of `number` models each user, or request, names, without end: at random, all alike. Drawn apart from all else."""
    rng = np.random.default_rng([_MODEL_SEED, seed])
    while True:
        yield from rng.integers(number, size=_DRAWS_AT_ONCE).tolist() if number > 1 else [0] * _DRAWS_AT_ONCE


def _limited(env: simpy.Environment, engine: ServingEngine, max_concurrency: int | None) -> ServingEngine:
    return engine if max_concurrency is None else LimitedClient(env, engine, max_concurrency)


def _limit(max_concurrency: int | None) -> str:
    return "" if max_concurrency is None else f", at most {max_concurrency:,} at once"


def _models(number: int, seed: int, num_requests: int) -> Int64Array | None:
    return np.fromiter(model_choices(number, seed), np.int64, count=num_requests) if number > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """People who think, ask, wait for the whole answer, and think again. Whoever gets an error waits a second before that."""

    users: int
    """How many."""
    think_time_s: float
    """Mean of the exponential pause before each request."""
    lengths: LengthDistribution
    """Of their requests, without the prefix."""
    prefixes: SharedPrefixes = NO_PREFIX
    """Each user has one of them."""
    num_requests: int | None = None
    """They stop after so many, all together; None: they never end."""
    num_models: int = 1
    """Each user has one of so many, at random."""

    @property
    def title(self) -> str:
        """E.g. "100 users"."""
        return f"{self.users:,} user{'s' if self.users > 1 else ''}"

    @property
    def lengths_name(self) -> str:
        """The name of the distribution, and the prefix."""
        return self.lengths.name + self.prefixes.title

    def settings(self) -> dict[str, Any]:
        """Return users, think time, number of requests and prefixes."""
        own = {"users": self.users, "think_time": time_text(self.think_time_s), "num_prompts": self.num_requests}
        return own | self.prefixes.settings()

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Start one process per user. Each has its own random stream: what one experiences does not change the others' requests."""
        numbers = count() if self.num_requests is None else iter(range(self.num_requests))
        children, segments = np.random.SeedSequence(seed).spawn(self.users), self.prefixes.segments()
        choices, models = self.prefixes.choices(seed), model_choices(self.num_models, seed)
        for child, choice, model in zip(children, choices, models, strict=False):
            rng = np.random.default_rng(child)
            env.process(self._user(env, engine, rng, numbers, segments[choice : choice + 1], model))

    def _user(
        self,
        env: simpy.Environment,
        engine: ServingEngine,
        rng: np.random.Generator,
        numbers: Iterator[int],
        prefix: Segments,
        model: int,
    ) -> Process:
        for prompt, output in draws(self.lengths, rng):
            yield env.timeout(rng.exponential(self.think_time_s))
            if next(numbers, None) is None:
                return
            answered = engine.submit(self.prefixes.length + prompt, output, content=prefix, model=model)
            if answered is None or (yield answered) is Outcome.FAILED:
                yield env.timeout(PAUSE_AFTER_ERROR_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests that arrive whether or not earlier ones are answered, with gamma-distributed gaps as in `vllm bench serve`."""

    request_rate_per_s: float
    """Mean arrivals per second."""
    burstiness: float
    """Shape of the gamma distribution: 1 is a Poisson process, less is burstier, more is steadier."""
    num_requests: int | None
    """Stop after so many."""
    lengths: LengthDistribution
    """Of the requests, without the prefix."""
    prefixes: SharedPrefixes = NO_PREFIX
    """Each request has one of them."""
    num_models: int = 1
    """Each request names one of so many, at random."""
    max_concurrency: int | None = None
    """Most under way at once; None: no limit."""

    @property
    def title(self) -> str:
        """E.g. "2 requests/s"."""
        return f"{self.request_rate_per_s:g} requests/s{_limit(self.max_concurrency)}"

    @property
    def lengths_name(self) -> str:
        """The name of the distribution, and the prefix."""
        return self.lengths.name + self.prefixes.title

    def settings(self) -> dict[str, Any]:
        """Return rate, burstiness, number of requests and prefixes."""
        return {
            "request_rate": self.request_rate_per_s,
            "burstiness": self.burstiness,
            "num_prompts": self.num_requests,
            "max_concurrency": self.max_concurrency,
            **self.prefixes.settings(),
        }

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Start the one process that submits them all, or submit them at once if they end."""
        rng, engine = np.random.default_rng(seed), _limited(env, engine, self.max_concurrency)
        if self.num_requests is None:
            env.process(self._arrivals(env, engine, rng, seed))
            return
        rows = np.fromiter(islice(self._draws(rng), self.num_requests), np.dtype("f8,i8,i8"), count=self.num_requests)
        engine.submit_all(
            np.cumsum(rows["f0"]),
            self.prefixes.length + rows["f1"],
            rows["f2"].copy(),
            contents=self._contents(seed, len(rows)),
            models=_models(self.num_models, seed, len(rows)),
        )

    def _contents(self, seed: int, number: int) -> Contents | None:
        if not self.prefixes.length:
            return None
        choices: Int64Array = np.fromiter(self.prefixes.choices(seed), np.int64, count=number)
        return Contents(self.prefixes.segments(), choices, np.ones(number, np.int64))

    def _draws(self, rng: np.random.Generator) -> Iterator[tuple[float, int, int]]:
        scale_s = 1 / (self.request_rate_per_s * self.burstiness)
        for prompt, output in draws(self.lengths, rng):
            yield rng.gamma(self.burstiness, scale_s), prompt, output

    def _arrivals(self, env: simpy.Environment, engine: ServingEngine, rng: np.random.Generator, seed: int) -> Process:
        segments = self.prefixes.segments()
        drawn = zip(self._draws(rng), self.prefixes.choices(seed), model_choices(self.num_models, seed), strict=False)
        for (gap_s, prompt, output), choice, model in drawn:
            yield env.timeout(gap_s)
            engine.submit(self.prefixes.length + prompt, output, content=segments[choice : choice + 1], model=model)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReplay:
    """The arrivals and lengths of a trace, and what its prompts are made of if it says so."""

    trace: Trace
    """What to replay."""
    num_models: int = 1
    """Each request names one of so many, at random."""
    max_concurrency: int | None = None
    """Most under way at once; None: no limit."""

    @property
    def num_requests(self) -> int:
        """Requests in the trace."""
        return len(self.trace)

    @property
    def title(self) -> str:
        """E.g. "the 19,366 requests of azure.csv"."""
        requests = f"the {len(self.trace):,} request{'s' if len(self.trace) > 1 else ''} of {self.trace.path.name}"
        return requests + _limit(self.max_concurrency)

    @property
    def lengths_name(self) -> str:
        """The trace itself, and what is to be known of it."""
        return "of the trace" + (f" ({'; '.join(self.trace.notes)})" if self.trace.notes else "")

    def settings(self) -> dict[str, Any]:
        """Return the format that was found, and the limit."""
        return {"trace_format": self.trace.format, "max_concurrency": self.max_concurrency}

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Submit them all; nothing is random here but which of several models they name."""
        engine = _limited(env, engine, self.max_concurrency)
        trace, models = self.trace, _models(self.num_models, seed, len(self.trace))
        contents = None if trace.content is None else trace.content.contents(trace.prompt_tokens)
        engine.submit_all(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, contents=contents, models=models)
