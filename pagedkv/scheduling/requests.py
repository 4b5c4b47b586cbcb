"""The requests that a scheduler knows, as records."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int64Array
from pagedkv.block_hash import BlockKeys

NO_ROW = -1
NO_KEYS = -1


REQUEST = np.dtype(
    [
        ("prompt_tokens", "<i8"),
        ("output_tokens", "<i8"),
        ("num_known_tokens", "<i8"),
        ("num_computed_tokens", "<i8"),
        ("admission_slots", "<i8"),
        ("priority", "<i8"),
        ("first_key", "<i8"),
        ("num_cached_tokens", "<i8"),
        ("num_queried_tokens", "<i8"),
        ("num_hit_tokens", "<i8"),
        ("num_preemptions", "<i4"),
        ("row", "<i4"),
    ]
)
"""What is known of a request:

* prompt_tokens; output_tokens: tokens it will generate. A simulator knows them; schedulers use them only to see that it is done;
* num_known_tokens: prompt plus outputs so far; num_computed_tokens: those of them whose keys and values are in the cache;
* admission_slots: slots to take in one piece at admission: see `Allocator.admission_slots`;
* priority: under policy priority, the lower the more urgent;
* first_key: where the keys of its blocks begin in `RequestTable.keys`, or NO_KEYS: then it shares nothing;
* num_cached_tokens: tokens found in the prefix cache at its last admission; num_queried_tokens, num_hit_tokens: known tokens at all
  its admissions, and those of them that were found;
* num_preemptions; row: its row in the running batch, or NO_ROW.
"""

RequestArrays: TypeAlias = npt.NDArray[np.void]
"""`REQUEST`, by request index, in order of arrival."""


def _no_requests(capacity: int) -> RequestArrays:
    requests = np.zeros(capacity, REQUEST)
    requests["row"] = NO_ROW
    return requests


class RequestTable:
    """All requests since the start. Adding one is O(1) on average; an index names one request for good."""

    def __init__(self, *, capacity: int = 1024) -> None:
        self.arrays = _no_requests(capacity)
        self.size = 0
        self.keys: BlockKeys = np.zeros((0, 2), np.uint64)
        """Keys of the blocks of all requests that have some."""
        self._num_keys = 0

    def add(
        self, *, prompt_tokens: int, output_tokens: int, admission_slots: int, priority: int = 0, keys: BlockKeys | None = None
    ) -> int:
        """Append a request and return its index. `keys` are those of all its blocks that will ever be full, outputs included."""
        index = self.size
        if index == self.arrays.size:
            self.arrays = np.concatenate((self.arrays, _no_requests(index)))
        self.arrays["prompt_tokens"][index] = self.arrays["num_known_tokens"][index] = prompt_tokens
        self.arrays["output_tokens"][index] = output_tokens
        self.arrays["admission_slots"][index] = admission_slots
        self.arrays["priority"][index] = priority
        self.arrays["first_key"][index] = NO_KEYS if keys is None else self._append_keys(keys)
        self.size = index + 1
        return index

    def extend(self, prompt_tokens: Int64Array, output_tokens: Int64Array) -> None:
        """Append requests that grow and share nothing."""
        first, last = self.size, self.size + prompt_tokens.size
        while last > self.arrays.size:
            self.arrays = np.concatenate((self.arrays, _no_requests(self.arrays.size)))
        arrays = self.arrays
        arrays["prompt_tokens"][first:last] = arrays["num_known_tokens"][first:last] = prompt_tokens
        arrays["output_tokens"][first:last] = output_tokens
        arrays["first_key"][first:last] = NO_KEYS
        self.size = last

    def _append_keys(self, keys: BlockKeys) -> int:
        first, last = self._num_keys, self._num_keys + len(keys)
        if last > len(self.keys):
            grown = np.zeros((max(last, 2 * len(self.keys), 1024), 2), np.uint64)
            grown[:first] = self.keys[:first]
            self.keys = grown
        self.keys[first:last] = keys
        self._num_keys = last
        return first
