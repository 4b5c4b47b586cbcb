"""Token ids for requests that are made of streams, for caches that compare tokens."""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.scheduling.content import Segments, stream_of

_WORD = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that no two positions of a stream, and no two second words, come to the same."""


def token_ids(segments: Segments, request: int, num_tokens: int) -> Int32Array:
    """Return ids for the first `num_tokens` tokens of a request that shares `segments` and is alone behind them. O(tokens).

    Tokens at one position of one stream are the same; of two streams they differ, but for one in 2**30.

    Example:
        >>> from pagedkv.scheduling.content import shared_segments
        >>> system_prompt = shared_segments(np.array([7]), np.array([2]))
        >>> one, other = token_ids(system_prompt, 0, 4), token_ids(system_prompt, 1, 3)
        >>> (one[:3] == other).tolist()
        [True, True, False]
    """
    tokens, first = np.empty(num_tokens, np.int32), 0
    for i in range(segments.size + 1):
        last = num_tokens if i == segments.size else min(int(segments["end_token"][i]), num_tokens)
        if last > first:
            word_a, word_b = stream_of(segments, i, segments.size, request)
            begin = np.uint64((int(word_a) + int(word_b) * _STRIDE) & _WORD)
            tokens[first:last] = (begin + np.arange(first, last, dtype=np.uint64) * np.uint64(_STRIDE)) >> np.uint64(33)
            first = last
    return tokens
