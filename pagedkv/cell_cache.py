"""KV cells as in llama.cpp: a cell holds one token, those of a sequence lie anywhere, and a cell can carry several sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import lean_jit

_PAD = 256
"""Attention reads a multiple of this many cells. Source: llama.cpp, get_n_kv."""
HEAD, USED, TOP, HELD, NUM_COUNTERS = range(5)
"""In `CellArrays.counters`: next cell to try, cells that carry a sequence, highest of those + 1, cells that a running one holds."""


def padded(num_cells: int, size: int) -> int:
    """Return the cells that attention reads if the highest used one is `num_cells` - 1, of `size` in all."""
    return min(-(-num_cells // _PAD) * _PAD, size)


class CellArrays(NamedTuple):
    """What each cell of a stream carries."""

    num_seqs: Int32Array
    """By cell: sequences that it carries; 0: it is empty."""
    num_live: Int32Array
    """By cell: those of them whose request runs."""
    counters: Int64Array
    """See HEAD."""


@lean_jit
def num_empty_cells(cells: CellArrays) -> int:
    """Return how many cells carry nothing."""
    return int(cells.num_seqs.size - cells.counters[USED])


@lean_jit
def place_cells(cells: CellArrays, found: Int32Array) -> None:
    """Take as many empty cells as `found` has room for, of which there must be so many, for a running sequence.

    Cell by cell from the head, on from the beginning after the last one; from the beginning at once if the head is more than twice
    that many above the number of used cells. The head is left behind the last cell taken. O(cells passed).
    Source: llama.cpp, find_slot.
    """
    count, head, counters = found.size, cells.counters[HEAD], cells.counters
    if head > counters[USED] + 2 * count:  # enough cells are empty before the head: fill the beginning first
        head = 0
    i = 0
    while i < count:
        if head == cells.num_seqs.size:
            head = 0
        if cells.num_seqs[head] == 0:
            cells.num_seqs[head] = cells.num_live[head] = 1
            found[i] = head
            counters[TOP] = max(counters[TOP], head + 1)
            i += 1
        head += 1
    counters[HEAD] = head
    counters[USED] += count
    counters[HELD] += count


@lean_jit
def carry_cells(cells: CellArrays, which: Int32Array, seqs: int, live: int) -> None:
    """Let each of `which` carry so many more sequences, and so many more running ones. O(cells).

    If the lowest one emptied lies below the head, the head moves there.
    """
    num_seqs, num_live, counters = cells.num_seqs, cells.num_live, cells.counters
    for cell in which:
        if num_live[cell] > 0:
            counters[HELD] -= 1
        num_seqs[cell] += seqs
        num_live[cell] += live
        if num_live[cell] > 0:
            counters[HELD] += 1
        if num_seqs[cell] == 0:
            counters[USED] -= 1
            counters[HEAD] = min(counters[HEAD], cell)  # searches go on where room came up
    while counters[TOP] > 0 and num_seqs[counters[TOP] - 1] == 0:
        counters[TOP] -= 1


class CellCache:
    """One stream of `size` cells, filled from a moving head by `place_cells` and `carry_cells`.

    llama.cpp lays the micro-batches of a batch down tentatively and rolls them back if one finds no cells. Any empty cells will do,
    so a count of the empty ones tells the same beforehand: whoever has asked `num_empty` needs no rollback.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        num_seqs, num_live = np.zeros((2, size), np.int32)
        self.arrays = CellArrays(num_seqs, num_live, np.zeros(NUM_COUNTERS, np.int64))

    @property
    def num_empty(self) -> int:
        """Cells that carry nothing."""
        return self.size - int(self.arrays.counters[USED])

    @property
    def num_held(self) -> int:
        """Cells that carry a running sequence."""
        return int(self.arrays.counters[HELD])

    @property
    def n_kv(self) -> int:
        """Cells that attention reads: up to the highest used one, padded. Scattered sequences cost compute, not capacity."""
        return padded(int(self.arrays.counters[TOP]), self.size)

    def check_integrity(self, running: Sequence[Int32Array], idle: Sequence[Int32Array]) -> None:
        """Raise IntegrityError unless the cells carry exactly these sequences and the counters are right. O(size)."""
        num_seqs, num_live, counters = self.arrays
        cells = [np.concatenate([np.empty(0, np.int32), *sequences]) for sequences in (running, idle)]
        inside = all(((part >= 0) & (part < self.size)).all() for part in cells)
        live, parked = (np.bincount(part, minlength=self.size) for part in cells) if inside else (num_live, num_seqs)
        used = np.flatnonzero(live + parked)
        head, *counted = counters.tolist()
        expected = [used.size, int(used.max(initial=-1)) + 1, np.count_nonzero(live)]
        alone = all(np.unique(sequence).size == sequence.size for sequence in (*running, *idle))
        alike = np.array_equal(live, num_live) and np.array_equal(live + parked, num_seqs)
        if not inside or not alone or not alike or counted != expected or not 0 <= head <= self.size:
            raise IntegrityError(
                f"running sequences {[s.tolist() for s in running]}, idle ones {[s.tolist() for s in idle]}; cells carry "
                f"{num_seqs.tolist()}, running {num_live.tolist()}; head {head}, used, top and held {counted}"
            )
