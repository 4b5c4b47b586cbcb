"""A request as SGLang's scheduling rules see it."""

from collections.abc import Hashable
from dataclasses import dataclass

from pagedkv.arrays import Int32Array

MAX_NEW_TOKENS_COUNTED = 4096
"""Of a request's future output, admission looks at no more than this. Source: SGLang 0.5.23 (CLIP_MAX_NEW_TOKENS)."""


@dataclass(slots=True, eq=False, kw_only=True)
class SGLangRequest:
    """One request. Its scheduler keeps `num_output_tokens` true whenever it waits or is looked at; policies only read."""

    index: int
    """Its number in the request table."""
    name: str
    """Breaks ties under hrrn, as text."""
    tokens: Int32Array
    """Prompt and outputs, at least those known so far."""
    num_prompt_tokens: int
    num_output_tokens: int = 0
    """Generated so far."""
    max_new_tokens: int
    """Most that it may generate: what admission counts with, not what will come."""
    ignore_eos: bool = False
    """It generates all of them, whatever comes."""
    namespace: Hashable = None
    """Requests of different namespaces share nothing: SGLang's extra_key."""
    routing_key: str = ""
    """What groups requests under routing-key; empty: nothing."""
    priority: int = 0
    """Of what it leaves in the cache, for eviction by priority."""
    arrival: int = 0
    """Its place in the order in which requests joined the queue."""
    prefilled_before: int = 0
    """Prompt tokens that the engine had computed, for anybody, when it joined the queue."""
    num_matched_tokens: int = 0
    """Of its tokens but the last, those that the cache had when the queue was last sorted by it."""

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def known_tokens(self) -> Int32Array:
        """Prompt and outputs so far, a view."""
        return self.tokens[: self.num_tokens]

    @property
    def num_uncached_tokens(self) -> int:
        """What a prefill would compute, 1 at least: the last token always is."""
        return max(1, self.num_tokens - self.num_matched_tokens)
