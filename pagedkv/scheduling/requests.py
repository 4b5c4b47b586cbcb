"""The requests that a scheduler knows, as records."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int64Array
from pagedkv.jit import fixed_types, lean_jit
from pagedkv.scheduling.content import NO_SEGMENTS, SEGMENT, Contents, Segments

NO_ROW = -1


REQUEST = np.dtype(
    [
        ("prompt_tokens", "<i8"),
        ("output_tokens", "<i8"),
        ("num_known_tokens", "<i8"),
        ("num_computed_tokens", "<i8"),
        ("admission_slots", "<i8"),
        ("priority", "<i8"),
        ("num_cached_tokens", "<i8"),
        ("num_queried_tokens", "<i8"),
        ("num_hit_tokens", "<i8"),
        ("first_segment", "<i4"),
        ("num_segments", "<i4"),
        ("num_preemptions", "<i4"),
        ("row", "<i4"),
    ]
)
"""What is known of a request:

* prompt_tokens; output_tokens: tokens it will generate. A simulator knows them; schedulers use them only to see that it is done;
* num_known_tokens: prompt plus outputs so far; num_computed_tokens: those of them whose keys and values are in the cache;
* admission_slots: slots to take in one piece at admission: see `Allocator.admission_slots`;
* priority: under policy priority, the lower the more urgent;
* num_cached_tokens: tokens found in the prefix cache at its first admission, as vLLM reports it; num_queried_tokens,
  num_hit_tokens: known tokens at all its admissions, and those of them that were found;
* first_segment, num_segments: which of `RequestTable.segments` it shares with others; the rest of it is its own;
* num_preemptions; row: its row in the running batch, or NO_ROW.
"""

RequestArrays: TypeAlias = npt.NDArray[np.void]
"""`REQUEST`, by request index, in order of arrival."""


def _no_requests(capacity: int) -> RequestArrays:
    requests = np.zeros(capacity, REQUEST)
    requests["row"] = NO_ROW
    return requests


@fixed_types
@lean_jit
def _copy_segments(table: Segments, first: int, segments: Segments) -> None:
    """Copy `segments` to table[first:]: numpy, field by field, would look at their types for longer than that takes."""
    for i in range(segments.size):
        table[first + i] = segments[i]


class RequestTable:
    """All requests since the start. Adding one is O(1) on average; an index names one request for good, or until `keep`."""

    def __init__(self, *, capacity: int = 1024) -> None:
        self.arrays = _no_requests(capacity)
        self.size = 0
        self.segments: Segments = NO_SEGMENTS
        """What requests share, with room to grow."""
        self._num_segments = 0

    def add(
        self,
        *,
        prompt_tokens: int,
        output_tokens: int,
        admission_slots: int,
        priority: int = 0,
        content: Segments = NO_SEGMENTS,
        room: int = 0,
    ) -> int:
        """Append a request and return its index; what lies behind `content` is its own.

        There will be `room` for so many segments in all, if that is more than it has: see `add_segments`.
        """
        index = self.size
        if index == self.arrays.size:
            self.arrays = np.concatenate((self.arrays, _no_requests(index)))
        self.arrays["prompt_tokens"][index] = self.arrays["num_known_tokens"][index] = prompt_tokens
        self.arrays["output_tokens"][index] = output_tokens
        self.arrays["admission_slots"][index] = admission_slots
        self.arrays["priority"][index] = priority
        if content.size or room:
            self.arrays["first_segment"][index] = self._append(content, room)
            self.arrays["num_segments"][index] = content.size
        self.size = index + 1
        return index

    def fork(self, parent: int, content: Segments, room: int) -> int:
        """Append a request that knows as many tokens as `parent`, of the same prompt, and return its index. See `add`."""
        old = self.arrays[parent]
        child = self.add(
            prompt_tokens=int(old["prompt_tokens"]),
            output_tokens=int(old["output_tokens"]),
            admission_slots=int(old["admission_slots"]),
            priority=int(old["priority"]),
            content=content,
            room=room,
        )
        self.arrays["num_known_tokens"][child] = self.arrays["num_known_tokens"][parent]
        return child

    def add_segments(self, request: int, segments: Segments) -> None:
        """Let `request` go on through `segments`, for which it has room: what was its own is found by others from now on."""
        first = int(self.arrays["first_segment"][request]) + int(self.arrays["num_segments"][request])
        _copy_segments(self.segments, first, segments)
        self.arrays["num_segments"][request] += segments.size

    def extend(
        self,
        prompt_tokens: Int64Array,
        output_tokens: Int64Array,
        admission_slots: Int64Array,
        contents: Contents | None = None,
    ) -> None:
        """Append many requests: see `add`."""
        first, last = self.size, self.size + prompt_tokens.size
        if last > self.arrays.size:
            grown = _no_requests(last)  # no more than that: these are most of what a run of a million requests needs
            grown[:first] = self.arrays[:first]
            self.arrays = grown
        arrays = self.arrays
        arrays["prompt_tokens"][first:last] = arrays["num_known_tokens"][first:last] = prompt_tokens
        arrays["output_tokens"][first:last] = output_tokens
        arrays["admission_slots"][first:last] = admission_slots
        if contents is not None:
            arrays["first_segment"][first:last] = contents.first_segment + self._append(contents.segments)
            arrays["num_segments"][first:last] = contents.num_segments
        self.size = last

    def keep(self, kept: Int64Array, room: Int64Array) -> None:
        """Forget all requests but `kept`, ascending, which are numbered from 0 on now, with `room` for so many segments each."""
        old, segments = self.arrays[kept], self.segments
        self.arrays, self.size = _no_requests(max(1024, 2 * kept.size)), kept.size
        self.arrays[: kept.size] = old
        self.segments, self._num_segments = NO_SEGMENTS, 0
        for i, (first, number) in enumerate(zip(old["first_segment"].tolist(), old["num_segments"].tolist(), strict=True)):
            if number or room[i]:
                self.arrays["first_segment"][i] = self._append(segments[first : first + number], int(room[i]))

    def _append(self, segments: Segments, room: int = 0) -> int:
        first, last = self._num_segments, self._num_segments + max(segments.size, room)
        if last > self.segments.size:
            grown = np.empty(max(last, 2 * self.segments.size), SEGMENT)
            _copy_segments(grown, 0, self.segments)
            self.segments = grown
        _copy_segments(self.segments, first, np.ascontiguousarray(segments, SEGMENT))
        self._num_segments = last
        return first
