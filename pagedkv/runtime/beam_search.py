"""Beam search: which continuations of a prompt are kept, by the rules of transformers' own.

Source: `GenerationMixin._beam_search` of transformers 5.24, whose texts and scores the tests compare.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pagedkv.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    """How beams are searched."""

    width: int
    """Beams that are kept."""
    length_penalty: float = 1.0
    """A text's score is the sum of its log-probabilities / tokens ** length_penalty: above 0, longer texts are not at a loss."""
    early_stopping: bool = False
    """End as soon as there are `width` texts that have ended; else when none that goes on is likely to become better."""

    def __post_init__(self) -> None:
        """Refuse what is no search.

        Raises:
            ConfigError: With the values that would work.
        """
        if self.width < 2:
            raise ConfigError(f"beam-width is {self.width}: needs 2 or more; one beam is the greedy text")


class Hypothesis(NamedTuple):
    """A text that has ended."""

    score: float
    """By which it is chosen: see `BeamParams.length_penalty`."""
    tokens: list[int]
    """New token ids."""


@dataclass(slots=True, kw_only=True)
class BeamSearch:
    """The beams of one prompt. It knows scores and tokens; where their keys lie, an engine does."""

    params: BeamParams
    ends: frozenset[int]
    """Tokens that end a text."""
    max_tokens: int
    """Most new tokens of a text."""
    members: list[int] = field(default_factory=list)
    """By beam: the request that computes it; one before the first tokens are chosen."""
    texts: list[list[int]] = field(default_factory=lambda: [[]])
    """By beam: its new tokens."""
    finished: list[Hypothesis] = field(default_factory=list)
    """Texts that have ended, the best first, `width` at most."""
    _scores: torch.Tensor | None = None
    """By beam: the sum of its log-probabilities."""

    @property
    def num_candidates(self) -> int:
        """Continuations that are looked at in each step: enough to go on, though some end."""
        return max(2, 1 + len(self.ends)) * self.params.width

    def advance(self, logits: torch.Tensor) -> list[int] | None:
        """Choose the next token of each beam; return by beam which of the beams before it continues, None if all is over.

        Args:
            logits: By beam: what follows it [beams, vocabulary].
        """
        width, length = self.params.width, len(self.texts[0]) + 1
        sums = logits.float().log_softmax(-1)
        if self._scores is not None:
            sums = sums + self._scores[:, None]
        best, places = sums.flatten().topk(self.num_candidates)
        parents, tokens = (places // logits.shape[-1]).tolist(), (places % logits.shape[-1]).tolist()
        last = length == self.max_tokens
        over = [last or token in self.ends for token in tokens]
        self._finish(best[:width].tolist(), parents, tokens, over, length)
        goes_on = [k for k, ends in enumerate(over) if not ends][:width]
        if not goes_on or self._is_settled(float(best[goes_on[0]]), length):
            return None
        self.texts = [[*self.texts[parents[k]], tokens[k]] for k in goes_on]
        self._scores = best[goes_on]
        return [parents[k] for k in goes_on]

    def _finish(self, scores: Sequence[float], parents: list[int], tokens: list[int], over: list[bool], length: int) -> None:
        """Keep those of the best continuations that end, if they are among the best texts that have."""
        if self.params.early_stopping and len(self.finished) == self.params.width:
            return
        for score, parent, token, ends in zip(scores, parents, tokens, over, strict=False):
            if ends:
                self.finished.append(Hypothesis(score / length**self.params.length_penalty, [*self.texts[parent], token]))
        self.finished.sort(key=lambda each: -each.score)
        del self.finished[self.params.width :]

    def _is_settled(self, best: float, length: int) -> bool:
        """Return whether no beam, the best of them with the score `best`, is likely to beat a text that has ended."""
        if len(self.finished) < self.params.width:
            return False
        return self.params.early_stopping or best / length**self.params.length_penalty <= self.finished[-1].score


def held_beams(searches: Sequence[BeamSearch | None]) -> list[bool]:
    """Return by entry whether it is a beam that is held: others of its search, which go on together, are not there.

    Args:
        searches: By entry whose known tokens are all computed: the search that it is a beam of, None if it is no beam.
    """
    there = Counter(id(search) for search in searches)
    return [search is not None and there[id(search)] < len(search.members) for search in searches]
