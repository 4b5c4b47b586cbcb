"""Token ids for requests that are made of streams, for caches that compare tokens."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.scheduling.content import Segments, segment_of, stream_of
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.token_source import write_tokens

_STRIDE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no two positions of a stream, and no two second words, come to the same."""


class StreamTokens(NamedTuple):
    """Tokens of a request that goes through segments[first:last] and is alone behind them."""

    segments: Segments
    first: int
    last: int
    request: int


@lean_jit
def stream_tokens_of(requests: RequestArrays, segments: Segments, request: int) -> StreamTokens:
    """Return where the tokens of `request` come from."""
    first = int(requests["first_segment"][request])
    return StreamTokens(segments, first, first + int(requests["num_segments"][request]), request)


@write_tokens.register(StreamTokens)
@lean_jit
def _write_stream_tokens(source: StreamTokens, first: int, last: int, tokens: Int32Array) -> None:
    place = segment_of(source.segments, source.first, source.last, first + 1)
    at = first
    while at < last:
        end = last if place == source.last else min(last, source.segments["end_token"][place])
        word_a, word_b = stream_of(source.segments, place, source.last, source.request)
        number = word_a + word_b * _STRIDE + np.uint64(at) * _STRIDE
        for i in range(at - first, end - first):
            tokens[i] = np.int32(number >> np.uint64(33))
            number += _STRIDE
        at = max(at, end)
        place += 1


_write_all = fixed_types(_write_stream_tokens)


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
    tokens = np.empty(num_tokens, np.int32)
    _write_all(StreamTokens(np.ascontiguousarray(segments), 0, segments.size, int(request)), 0, num_tokens, tokens)
    return tokens
