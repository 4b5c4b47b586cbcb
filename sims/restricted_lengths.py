"""A distribution of lengths without the requests that are too long."""

import math
from dataclasses import dataclass

import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.sims.lengths import FileLengths, LengthDistribution, Lengths

_PROBE_DRAWS = 1 << 17
# Below this, rejection sampling becomes slow and what it gives has little to do with the distribution.
_LEAST_SHARE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RejectionLengths:
    """What remains of `base`; see `restricted`."""

    base: LengthDistribution
    """The distribution drawn from."""
    max_total: int
    """Largest prompt plus output that is kept."""
    share: float
    """Share of `base` that is kept, roughly: sets how much is drawn at once."""
    mean_prompt: float
    """Mean prompt length of what is kept."""
    mean_output: float
    """Mean output length of what is kept."""

    @property
    def name(self) -> str:
        return f"{self.base.name}, at most {self.max_total} tokens"

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        kept: list[tuple[Lengths, Lengths]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        missing = n
        while missing > 0:
            prompt, output = self.base.sample(rng, min(math.ceil(1.1 * missing / self.share) + 16, 1 << 20))
            fits = np.flatnonzero(prompt + output <= self.max_total)[:missing]
            kept.append((prompt[fits], output[fits]))
            missing -= len(fits)
        prompts, outputs = zip(*kept, strict=True)
        return np.concatenate(prompts), np.concatenate(outputs)


def restricted(distribution: LengthDistribution, max_total: int) -> LengthDistribution:
    """Return `distribution` given that prompt plus output is at most `max_total`.

    A file loses the rows that are longer. From others, pairs are drawn until one fits; their means are then those of
    131,072 draws.

    Raises:
        ConfigError: If no row of a file fits, or fewer than one pair in a thousand of another distribution.
    """
    if max_total >= distribution.max_total:
        return distribution
    if isinstance(distribution, FileLengths):
        return distribution.restricted(max_total)
    prompt, output = distribution.sample(np.random.default_rng(0), _PROBE_DRAWS)
    total = prompt + output
    fits = total <= max_total
    share = float(fits.mean())
    if share < _LEAST_SHARE:
        raise ConfigError(
            f"fewer than one request in a thousand of {distribution.name!r} has at most {max_total} tokens "
            f"(prompt + output); one in a hundred has at most {math.ceil(np.quantile(total, 0.01))}"
        )
    return _RejectionLengths(
        base=distribution,
        max_total=max_total,
        share=share,
        mean_prompt=float(prompt[fits].mean()),
        mean_output=float(output[fits].mean()),
    )
