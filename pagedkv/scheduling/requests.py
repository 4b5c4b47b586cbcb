"""The requests that a scheduler knows, as columns."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array, joined

NO_ROW = -1


class RequestArrays(NamedTuple):
    """One entry per request, by request index, in order of arrival."""

    row: Int32Array
    """Its row in the running batch, or NO_ROW."""
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    """Tokens it will generate. A simulator knows them; schedulers use them only to see that a request is done."""
    num_known_tokens: Int64Array
    """Prompt plus outputs so far."""
    num_computed_tokens: Int64Array
    """Known tokens whose keys and values are in the cache."""
    admission_slots: Int64Array
    """Slots to take in one piece at admission: see `Allocator.admission_slots`."""
    num_preemptions: Int64Array

    @classmethod
    def empty(cls, capacity: int) -> "RequestArrays":
        """Return columns for `capacity` requests."""
        columns = [np.zeros(capacity, np.int64) for _ in range(6)]
        return cls(np.full(capacity, NO_ROW, np.int32), *columns)


class RequestTable:
    """All requests since the start. Adding one is O(1) on average; an index names one request for good."""

    def __init__(self, *, capacity: int = 1024) -> None:
        self.arrays = RequestArrays.empty(capacity)
        self.size = 0

    def add(self, *, prompt_tokens: int, output_tokens: int, admission_slots: int) -> int:
        """Append a request and return its index."""
        index = self.size
        if index == self.arrays.row.size:
            self.arrays = joined(self.arrays, RequestArrays.empty(index))
        self.arrays.prompt_tokens[index] = self.arrays.num_known_tokens[index] = prompt_tokens
        self.arrays.output_tokens[index] = output_tokens
        self.arrays.admission_slots[index] = admission_slots
        self.size = index + 1
        return index
