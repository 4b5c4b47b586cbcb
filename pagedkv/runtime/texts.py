"""Requests as an engine knows them, by their tokens, and what comes out."""

from dataclasses import dataclass
from typing import NamedTuple

from pagedkv.block_hash import BlockHashChain
from pagedkv.runtime.sampling import Sampler

STOP, LENGTH = "stop", "length"
"""Why a text ended: at a token that ends it, or with as many tokens as were asked for."""


class NewToken(NamedTuple):
    """What a step gave one request."""

    request: int
    """Its number, as `LLMEngine.add_request` returned it."""
    token: int
    """The token id."""
    finish_reason: str | None
    """STOP or LENGTH if it is the last one."""


class Generation(NamedTuple):
    """A text that is done."""

    tokens: list[int]
    """New token ids, the one that ended it included."""
    finish_reason: str
    """STOP or LENGTH."""


@dataclass(slots=True)
class Text:
    """A request: the scheduler knows no more than its lengths and keys."""

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

    def cut(self, tokens: list[int]) -> list[int]:
        """Return what of its next `tokens` it takes: up to one that ends it, or to the most that it may have."""
        room = self.last_at - self.chain.num_tokens
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: min(end, room)]
