"""How long requests are: distributions of prompt and output lengths, drawn in pairs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.errors import ConfigError
from pagedkv.sims.traces import read_noted_lengths

Lengths = npt.NDArray[np.int64]

_DRAWS_AT_ONCE = 64


class LengthDistribution(Protocol):
    """Pairs of a prompt length and an output length, in tokens, each at least 1."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def max_total(self) -> int:
        """Upper bound of prompt plus output."""
        ...

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length."""
        ...

    @property
    def mean_output(self) -> float:
        """Mean output length."""
        ...

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        """Draw `n` prompt and output lengths."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantileLengths:
    """Lengths given by the quantiles of each and by how their ranks go together.

    A pair of rank bins is drawn from the joint table, a probability evenly within each bin, and the length by linear
    interpolation between quantiles (a checkerboard copula). Bins are of equal size, so each length keeps its own
    distribution. Unlike a Gaussian copula this follows a dependence that is not monotone: in the Azure trace middling
    prompts have the longest outputs, and the rank correlation is only 0.07.
    """

    name: str
    """Name of its table in `lengths.toml`."""
    source: str
    """Where the figures come from, and their licence."""
    probabilities: npt.NDArray[np.float64]
    """Shape (q,), ascending from 0 to 1."""
    prompt_quantiles: npt.NDArray[np.float64]
    """Prompt lengths at `probabilities` (tokens), shape (q,)."""
    output_quantiles: npt.NDArray[np.float64]
    """Output lengths at `probabilities` (tokens), shape (q,)."""
    joint_ranks: Lengths
    """Weight of each pair of a prompt rank bin and an output rank bin, shape (b, b)."""

    @property
    def max_total(self) -> int:
        """Upper bound of prompt plus output: the top corner of a pair of bins that occurs."""
        bins = len(self.joint_ranks)
        tops = np.arange(1, bins + 1) / bins
        totals = self._at(tops, self.prompt_quantiles)[:, None] + self._at(tops, self.output_quantiles)
        return int(totals[self.joint_ranks > 0].max())

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length: the integral of its quantiles (rounding to whole tokens cancels out)."""
        return float(np.trapezoid(self.prompt_quantiles, self.probabilities))

    @property
    def mean_output(self) -> float:
        """Mean output length: the integral of its quantiles."""
        return float(np.trapezoid(self.output_quantiles, self.probabilities))

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        """Draw `n` prompt and output lengths."""
        bins = len(self.joint_ranks)
        heaped = np.cumsum(self.joint_ranks)
        pair = np.searchsorted(heaped, rng.integers(heaped[-1], size=n), side="right")
        prompt_bin, output_bin = np.divmod(pair, bins)
        return (
            self._at((prompt_bin + rng.random(n)) / bins, self.prompt_quantiles),
            self._at((output_bin + rng.random(n)) / bins, self.output_quantiles),
        )

    def _at(self, probability: npt.NDArray[np.float64], quantiles: npt.NDArray[np.float64]) -> Lengths:
        return np.rint(np.interp(probability, self.probabilities, quantiles)).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedLengths:
    """One length each, or whole numbers evenly around it, as `vllm bench serve --dataset-name random` draws them.

    Source: vLLM, benchmarks/datasets, get_sampling_params: floor(length * (1 - ratio)) to ceil(length * (1 + ratio)).
    """

    input_len: int
    """Prompt tokens (`--random-input-len`)."""
    output_len: int
    """Output tokens (`--random-output-len`)."""
    range_ratio: float = 0.0
    """Half width of the range as a share of the length (`--random-range-ratio`), in [0, 1)."""

    def __post_init__(self) -> None:
        for field, value in (("input_len", self.input_len), ("output_len", self.output_len)):
            if value < 1:
                raise ConfigError(f"{field} {value}: a request has at least 1 token")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio {self.range_ratio} is outside [0, 1); 0 makes all lengths the same")

    @property
    def name(self) -> str:
        """E.g. "1024 + 128" or "1024 + 128, ±10%"."""
        return f"{self.input_len} + {self.output_len}" + (f", ±{self.range_ratio:.0%}" if self.range_ratio else "")

    @property
    def max_total(self) -> int:
        """Largest prompt plus output."""
        return self._range(self.input_len)[1] + self._range(self.output_len)[1]

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length."""
        return sum(self._range(self.input_len)) / 2

    @property
    def mean_output(self) -> float:
        """Mean output length."""
        return sum(self._range(self.output_len)) / 2

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        """Draw `n` prompt and output lengths, independent of each other."""
        low, high = zip(self._range(self.input_len), self._range(self.output_len), strict=True)
        prompt, output = rng.integers(low, high, size=(n, 2), endpoint=True).T
        return prompt, output

    def _range(self, length: int) -> tuple[int, int]:
        """Return the least and the largest length drawn."""
        return max(1, math.floor(length * (1 - self.range_ratio))), math.ceil(length * (1 + self.range_ratio))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FileLengths:
    """The rows of a file, drawn with replacement: prompt and output of a pair come from the same row."""

    name: str
    """The file, and what there is to say of its lengths, e.g. that they are estimates."""
    prompt_tokens: Lengths
    """Prompt lengths, shape (rows,)."""
    output_tokens: Lengths
    """Output lengths, shape (rows,)."""
    in_order: bool = False
    """Whether `draws` takes the rows in the file's order instead of at random."""

    @classmethod
    def read(cls, path: Path) -> "FileLengths":
        """Read a file of any trace format, with or without times; raises TraceFormatError."""
        read = read_noted_lengths(path)
        name = f"{path} ({'; '.join(read.notes)})" if read.notes else str(path)
        return cls(name=name, prompt_tokens=read.prompt_tokens, output_tokens=read.output_tokens)

    @property
    def max_total(self) -> int:
        """Largest prompt plus output."""
        return int((self.prompt_tokens + self.output_tokens).max())

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length."""
        return float(self.prompt_tokens.mean())

    @property
    def mean_output(self) -> float:
        """Mean output length."""
        return float(self.output_tokens.mean())

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        """Draw `n` rows."""
        row = rng.integers(len(self.prompt_tokens), size=n)
        return self.prompt_tokens[row], self.output_tokens[row]

    def restricted(self, max_total: int) -> "FileLengths":
        """Return the rows whose prompt plus output is at most `max_total`; raises ConfigError if there are none."""
        total = self.prompt_tokens + self.output_tokens
        fits = total <= max_total
        if not fits.any():
            raise ConfigError(
                f"no request of {self.name!r} has at most {max_total} tokens (prompt + output); the shortest has {total.min()}"
            )
        return replace(
            self,
            name=f"{self.name}, at most {max_total} tokens",
            prompt_tokens=self.prompt_tokens[fits],
            output_tokens=self.output_tokens[fits],
        )


def draws(lengths: LengthDistribution, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield prompt and output lengths without end: from a file in order its rows, again from the top after the last; else draws.

    Each of many users has one of these, so that what is drawn ahead stays in arrays: lists of it would take four fifths of a user.
    """
    while True:
        if isinstance(lengths, FileLengths) and lengths.in_order:
            chunk = lengths.prompt_tokens, lengths.output_tokens
        else:
            chunk = lengths.sample(rng, _DRAWS_AT_ONCE)
        yield from zip(map(int, chunk[0]), map(int, chunk[1]), strict=True)
