"""Token ids for requests that are made of streams, for caches that compare tokens."""

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.scheduling.content import Segments, stream_of

_STRIDE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no two positions of a stream, and no two second words, come to the same."""


@lean_jit
def write_tokens(segments: Segments, first: int, last: int, request: int, num_tokens: int, out: Int32Array) -> None:
    """Write ids of the first `num_tokens` tokens of a request that shares segments[first:last] to `out`. O(tokens)."""
    done = 0
    for place in range(first, last + 1):
        end = num_tokens
        if place < last:
            end = min(segments["end_token"][place], num_tokens)
        if end > done:
            word_a, word_b = stream_of(segments, place, last, request)
            word = word_a + (word_b + np.uint64(done)) * _STRIDE
            for i in range(done, end):
                out[i] = word >> np.uint64(33)
                word += _STRIDE
            done = end


_write_tokens = fixed_types(write_tokens)


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
    tokens: Int32Array = np.empty(num_tokens, np.int32)
    _write_tokens(np.ascontiguousarray(segments), 0, segments.size, request, num_tokens, tokens)
    return tokens
