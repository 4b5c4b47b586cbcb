"""Which drafted tokens a target model accepts, and what follows them: its own distribution, whoever drafted.

Greedily a draft is accepted if the target would have said the same. Else draft x is accepted with chance min(1, p(x) / q(x)), p
being the target's distribution and q that of the draft model; behind the first that is not, a token is drawn from max(p - q, 0),
and behind the last of all from p. So each token is distributed by p. Source: Leviathan et al., Fast Inference from Transformers via
Speculative Decoding, ICML 2023, algorithm 1 and appendix A.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pagedkv.runtime.sampling import Sampler, distributions, sample


@dataclass(slots=True)
class Drafts:
    """What a draft model proposes for one sequence."""

    tokens: list[int] = field(default_factory=list)
    """Token ids, one behind the other."""
    logits: list[torch.Tensor] = field(default_factory=list)
    """By token: the logits [vocabulary] that it was drawn by; none where the sequence is greedy."""


def verify(logits: torch.Tensor, drafts: Sequence[Drafts], samplers: Sequence[Sampler]) -> list[list[int]]:
    """Return by sequence its next tokens: the drafts that are accepted, and one more.

    Args:
        logits: The target's, sequence after sequence: those behind its last known token, then behind each draft
            [sequences + drafts, vocabulary].
        drafts: By sequence; one without any gets a token as `sample` draws it.
        samplers: By sequence.
    """
    starts, place = [], 0
    for each in drafts:
        starts.append(place)
        place += len(each.tokens) + 1
    best: list[int] = logits.argmax(-1).tolist()
    texts: list[list[int]] = [[] for _ in drafts]
    plain = [i for i, each in enumerate(drafts) if not each.tokens]
    drawn = [i for i, each in enumerate(drafts) if each.tokens and samplers[i].params.temperature]
    for i, token in zip(plain, sample(logits[[starts[i] for i in plain]], [samplers[i] for i in plain]), strict=True):
        texts[i] = [token]
    for i, each in enumerate(drafts):
        if each.tokens and not samplers[i].params.temperature:
            wanted = best[starts[i] : starts[i] + len(each.tokens) + 1]
            accepted = next((k for k, token in enumerate(each.tokens) if token != wanted[k]), len(each.tokens))
            texts[i] = wanted[: accepted + 1]
    for i in drawn:
        rows = logits[starts[i] : starts[i] + len(drafts[i].tokens) + 1]
        texts[i] = _verify_drawn(rows, drafts[i], samplers[i])
    return texts


def acceptance(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Return the chance of each token, if it is drafted, to be accepted: min(1, p / q); 0 where it is never drafted."""
    return torch.where(draft > 0, (target / draft).clamp(max=1.0), 0.0)


def residual(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Return the distribution of the token in place of a draft that is not accepted: max(p - q, 0), made to sum to 1."""
    rest = (target - draft).clamp(min=0.0)
    total = rest.sum(-1, keepdim=True)
    # Nothing is left where p and q are the same: then every draft is accepted, but for rounding.
    return torch.where(total > 0, rest / total, target)


def _verify_drawn(logits: torch.Tensor, drafts: Drafts, sampler: Sampler) -> list[int]:
    """Return the next tokens of one sequence, by its random numbers."""
    number = len(drafts.tokens)
    target = distributions(logits, [sampler] * (number + 1))
    draft = distributions(torch.stack(drafts.logits), [sampler] * number)
    chances = acceptance(target[:-1], draft).gather(-1, torch.tensor(drafts.tokens, device=logits.device)[:, None])[:, 0].tolist()
    accepted = next((k for k, chance in enumerate(chances) if sampler.uniform() >= chance), number)
    last = target[number] if accepted == number else residual(target[accepted], draft[accepted])
    return [*drafts.tokens[:accepted], _drawn_from(last, sampler)]


def _drawn_from(probabilities: torch.Tensor, sampler: Sampler) -> int:
    """Return a token: where the running sum of `probabilities` [vocabulary] passes the next random number."""
    sums = probabilities.cumsum(-1)
    place = int(torch.searchsorted(sums, sampler.uniform() * sums[-1], right=True))
    return min(place, int(probabilities.nonzero()[-1]))
