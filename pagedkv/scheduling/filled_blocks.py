"""Which blocks, by their keys, somebody fills in a step: a set that is emptied in O(1), compiled."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int64Array
from pagedkv.jit import lean_jit


class FilledBlocks(NamedTuple):
    """An open hash table: keys stand at their first word's place, or at the next ones."""

    words_a: npt.NDArray[np.uint64]
    words_b: npt.NDArray[np.uint64]
    steps: Int64Array
    """By place: in which step it was filled; of earlier ones it is empty."""
    step: Int64Array
    """Length 1: which step it is."""

    @classmethod
    def empty(cls, most: int) -> "FilledBlocks":
        """Return one with room for `most` keys in a step."""
        size = 1 << (2 * most).bit_length()
        words_a, words_b = np.zeros((2, size), np.uint64)
        return cls(words_a, words_b, np.zeros(size, np.int64), np.ones(1, np.int64))


@lean_jit
def add_filled(filled: FilledBlocks, word_a: np.uint64, word_b: np.uint64) -> bool:
    """Add a key; return whether it was there. Expected O(1)."""
    size = filled.steps.size
    place = np.int64((word_a ^ (word_a >> np.uint64(32)) ^ word_b) & np.uint64(size - 1))
    while filled.steps[place] == filled.step[0]:
        if filled.words_a[place] == word_a and filled.words_b[place] == word_b:
            return True
        place = (place + 1) % size
    filled.words_a[place], filled.words_b[place], filled.steps[place] = word_a, word_b, filled.step[0]
    return False
