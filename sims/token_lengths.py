"""How many tokens one part of a request has: a prompt, an answer, what a follow-up adds."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.sims.lengths import LengthDistribution

MOST_TOKENS = 10**9
"""More is a mistake, and what a draw is cut to."""


class TokenLengths(Protocol):
    """A distribution of whole numbers of tokens, each at least 1."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def least(self) -> int:
        """A lower bound of what is drawn."""

    def sample(self, rng: np.random.Generator, n: int) -> Int64Array:
        """Draw `n` lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SameLength:
    """Always as many."""

    tokens: int

    @property
    def name(self) -> str:
        """The number."""
        return f"{self.tokens:,}"

    @property
    def least(self) -> int:
        """The number."""
        return self.tokens

    def sample(self, rng: np.random.Generator, n: int) -> Int64Array:
        """Return it `n` times; nothing is drawn."""
        del rng
        return np.full(n, self.tokens, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformLengths:
    """Every whole number of a range alike."""

    least: int
    most: int

    @property
    def name(self) -> str:
        """The range."""
        return f"{self.least:,} to {self.most:,}"

    def sample(self, rng: np.random.Generator, n: int) -> Int64Array:
        """Draw `n` lengths, both ends included."""
        return rng.integers(self.least, self.most, size=n, endpoint=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLengths:
    """Lognormal, rounded to whole tokens, 1 at least: many short ones and a long tail, as texts have."""

    mean: float
    """Mean of the lognormal, tokens."""
    cv: float
    """Its standard deviation as a multiple of the mean."""

    @property
    def name(self) -> str:
        """Mean and spread."""
        return f"lognormal with mean {self.mean:,g} and cv {self.cv:g}"

    @property
    def least(self) -> int:
        """One token."""
        return 1

    def sample(self, rng: np.random.Generator, n: int) -> Int64Array:
        """Draw `n` lengths. Of the underlying normal, the variance is log(1 + cv²), the mean log(mean) − variance / 2."""
        variance = math.log1p(self.cv**2)
        drawn = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), size=n)
        return np.rint(np.clip(drawn, 1, MOST_TOKENS)).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthsOf:
    """The prompts, or the outputs, of a distribution of pairs."""

    pairs: LengthDistribution
    part: Literal["prompt", "output"]

    @property
    def name(self) -> str:
        """The distribution's."""
        return f"{self.part}s of {self.pairs.name}"

    @property
    def least(self) -> int:
        """One token."""
        return 1

    def sample(self, rng: np.random.Generator, n: int) -> Int64Array:
        """Draw `n` pairs and return this part of them."""
        prompts, outputs = self.pairs.sample(rng, n)
        return prompts if self.part == "prompt" else outputs


def sample_turns(new: TokenLengths, output: TokenLengths, rng: np.random.Generator, n: int) -> tuple[Int64Array, Int64Array]:
    """Draw what `n` turns add and what they are answered.

    Apart, unless both are parts of one distribution: then as its pairs, which depend on each other.
    """
    if isinstance(new, LengthsOf) and isinstance(output, LengthsOf) and new.pairs.name == output.pairs.name:
        return new.pairs.sample(rng, n)
    return new.sample(rng, n), output.sample(rng, n)
