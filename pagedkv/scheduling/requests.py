"""The requests that a scheduler knows, as columns."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array, joined
from pagedkv.block_hash import BlockKeys

NO_ROW = -1
NO_KEYS = -1


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
    priority: Int64Array
    """Under policy priority: the lower, the more urgent."""
    first_key: Int64Array
    """Where the keys of its blocks begin in `RequestTable.keys`, or NO_KEYS: then it shares nothing."""
    num_cached_tokens: Int64Array
    """Tokens found in the prefix cache at its last admission."""
    num_queried_tokens: Int64Array
    """Known tokens at its admissions, summed up."""
    num_hit_tokens: Int64Array
    """Those of them found in the prefix cache."""

    @classmethod
    def empty(cls, capacity: int) -> "RequestArrays":
        """Return columns for `capacity` requests."""
        columns = [np.zeros(capacity, np.int64) for _ in range(11)]
        return cls(np.full(capacity, NO_ROW, np.int32), *columns)


class RequestTable:
    """All requests since the start. Adding one is O(1) on average; an index names one request for good."""

    def __init__(self, *, capacity: int = 1024) -> None:
        self.arrays = RequestArrays.empty(capacity)
        self.size = 0
        self.keys: BlockKeys = np.zeros((0, 2), np.uint64)
        """Keys of the blocks of all requests that have some."""
        self._num_keys = 0

    def add(
        self, *, prompt_tokens: int, output_tokens: int, admission_slots: int, priority: int = 0, keys: BlockKeys | None = None
    ) -> int:
        """Append a request and return its index. `keys` are those of all its blocks that will ever be full, outputs included."""
        index = self.size
        if index == self.arrays.row.size:
            self.arrays = joined(self.arrays, RequestArrays.empty(index))
        self.arrays.prompt_tokens[index] = self.arrays.num_known_tokens[index] = prompt_tokens
        self.arrays.output_tokens[index] = output_tokens
        self.arrays.admission_slots[index] = admission_slots
        self.arrays.priority[index] = priority
        self.arrays.first_key[index] = NO_KEYS if keys is None else self._append_keys(keys)
        self.size = index + 1
        return index

    def _append_keys(self, keys: BlockKeys) -> int:
        first, last = self._num_keys, self._num_keys + len(keys)
        if last > len(self.keys):
            grown = np.zeros((max(last, 2 * len(self.keys), 1024), 2), np.uint64)
            grown[:first] = self.keys[:first]
            self.keys = grown
        self.keys[first:last] = keys
        self._num_keys = last
        return first
