"""Requests at given times: what a real engine and the simulator both serve."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array

SHORTEST = 4
"""Tokens of the shortest prompt, and of the shortest answer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedLoad:
    """Some requests, in order of arrival."""

    name: str
    """One word."""
    words: str
    """How it differs from the others."""
    arrival_s: Float64Array
    """Ascending, from 0 on."""
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    max_num_seqs: int
    """Most that run at once."""

    @property
    def size(self) -> int:
        """How many requests there are."""
        return self.arrival_s.size

    def settings(self) -> dict[str, Any]:
        """Return what describes it."""
        return {
            "name": self.name,
            "words": self.words,
            "num_requests": self.size,
            "max_num_seqs": self.max_num_seqs,
            "last_arrival_s": float(self.arrival_s[-1]),
            "mean_prompt_tokens": float(self.prompt_tokens.mean()),
            "mean_output_tokens": float(self.output_tokens.mean()),
        }


def all_at_once(*, num_requests: int, seed: int, name: str = "probe") -> TimedLoad:
    """Return requests that all come at the beginning: how many a second the machine serves, nobody knows before."""
    rng = np.random.default_rng(seed)
    return TimedLoad(
        name=name,
        words="all at once",
        arrival_s=np.zeros(num_requests),
        prompt_tokens=_lengths(rng, num_requests, mean=96),
        output_tokens=_lengths(rng, num_requests, mean=40),
        max_num_seqs=16,
    )


def timed_loads(*, num_requests: int, capacity_per_s: float, seed: int) -> tuple[TimedLoad, ...]:
    """Return four loads, the first to fit a machine to, the others unlike it in arrivals, lengths and batch.

    Args:
        num_requests: Of each.
        capacity_per_s: Requests of the usual lengths that the machine serves in a second, in batches.
        seed: Of all that is drawn.
    """
    rng = np.random.default_rng(seed)

    def arrivals(share: float | Float64Array, burstiness: float) -> Float64Array:
        gaps = rng.gamma(burstiness, 1 / (share * capacity_per_s * burstiness), num_requests)
        times: Float64Array = np.cumsum(gaps) - gaps[0]
        return times

    usual = TimedLoad(
        name="ramp",
        words="Poisson arrivals that grow from 0.3 to 3 of what the machine can serve, so that batches up to the limit are seen",
        arrival_s=arrivals(np.linspace(0.3, 3.0, num_requests), 1.0),
        prompt_tokens=_lengths(rng, num_requests, mean=96),
        output_tokens=_lengths(rng, num_requests, mean=40),
        max_num_seqs=16,
    )
    bursts = replace(
        usual,
        name="bursts",
        words="other arrivals: gamma gaps of shape 0.25, at 0.5 of it",
        arrival_s=arrivals(0.5, 0.25),
        prompt_tokens=_lengths(rng, num_requests, mean=96),
        output_tokens=_lengths(rng, num_requests, mean=40),
    )
    lengths = replace(
        usual,
        name="lengths",
        words="other lengths: prompts twice as long, answers half as long, Poisson",
        arrival_s=arrivals(0.5, 1.0),
        prompt_tokens=_lengths(rng, num_requests, mean=192),
        output_tokens=_lengths(rng, num_requests, mean=20),
    )
    batch = replace(all_at_once(num_requests=num_requests, seed=seed + 1, name="batch"), max_num_seqs=32)
    return usual, bursts, lengths, replace(batch, words="another batch: all at once, up to 32 at a time")


def _lengths(rng: np.random.Generator, number: int, *, mean: int) -> Int64Array:
    """Draw lengths of which the longest are some times the mean, as those of conversations are."""
    drawn = rng.lognormal(np.log(mean) - 0.125, 0.5, number)
    return np.clip(np.rint(drawn).astype(np.int64), SHORTEST, 6 * mean)
