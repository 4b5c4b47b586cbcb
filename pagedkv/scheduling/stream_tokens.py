"""Token ids for requests that are made of streams, for caches that compare tokens."""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.scheduling.content import Segments


class StreamTokens:
    """Numbers streams: every token of a stream is its number, so that two requests agree up to where their streams part.

    Example:
        >>> from pagedkv.scheduling.content import NO_SEGMENTS, shared_segments
        >>> tokens, system_prompt = StreamTokens(), shared_segments(np.array([7]), np.array([2]))
        >>> tokens.of(system_prompt, 3).tolist(), tokens.of(system_prompt, 4).tolist(), tokens.of(NO_SEGMENTS, 2).tolist()
        ([0, 0, 1], [0, 0, 2, 2], [3, 3])
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._next = 0

    def of(self, segments: Segments, num_tokens: int) -> Int32Array:
        """Return the first `num_tokens` tokens of a request; what lies behind `segments` is its own. O(num_tokens)."""
        tokens: Int32Array = np.empty(num_tokens, np.int32)
        start = 0
        for word_a, word_b, end in segments.tolist():
            number = self._numbers.setdefault((word_a, word_b), self._next)
            self._next += number == self._next
            tokens[start:end] = number
            start = end
            if start >= num_tokens:
                return tokens
        tokens[start:] = self._next
        self._next += 1
        return tokens
