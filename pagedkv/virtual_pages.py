"""Virtually contiguous memory: rows of reserved addresses, and one pool of physical pages that are mapped behind them.

A page here is one physical page behind every layer's keys and one behind every layer's values: they are mapped and unmapped
together, so that one number stands for 2 * layers of the driver's pages.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.jit import lean_jit

NUM_UNMAPPED, NUM_FREE, MAPPED, RECLAIMED, MAP_CALLS, PREMAPPED, UNMAPPED = range(7)
"""In `PageArrays.counts`: pages that are mapped nowhere; pages that no row needs; the fields of `MappingCounts`."""
NO_ROW = -1


@dataclass(slots=True, kw_only=True)
class MappingCounts:
    """What was mapped and unmapped so far, in pages of all layers: each is 2 * layers calls of the driver, and those take time."""

    mapped: int = 0
    """Pages mapped while a step waited."""
    reclaimed: int = 0
    """Pages unmapped from rows that did not need them, while a step waited."""
    map_calls: int = 0
    """Times that a step waited for pages to be mapped."""
    premapped: int = 0
    """Pages mapped between steps, ahead of need."""
    unmapped: int = 0
    """Pages unmapped between steps."""


class PageArrays(NamedTuple):
    """Rows of addresses and the pages behind them."""

    table: Int32Array
    """By row and place: the physical page; the first num_mapped of a row mean something."""
    num_mapped: Int32Array
    """By row: pages mapped."""
    num_needed: Int32Array
    """By row: pages that its request holds; 0 if it is idle."""
    pool: Int32Array
    """The first counts[NUM_UNMAPPED] are the unmapped pages, the next to be mapped last."""
    counts: Int64Array


@lean_jit
def _map(pages: PageArrays, row: int, num_pages: int) -> None:
    first, left = pages.num_mapped[row], pages.counts[NUM_UNMAPPED] - num_pages
    for i in range(num_pages):
        pages.table[row, first + i] = pages.pool[left + num_pages - 1 - i]
    pages.num_mapped[row] = first + num_pages
    pages.counts[NUM_UNMAPPED] = left


@lean_jit
def _unmap(pages: PageArrays, row: int, num_pages: int) -> None:
    kept, unmapped = pages.num_mapped[row] - num_pages, pages.counts[NUM_UNMAPPED]
    for i in range(num_pages):
        pages.pool[unmapped + i] = pages.table[row, kept + num_pages - 1 - i]
    pages.num_mapped[row] = kept
    pages.counts[NUM_UNMAPPED] = unmapped + num_pages


@lean_jit
def _reclaim(pages: PageArrays, num_pages: int) -> int:
    """Unmap what rows do not need, the highest row first, until `num_pages` are unmapped; return how many. O(rows + pages)."""
    before = pages.counts[NUM_UNMAPPED]
    for row in range(pages.num_mapped.size - 1, -1, -1):
        if pages.counts[NUM_UNMAPPED] >= num_pages:
            break
        if pages.num_mapped[row] > pages.num_needed[row]:
            _unmap(pages, row, pages.num_mapped[row] - pages.num_needed[row])
    return int(pages.counts[NUM_UNMAPPED] - before)


@lean_jit
def best_row(pages: PageArrays, num_pages: int) -> int:
    """Return the idle row with the fewest mapped pages that are `num_pages` or more, else the first idle one, or NO_ROW."""
    best = first = NO_ROW
    for row in range(pages.num_needed.size):
        if pages.num_needed[row] == 0:
            if first == NO_ROW:
                first = row
            if pages.num_mapped[row] >= num_pages and (best == NO_ROW or pages.num_mapped[row] < pages.num_mapped[best]):
                best = row
    return first if best == NO_ROW else best


@lean_jit
def need_pages(pages: PageArrays, row: int, num_pages: int) -> bool:
    """Raise what `row` needs to `num_pages`, while a step waits. False if they are not free: nothing has changed then.

    O(pages mapped), and O(rows + pages reclaimed) when too few are unmapped.
    """
    counts, more = pages.counts, num_pages - pages.num_needed[row]
    if more > counts[NUM_FREE]:
        return False
    if more > 0:
        pages.num_needed[row] = num_pages
        counts[NUM_FREE] -= more
        missing = num_pages - pages.num_mapped[row]
        if missing > 0:
            counts[RECLAIMED] += _reclaim(pages, missing)
            _map(pages, row, missing)
            counts[MAPPED] += missing
            counts[MAP_CALLS] += 1
    return True


@lean_jit
def release_pages(pages: PageArrays, row: int) -> None:
    """Make `row` idle. Its pages stay mapped. O(1)."""
    pages.counts[NUM_FREE] += pages.num_needed[row]
    pages.num_needed[row] = 0


class VirtualPages:
    """`num_rows` rows of `pages_per_row` addresses over `num_pages` physical pages.

    A row needs its first `num_needed` pages, and has its first `num_mapped` mapped, never fewer. What it has beyond its need stays
    mapped until the page is wanted elsewhere: mapping is slow, and the row's next request may want it. A row that needs nothing is
    idle. A page that no row needs counts as free, mapped or not.

    Example:
        >>> pages = VirtualPages(num_pages=4, num_rows=2, pages_per_row=4)
        >>> pages.need(0, 3), pages.free_pages, pages.arrays.table[0, :3].tolist()
        (True, 1, [0, 1, 2])
        >>> pages.release(0)
        >>> pages.free_pages, pages.num_unmapped, pages.best_row(2)
        (4, 1, 0)
        >>> pages.need(1, 2), pages.counts.reclaimed
        (True, 3)
    """

    def __init__(self, *, num_pages: int, num_rows: int, pages_per_row: int) -> None:
        if num_pages < 1 or num_rows < 1 or pages_per_row < 1:
            raise ConfigError(f"{num_pages} pages, {num_rows} rows of {pages_per_row} pages: each needs 1 or more")
        self.num_pages = num_pages
        self.arrays = PageArrays(
            table=np.zeros((num_rows, pages_per_row), np.int32),
            num_mapped=np.zeros(num_rows, np.int32),
            num_needed=np.zeros(num_rows, np.int32),
            pool=np.arange(num_pages, dtype=np.int32)[::-1].copy(),
            counts=np.array([num_pages, num_pages, 0, 0, 0, 0, 0]),
        )

    @property
    def num_unmapped(self) -> int:
        """Pages that are mapped nowhere."""
        return int(self.arrays.counts[NUM_UNMAPPED])

    @property
    def free_pages(self) -> int:
        """Pages that no row needs."""
        return int(self.arrays.counts[NUM_FREE])

    @property
    def counts(self) -> MappingCounts:
        """Pages mapped and unmapped so far."""
        mapped, reclaimed, map_calls, premapped, unmapped = self.arrays.counts[MAPPED:].tolist()
        return MappingCounts(mapped=mapped, reclaimed=reclaimed, map_calls=map_calls, premapped=premapped, unmapped=unmapped)

    def best_row(self, num_pages: int) -> int | None:
        """Return the idle row with the fewest mapped pages that are `num_pages` or more, else the first idle one. O(rows)."""
        row = int(best_row(self.arrays, num_pages))
        return None if row == NO_ROW else row

    def need(self, row: int, num_pages: int) -> bool:
        """Raise what `row` needs to `num_pages`, while a step waits. False if they are not free: nothing has changed then.

        O(pages mapped), and O(rows + pages reclaimed) when too few are unmapped.
        """
        return bool(need_pages(self.arrays, row, num_pages))

    def map_ahead(self, row: int, num_pages: int) -> int:
        """Map `num_pages` beyond those that `row` has, between steps; return how many: none unless so many are unmapped."""
        if num_pages > self.num_unmapped:
            return 0
        _map(self.arrays, row, num_pages)
        self.arrays.counts[PREMAPPED] += num_pages
        return num_pages

    def reclaim(self, num_pages: int) -> int:
        """Unmap what rows do not need, between steps, the highest row first, until `num_pages` are unmapped; return how many.

        A row gives up all that it does not need, or nothing. O(rows + pages).
        """
        unmapped = int(_reclaim(self.arrays, num_pages))
        self.arrays.counts[UNMAPPED] += unmapped
        return unmapped

    def unmap_idle_page(self) -> bool:
        """Unmap the last page of the highest idle row that has one, between steps; False if there is none. O(rows).

        The lowest idle row keeps its pages: it is the next that a request gets.
        """
        idle = np.flatnonzero(self.arrays.num_needed == 0)[1:]
        mapped = idle[self.arrays.num_mapped[idle] > 0]
        if not mapped.size:
            return False
        _unmap(self.arrays, int(mapped[-1]), 1)
        self.arrays.counts[UNMAPPED] += 1
        return True

    def release(self, row: int) -> None:
        """Make `row` idle. Its pages stay mapped. O(1)."""
        release_pages(self.arrays, row)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each page is in the pool or mapped, once, and no row lacks what it needs."""
        table, num_mapped, num_needed, pool, _ = self.arrays
        unmapped = pool[: self.num_unmapped]
        state = (
            f"pool {unmapped.tolist()}, mapped {num_mapped.tolist()}, needed {num_needed.tolist()}, free {self.free_pages}, "
            f"table {table.tolist()}"
        )
        counts = (num_needed >= 0) & (num_needed <= num_mapped) & (num_mapped <= table.shape[1])
        if not counts.all() or self.free_pages != self.num_pages - num_needed.sum():
            raise IntegrityError(f"counts of pages do not fit together: {state}")
        pages = np.concatenate((table[np.arange(table.shape[1]) < num_mapped[:, None]], unmapped))
        if not np.array_equal(np.sort(pages), np.arange(self.num_pages)):
            raise IntegrityError(f"not every page has one place: {state}")
