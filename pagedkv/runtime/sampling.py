"""How the next token is drawn: greedily, or by chance that a seed fixes, request by request."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagedkv.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn from the model's distribution: first temperature, then top_k, then top_p."""

    temperature: float = 0.0
    """Logits are divided by it; 0: always the likeliest token."""
    top_k: int = 0
    """Only the likeliest so many tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    seed: int = 0
    """Same seed, same tokens, whoever else is in the batch and however often the request is preempted."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution.

        Raises:
            ConfigError: With the values that would work.
        """
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}: needs 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}: needs 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}: needs more than 0, and 1 at most")


GREEDY = SamplingParams()
"""The likeliest token."""


class Sampler:
    """Draws the tokens of one request, one uniform number each."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        # On the CPU, so that a seed means the same on every device; none where nothing is drawn.
        self._dice = torch.Generator().manual_seed(params.seed) if params.temperature else None

    def uniform(self) -> float:
        """Return the next number in [0, 1); 0 if nothing is drawn."""
        return 0.0 if self._dice is None else float(torch.rand((), generator=self._dice, dtype=torch.float64))


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Return the next token for each row of `logits` [rows, vocabulary], drawn as its sampler says. O(rows * vocabulary)."""
    tokens: list[int] = logits.argmax(-1).tolist() if samplers else []
    drawn = [i for i, sampler in enumerate(samplers) if sampler.params.temperature]
    if drawn:
        for i, token in zip(drawn, _drawn(logits[drawn], [samplers[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens


def distributions(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Return for each row the probabilities that `sample` draws by [rows, vocabulary], float64; no sampler may be greedy.

    O(rows * vocabulary * log vocabulary).
    """
    shares, order = _ranked(logits, samplers)
    return torch.zeros_like(shares).scatter_(-1, order, shares / shares.sum(-1, keepdim=True))


def _drawn(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Return a token by row: where the sums of the kept probabilities, the likeliest first, pass its uniform number."""
    shares, order = _ranked(logits, samplers)
    sums = shares.cumsum(-1)
    uniform = torch.tensor([sampler.uniform() for sampler in samplers], dtype=torch.float64, device=logits.device)
    place = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    tokens: list[int] = order.gather(-1, place.clamp(max=logits.shape[-1] - 1))[:, 0].tolist()
    return tokens


def _ranked(logits: torch.Tensor, samplers: Sequence[Sampler]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities, the likeliest first and 0 where not kept, and which tokens these are, both [rows, vocabulary]."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    vocabulary = logits.shape[-1]
    temperature = column([sampler.params.temperature for sampler in samplers])
    most = column([float(sampler.params.top_k or vocabulary) for sampler in samplers])
    enough = column([sampler.params.top_p for sampler in samplers])
    below_best = logits.double() - logits.double().amax(-1, keepdim=True)  # however cold, the best stays 0, and not infinite
    ranked, order = (below_best / temperature).sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(torch.arange(vocabulary, device=logits.device) >= most, -torch.inf)
    shares = ranked.softmax(-1)
    before = shares.cumsum(-1) - shares
    return shares.masked_fill(before >= enough, 0.0), order
