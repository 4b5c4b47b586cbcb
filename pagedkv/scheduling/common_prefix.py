"""How many tokens two requests begin with alike, told from the streams that they are made of."""

from pagedkv.jit import lean_jit
from pagedkv.scheduling.content import Segments, stream_of
from pagedkv.scheduling.requests import RequestArrays


@lean_jit
def common_tokens(requests: RequestArrays, segments: Segments, one: int, other: int, most: int) -> int:
    """Return how many of the first `most` tokens of requests `one` and `other` are the same. O(their segments).

    They are, as far as both lie in the same stream at each position: `pagedkv.scheduling.stream_tokens` has the ids for it.
    """
    place, last = int(requests["first_segment"][one]), int(requests["first_segment"][one] + requests["num_segments"][one])
    place_2, last_2 = int(requests["first_segment"][other]), int(requests["first_segment"][other] + requests["num_segments"][other])
    alike = 0
    while alike < most:
        while place < last and segments["end_token"][place] <= alike:
            place += 1
        while place_2 < last_2 and segments["end_token"][place_2] <= alike:
            place_2 += 1
        word_a, word_b = stream_of(segments, place, last, one)
        word_a2, word_b2 = stream_of(segments, place_2, last_2, other)
        if word_a != word_a2 or word_b != word_b2:
            return alike
        alike = most
        if place < last:
            alike = min(alike, int(segments["end_token"][place]))
        if place_2 < last_2:
            alike = min(alike, int(segments["end_token"][place_2]))
    return int(most)
