"""Texts for a model that is not there: how many tokens a text has, and words for tokens that nobody computes."""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int64Array

CHARACTERS_PER_TOKEN = 4
"""Of English text. Source: OpenAI, "What are tokens and how to count them?", help.openai.com/en/articles/4936856."""
_WORDS = tuple(
    f" {word}"
    for word in (
        "the and for you was not are but one all can has new now old see "
        "two way who did its let put say she too use day man our out own"
    ).split()
)
"""A token each: with its blank as long as a token is taken to be."""
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64)
"""Odd numbers without a pattern. Source: the multipliers of SplitMix64 and of rrmxmx."""
_TOKEN_BITS = 31


def _hashed(text: str) -> Int64Array:
    """Return an id for each four characters of `text`, the last fewer; a text that begins alike has ids that do. O(characters)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    padded = np.zeros(-(-codes.size // CHARACTERS_PER_TOKEN) * CHARACTERS_PER_TOKEN, np.uint64)
    padded[: codes.size] = codes + np.uint64(1)
    mixed = (padded.reshape(-1, CHARACTERS_PER_TOKEN) * _FACTORS).sum(1)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FACTORS[1]
    ids: Int64Array = (mixed >> np.uint64(64 - _TOKEN_BITS)).astype(np.int64)
    return ids


_WORD_IDS = np.concatenate([_hashed(word) for word in _WORDS])
_WORD_OF = dict(zip(_WORD_IDS.tolist(), _WORDS, strict=True))


def filler_tokens(prompt: Sequence[int], number: int) -> list[int]:
    """Return `number` tokens that follow `prompt`: the same prompt has the same answer, and a longer one begins alike."""
    rng = np.random.default_rng([len(prompt), *(int(token) & 0xFFFFFFFF for token in prompt[-8:])])
    return [int(token) for token in _WORD_IDS[rng.integers(len(_WORDS), size=number)]]


class FillerTokenizer:
    """Counts tokens without a tokenizer: one for every four characters of a prompt or message, the last begun.

    A chat has besides its contents a token for every four characters of `<|role|>` before each of them, and before the answer.
    Parts are counted one by one: an answer that comes back as history has the tokens that were generated, and is found in the
    prefix cache.

    Example:
        >>> rule = FillerTokenizer()
        >>> len(rule.encode("How many tokens?")), len(rule.encode_chat([("user", "How many tokens?")]))
        (4, 10)
        >>> rule.encode("How many tokens?")[:2] == rule.encode("How many more?")[:2]
        True
    """

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = _hashed(text).tolist()
        return ids

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins."""
        ids: list[int] = []
        for role, content in messages:
            ids += self.encode(f"<|{role}|>") + self.encode(content)
        return ids + self.encode("<|assistant|>")

    def decoder(self) -> "FillerDecoder":
        """Return a decoder."""
        return FillerDecoder()


class FillerDecoder:
    """Knows the words of filler tokens."""

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        """Return the words."""
        del last
        return "".join(_WORD_OF[token] for token in tokens)
