"""What requests are made of: streams of tokens that their prompts go through, and the keys of blocks that follow from these.

A *stream* is a text from its first token on: at a given position, all requests in one stream have the same tokens before it. A
request goes through segments of streams, e.g. a system prompt, then a conversation that continues it, and behind them through a
stream of its own. So a full block is known by the stream of its last token and by its index; nothing is hashed or kept per block.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import ConfigError
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.splitmix import mixed, mixed_one

SEGMENT = np.dtype([("word_a", "<u8"), ("word_b", "<u8"), ("end_token", "<i8")])
"""A part of a request:

* word_a, word_b: its stream. The key of block i in it is (word_a + i, word_b): within one word_b all keys differ;
* end_token: where it ends, tokens from the start of the request.
"""

Segments: TypeAlias = npt.NDArray[np.void]
"""`SEGMENT`, ends ascending."""

NO_SEGMENTS: Segments = np.zeros(0, SEGMENT)
_SHARED = 1 << 63
"""Set in word_b of streams that requests share; a request's own has its index there."""


class Contents(NamedTuple):
    """What several requests are made of; they may share segments."""

    segments: Segments
    first_segment: Int64Array
    """By request: where its segments begin."""
    num_segments: Int64Array
    """By request: how many it has."""

    def of(self, request: int) -> Segments:
        """Return the segments of one of them, a view."""
        first = self.first_segment[request]
        return self.segments[first : first + self.num_segments[request]]


def shared_segments(streams: Int64Array, end_tokens: Int64Array) -> Segments:
    """Return segments of the streams of these numbers, 0 or more.

    A number stands for all that comes before it as well: it must have followed the same segments in every request.

    Example:
        >>> system_prompt_then_chat = shared_segments(np.array([7, 42]), np.array([1000, 1300]))
        >>> system_prompt_then_chat["end_token"].tolist()
        [1000, 1300]
    """
    segments = np.zeros(len(streams), SEGMENT)
    words = streams.astype(np.uint64)
    segments["word_a"], segments["word_b"] = mixed(words), words | np.uint64(_SHARED)
    segments["end_token"] = end_tokens
    return segments


def keyed_segments(keys: BlockKeys, block_size: int) -> Segments:
    """Return segments of one block each that have these keys, as good as 128 random bits each, told apart by their places too."""
    segments = np.empty(len(keys), SEGMENT)
    _fill_keyed(segments, np.ascontiguousarray(keys, np.uint64), int(block_size))
    return segments


@fixed_types
@lean_jit
def _fill_keyed(segments: Segments, keys: BlockKeys, block_size: int) -> None:
    for i in range(len(keys)):
        segments["word_a"][i], segments["word_b"][i] = keys[i, 0], keys[i, 1]
        segments["end_token"][i] = (i + 1) * block_size


def check_segments(segments: Segments) -> None:
    """Refuse segments that are empty or out of order.

    Raises:
        ConfigError: If their ends do not ascend from 1 on.
    """
    if segments.size and (np.diff(segments["end_token"], prepend=0) < 1).any():
        raise ConfigError(f"the segments of a request end at tokens {segments['end_token'].tolist()}: each must have 1 or more")


@lean_jit
def segment_of(segments: Segments, first: int, last: int, end_token: int) -> int:
    """Return which of segments[first:last] the token before `end_token` lies in; `last` behind them. O(log segments)."""
    if first == last or segments["end_token"][last - 1] < end_token:
        return last
    while first < last - 1:
        middle = (first + last - 1) // 2
        if segments["end_token"][middle] < end_token:
            first = middle + 1
        else:
            last = middle + 1
    return first


@lean_jit
def stream_of(segments: Segments, place: int, last: int, request: int) -> tuple[np.uint64, np.uint64]:
    """Return the words of segments[place]; of the request's own stream if that is `last`, behind its segments."""
    if place < last:
        return segments["word_a"][place], segments["word_b"][place]
    return mixed_one(np.uint64(request)), np.uint64(request)


def content_of(
    content: Segments | None, keys: BlockKeys | None, *, num_tokens: int, block_size: int, caches_prefixes: bool
) -> Segments:
    """Return what a request of `num_tokens` shares, given in one of two ways; nothing where no prefix is cached.

    Raises:
        ConfigError: If both are given, segments are out of order, or keys are too few or of no use.
    """
    if keys is None:
        if content is None or not caches_prefixes:
            return NO_SEGMENTS
        check_segments(content)
        return content
    if content is not None:
        raise ConfigError("block keys and content: give one of them")
    if not caches_prefixes:
        raise ConfigError("block keys, but prefix caching is off: set enable_prefix_caching, or give none")
    if len(keys) < (full := (num_tokens - 1) // block_size):
        raise ConfigError(f"{len(keys)} block keys for {full} blocks that {num_tokens} tokens fill")
    return keyed_segments(keys, block_size)
