"""Who sends requests, and when: simpy processes over an engine. Random numbers come from a seed alone."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np
import simpy

from pagedkv.sims.config import time_text
from pagedkv.sims.engine import ServingEngine
from pagedkv.sims.lengths import LengthDistribution, draws
from pagedkv.sims.traces import Trace

Process: TypeAlias = Generator[simpy.Event, Any, None]

_PAUSE_AFTER_REJECTION_S = 1.0


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
class ClosedLoop:
    """People who think, ask, wait for the whole answer, and think again. Whoever is rejected waits a second before that."""

    users: int
    """How many."""
    think_time_s: float
    """Mean of the exponential pause before each request."""
    lengths: LengthDistribution
    """Of their requests."""

    @property
    def num_requests(self) -> None:
        """None: they never end."""
        return None

    @property
    def title(self) -> str:
        """E.g. "100 users"."""
        return f"{self.users:,} user{'s' if self.users > 1 else ''}"

    @property
    def lengths_name(self) -> str:
        """The name of the distribution."""
        return self.lengths.name

    def settings(self) -> dict[str, Any]:
        """Return users and think time."""
        return {"users": self.users, "think_time": time_text(self.think_time_s)}

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Start one process per user. Each has its own random stream: what one experiences does not change the others' requests."""
        for child in np.random.SeedSequence(seed).spawn(self.users):
            env.process(self._user(env, engine, np.random.default_rng(child)))

    def _user(self, env: simpy.Environment, engine: ServingEngine, rng: np.random.Generator) -> Process:
        for prompt, output in draws(self.lengths, rng):
            yield env.timeout(rng.exponential(self.think_time_s))
            answered = engine.submit(prompt, output)
            yield env.timeout(_PAUSE_AFTER_REJECTION_S) if answered is None else answered


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
    """Of the requests."""

    @property
    def title(self) -> str:
        """E.g. "2 requests/s"."""
        return f"{self.request_rate_per_s:g} requests/s"

    @property
    def lengths_name(self) -> str:
        """The name of the distribution."""
        return self.lengths.name

    def settings(self) -> dict[str, Any]:
        """Return rate, burstiness and number of requests."""
        return {
            "request_rate": self.request_rate_per_s,
            "burstiness": self.burstiness,
            "num_prompts": self.num_requests,
        }

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Start the one process that submits them all, or submit them at once if they end."""
        rng = np.random.default_rng(seed)
        if self.num_requests is None:
            env.process(self._arrivals(env, engine, rng))
            return
        rows = np.fromiter(islice(self._draws(rng), self.num_requests), np.dtype("f8,i8,i8"), count=self.num_requests)
        engine.submit_all(np.cumsum(rows["f0"]), rows["f1"].copy(), rows["f2"].copy())

    def _draws(self, rng: np.random.Generator) -> Iterator[tuple[float, int, int]]:
        scale_s = 1 / (self.request_rate_per_s * self.burstiness)
        for prompt, output in draws(self.lengths, rng):
            yield rng.gamma(self.burstiness, scale_s), prompt, output

    def _arrivals(self, env: simpy.Environment, engine: ServingEngine, rng: np.random.Generator) -> Process:
        for gap_s, prompt, output in self._draws(rng):
            yield env.timeout(gap_s)
            engine.submit(prompt, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReplay:
    """The arrivals and lengths of a trace."""

    trace: Trace
    """What to replay."""

    @property
    def num_requests(self) -> int:
        """Requests in the trace."""
        return len(self.trace)

    @property
    def title(self) -> str:
        """E.g. "the 19,366 requests of azure.csv"."""
        return f"the {len(self.trace):,} request{'s' if len(self.trace) > 1 else ''} of {self.trace.path.name}"

    @property
    def lengths_name(self) -> str:
        """The trace itself."""
        return "of the trace"

    def settings(self) -> dict[str, Any]:
        """Return the format that was found."""
        return {"trace_format": self.trace.format}

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        """Submit them all; nothing is random here."""
        del env, seed
        engine.submit_all(self.trace.arrival_s, self.trace.prompt_tokens, self.trace.output_tokens)
