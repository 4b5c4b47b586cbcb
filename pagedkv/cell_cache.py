"""KV cells as in llama.cpp: a cell holds one token, those of a sequence lie anywhere, and a cell can carry several sequences."""

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import jit

_PAD = 256
"""Attention reads a multiple of this many cells. Source: llama.cpp, get_n_kv."""
_HEAD, _USED, _TOP, _HELD = range(4)
"""Where the counters lie: next cell to try, cells that carry a sequence, highest of those + 1, cells that a running one holds."""


def padded(num_cells: int, size: int) -> int:
    """Return the cells that attention reads if the highest used one is `num_cells` - 1, of `size` in all."""
    return min(-(-num_cells // _PAD) * _PAD, size)


@jit
def _place(num_seqs: Int32Array, num_live: Int32Array, counters: Int64Array, found: Int64Array) -> None:
    count, head = found.size, counters[_HEAD]
    if head > counters[_USED] + 2 * count:  # enough cells are empty before the head: fill the beginning first
        head = 0
    i = 0
    while i < count:
        if head == num_seqs.size:
            head = 0
        if num_seqs[head] == 0:
            num_seqs[head] = num_live[head] = 1
            found[i] = head
            counters[_TOP] = max(counters[_TOP], head + 1)
            i += 1
        head += 1
    counters[_HEAD] = head
    counters[_USED] += count
    counters[_HELD] += count


@jit
def _carry(num_seqs: Int32Array, num_live: Int32Array, counters: Int64Array, cells: Int64Array, seqs: int, live: int) -> None:
    for cell in cells:
        if num_live[cell] > 0:
            counters[_HELD] -= 1
        num_seqs[cell] += seqs
        num_live[cell] += live
        if num_live[cell] > 0:
            counters[_HELD] += 1
        if num_seqs[cell] == 0:
            counters[_USED] -= 1
            counters[_HEAD] = min(counters[_HEAD], cell)  # searches go on where room came up
    while counters[_TOP] > 0 and num_seqs[counters[_TOP] - 1] == 0:
        counters[_TOP] -= 1


@jit
def _place_in_turn(num_seqs: Int32Array, num_live: Int32Array, counters: Int64Array, found: Int64Array) -> None:
    for i in range(found.size):
        _place(num_seqs, num_live, counters, found[i : i + 1])


class CellCache:
    """One stream of `size` cells, filled from a moving head.

    llama.cpp lays the micro-batches of a batch down tentatively and rolls them back if one finds no cells. Any empty cells will do,
    so a count of the empty ones tells the same beforehand: whoever has asked `num_empty` needs no rollback.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_seqs: Int32Array = np.zeros(size, np.int32)
        """By cell: sequences that it carries; 0: it is empty."""
        self.num_live: Int32Array = np.zeros(size, np.int32)
        """By cell: those of them whose request runs."""
        self.counters: Int64Array = np.zeros(4, np.int64)

    @property
    def num_empty(self) -> int:
        """Cells that carry nothing."""
        return self.size - int(self.counters[_USED])

    @property
    def num_held(self) -> int:
        """Cells that carry a running sequence."""
        return int(self.counters[_HELD])

    @property
    def n_kv(self) -> int:
        """Cells that attention reads: up to the highest used one, padded. Scattered sequences cost compute, not capacity."""
        return padded(int(self.counters[_TOP]), self.size)

    def place(self, count: int) -> Int64Array:
        """Take `count` empty cells, of which there must be so many, for a running sequence. O(cells passed).

        Cell by cell from the head, on from the beginning after the last one; from the beginning at once if the head is more than
        twice `count` above the number of used cells. The head is left behind the last cell taken.
        """
        assert count <= self.num_empty
        found: Int64Array = np.empty(count, np.int64)
        _place(self.num_seqs, self.num_live, self.counters, found)
        return found

    def place_in_turn(self, count: int) -> Int64Array:
        """Do as `count` times `place(1)`. O(cells passed)."""
        assert count <= self.num_empty
        found: Int64Array = np.empty(count, np.int64)
        _place_in_turn(self.num_seqs, self.num_live, self.counters, found)
        return found

    def share(self, cells: Int64Array) -> None:
        """Let one more running sequence be carried by `cells`."""
        _carry(self.num_seqs, self.num_live, self.counters, cells, 1, 1)

    def park(self, cells: Int64Array) -> None:
        """Note that one of the running sequences that `cells` carry is idle now."""
        _carry(self.num_seqs, self.num_live, self.counters, cells, 0, -1)

    def wake(self, cells: Int64Array) -> None:
        """Note that one of the idle sequences that `cells` carry runs now."""
        _carry(self.num_seqs, self.num_live, self.counters, cells, 0, 1)

    def remove(self, cells: Int64Array) -> None:
        """Take an idle sequence off `cells`. If the lowest one emptied lies below the head, the head moves there."""
        _carry(self.num_seqs, self.num_live, self.counters, cells, -1, 0)

    def check_integrity(self, running: list[Int64Array], idle: list[Int64Array]) -> None:
        """Raise IntegrityError unless the cells carry exactly these sequences and the counters are right. O(size)."""
        cells = [np.concatenate([np.empty(0, np.int64), *sequences]) for sequences in (running, idle)]
        inside = all(((part >= 0) & (part < self.size)).all() for part in cells)
        live, parked = (np.bincount(part, minlength=self.size) for part in cells) if inside else (self.num_live, self.num_seqs)
        used = np.flatnonzero(live + parked)
        head, *counters = self.counters.tolist()
        expected = [used.size, int(used.max(initial=-1)) + 1, np.count_nonzero(live)]
        alone = all(np.unique(sequence).size == sequence.size for sequence in (*running, *idle))
        alike = np.array_equal(live, self.num_live) and np.array_equal(live + parked, self.num_seqs)
        if not inside or not alone or not alike or counters != expected or not 0 <= head <= self.size:
            raise IntegrityError(
                f"running sequences {[s.tolist() for s in running]}, idle ones {[s.tolist() for s in idle]}; cells carry "
                f"{self.num_seqs.tolist()}, running {self.num_live.tolist()}; head {head}, used, top and held {counters}"
            )


class CellSequence:
    """The cells of one sequence, by position. Growth is amortized O(1) per cell."""

    def __init__(self) -> None:
        self.size = 0
        self._cells: Int64Array = np.zeros(16, np.int64)

    @property
    def cells(self) -> Int64Array:
        """Its cells, a view that the next change can overwrite."""
        return self._cells[: self.size]

    def extend(self, cells: Int64Array) -> None:
        """Append `cells`."""
        end = self.size + cells.size
        if end > self._cells.size:
            self._cells = np.concatenate((self.cells, np.zeros(2 * end - self.size, np.int64)))
        self._cells[self.size : end] = cells
        self.size = end

    def cut(self, size: int) -> None:
        """Keep the first `size` cells."""
        self.size = size
