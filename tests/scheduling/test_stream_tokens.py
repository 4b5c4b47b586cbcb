"""Token ids that follow from a request's streams are alike exactly where the streams are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.scheduling.content import NO_SEGMENTS, keyed_segments, shared_segments
from pagedkv.scheduling.stream_tokens import token_ids


@given(ends=st.lists(st.integers(1, 20), max_size=4), num_tokens=st.integers(1, 60), requests=st.tuples(*[st.integers(0, 5)] * 2))
def test_tokens_are_alike_as_far_as_requests_share(ends: list[int], num_tokens: int, requests: tuple[int, int]) -> None:
    """Synthetic ids agree exactly where content does, also where the number of a request is that of a stream."""
    shared = shared_segments(np.arange(len(ends)), np.cumsum(ends, dtype=np.int64)) if ends else NO_SEGMENTS
    one, other = (token_ids(shared, request, num_tokens) for request in requests)
    alike = num_tokens if requests[0] == requests[1] else min(sum(ends), num_tokens)
    assert (one == other).sum() == alike == (one[:alike] == other[:alike]).sum()
    assert (one >= 0).all()


def test_keyed_blocks_are_alike_where_their_keys_are() -> None:
    keys = np.arange(8, dtype=np.uint64).reshape(4, 2) * np.uint64(0x123456789ABCDEF)
    other = keys.copy()
    other[2] += np.uint64(1)
    a, b = (token_ids(keyed_segments(each, 4), 0, 16) for each in (keys, other))
    assert (a == b).tolist() == [True] * 8 + [False] * 4 + [True] * 4
