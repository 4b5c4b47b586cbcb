"""Requests as an engine knows them, by their tokens, and what comes out."""

from dataclasses import dataclass, field
from typing import NamedTuple

from pagedkv.block_hash import BlockHashChain
from pagedkv.runtime.beam_search import BeamSearch
from pagedkv.runtime.sampling import Sampler

STOP, LENGTH = "stop", "length"
"""Why a text ended: at a token that ends it, or with as many tokens as were asked for."""


class NewToken(NamedTuple):
    """What a step gave one text."""

    request: int
    """Its number, as `LLMEngine.add_request` returned it."""
    token: int
    """The token id."""
    finish_reason: str | None
    """STOP or LENGTH if it is the last one of its text."""
    text: int = 0
    """Which of the request's texts, from 0 on."""
    score: float | None = None
    """With a beam's last token: the score of its text."""


class Generation(NamedTuple):
    """A text that is done."""

    tokens: list[int]
    """New token ids, the one that ended it included."""
    finish_reason: str
    """STOP or LENGTH."""
    score: float | None = None
    """Of a beam: see `BeamParams.length_penalty`."""


@dataclass(slots=True, kw_only=True)
class Text:
    """One text that is being generated, as a request of the scheduler, which knows no more than its lengths and keys."""

    owner: int
    """The request that it belongs to, by the number that its user knows."""
    place: int = 0
    """Which of the owner's texts it is."""
    chain: BlockHashChain
    """Its tokens, and the keys of the blocks that they fill."""
    prompt_tokens: int
    """Tokens of the prompt."""
    last_at: int
    """Most tokens, prompt included."""
    ends: frozenset[int]
    """Tokens that end it."""
    sampler: Sampler
    """Draws its tokens."""
    draft_lag: int = 0
    """Tokens that the target has computed and the draft model has not: 1 when all drafts of the last step were accepted, else 0."""
    siblings: dict[int, Sampler] = field(default_factory=dict)
    """By place: what draws the further texts of the same prompt, which fork from this one when the prompt is computed."""
    search: BeamSearch | None = None
    """It is a beam of this search, shared with the others; None: it is no beam."""
    num_results: int = 1
    """Texts that are told when the search is over, the best first."""

    def become_sibling(self) -> None:
        """Be the first of the further texts instead, of which there is one: nothing of this one has been generated."""
        self.place = min(self.siblings)
        self.sampler = self.siblings.pop(self.place)

    def cut(self, tokens: list[int]) -> list[int]:
        """Return what of its next `tokens` it takes: up to one that ends it, or to the most that it may have."""
        room = self.last_at - self.chain.num_tokens
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: min(end, room)]

    def reason(self, token: int, num_tokens: int) -> str | None:
        """Return why it ends with `token` as its last of `num_tokens`, prompt included; None if it goes on."""
        return STOP if token in self.ends else LENGTH if num_tokens == self.last_at else None
