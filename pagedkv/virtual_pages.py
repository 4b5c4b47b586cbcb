"""Virtually contiguous memory: rows of reserved addresses, and one pool of physical pages that are mapped behind them.

A page here is one physical page behind every layer's keys and one behind every layer's values: they are mapped and unmapped
together, so that one number stands for 2 * layers of the driver's pages.
"""

from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.errors import ConfigError, IntegrityError


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


class VirtualPages:
    """`num_rows` rows of `pages_per_row` addresses over `num_pages` physical pages.

    A row needs its first `num_needed` pages, and has its first `num_mapped` mapped, never fewer. What it has beyond its need stays
    mapped until the page is wanted elsewhere: mapping is slow, and the row's next request may want it. A row that needs nothing is
    idle. A page that no row needs counts as free, mapped or not.

    Example:
        >>> pages = VirtualPages(num_pages=4, num_rows=2, pages_per_row=4)
        >>> pages.need(0, 3), pages.free_pages, pages.table[0, :3].tolist()
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
        self.table: Int32Array = np.zeros((num_rows, pages_per_row), np.int32)
        """By row and place: the physical page; the first num_mapped of a row mean something."""
        self.num_mapped: Int32Array = np.zeros(num_rows, np.int32)
        """By row: pages mapped."""
        self.num_needed: Int32Array = np.zeros(num_rows, np.int32)
        """By row: pages that its request holds; 0 if it is idle."""
        self.num_unmapped = num_pages
        """Pages that are mapped nowhere."""
        self.free_pages = num_pages
        """Pages that no row needs."""
        self.counts = MappingCounts()
        self._pool: Int32Array = np.arange(num_pages, dtype=np.int32)[::-1].copy()
        """The first num_unmapped are the unmapped pages, the next to be mapped last."""

    def best_row(self, num_pages: int) -> int | None:
        """Return the idle row with the fewest mapped pages that are `num_pages` or more, else the first idle one. O(rows)."""
        idle = np.flatnonzero(self.num_needed == 0)
        ready = idle[self.num_mapped[idle] >= num_pages]
        if ready.size:
            return int(ready[self.num_mapped[ready].argmin()])
        return int(idle[0]) if idle.size else None

    def need(self, row: int, num_pages: int) -> bool:
        """Raise what `row` needs to `num_pages`, while a step waits. False if they are not free: nothing has changed then.

        O(pages mapped), and O(rows + pages reclaimed) when too few are unmapped.
        """
        more = num_pages - int(self.num_needed[row])
        if more > self.free_pages:
            return False
        if more > 0:
            self.num_needed[row] = num_pages
            self.free_pages -= more
            missing = num_pages - int(self.num_mapped[row])
            if missing > 0:
                self.counts.reclaimed += self.reclaim(missing)
                self._map(row, missing)
                self.counts.mapped += missing
                self.counts.map_calls += 1
        return True

    def map_ahead(self, row: int, num_pages: int) -> int:
        """Map `num_pages` beyond those that `row` has, between steps; return how many: none unless so many are unmapped."""
        if num_pages > self.num_unmapped:
            return 0
        self._map(row, num_pages)
        self.counts.premapped += num_pages
        return num_pages

    def reclaim(self, num_pages: int) -> int:
        """Unmap what rows do not need, the highest row first, until `num_pages` are unmapped; return how many. O(rows + pages).

        A row gives up all that it does not need, or nothing.
        """
        if num_pages <= self.num_unmapped:
            return 0
        before = self.num_unmapped
        for row in np.flatnonzero(self.num_mapped > self.num_needed)[::-1].tolist():
            self._unmap(row, int(self.num_mapped[row] - self.num_needed[row]))
            if self.num_unmapped >= num_pages:
                break
        return self.num_unmapped - before

    def unmap_idle_page(self) -> bool:
        """Unmap the last page of the highest idle row that has one, between steps; False if there is none. O(rows).

        The lowest idle row keeps its pages: it is the next that a request gets.
        """
        idle = np.flatnonzero(self.num_needed == 0)[1:]
        mapped = idle[self.num_mapped[idle] > 0]
        if not mapped.size:
            return False
        self._unmap(int(mapped[-1]), 1)
        self.counts.unmapped += 1
        return True

    def release(self, row: int) -> None:
        """Make `row` idle. Its pages stay mapped. O(1)."""
        self.free_pages += int(self.num_needed[row])
        self.num_needed[row] = 0

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each page is in the pool or mapped, once, and no row lacks what it needs."""
        state = (
            f"pool {self._pool[: self.num_unmapped].tolist()}, mapped {self.num_mapped.tolist()}, "
            f"needed {self.num_needed.tolist()}, free {self.free_pages}, table {self.table.tolist()}"
        )
        counts = (self.num_needed >= 0) & (self.num_needed <= self.num_mapped) & (self.num_mapped <= self.table.shape[1])
        if not counts.all() or self.free_pages != self.num_pages - self.num_needed.sum():
            raise IntegrityError(f"counts of pages do not fit together: {state}")
        mapped = self.table[np.arange(self.table.shape[1]) < self.num_mapped[:, None]]
        pages = np.concatenate((mapped, self._pool[: self.num_unmapped]))
        if not np.array_equal(np.sort(pages), np.arange(self.num_pages)):
            raise IntegrityError(f"not every page has one place: {state}")

    def _map(self, row: int, num_pages: int) -> None:
        first, left = int(self.num_mapped[row]), self.num_unmapped - num_pages
        self.table[row, first : first + num_pages] = self._pool[left : self.num_unmapped][::-1]
        self.num_mapped[row], self.num_unmapped = first + num_pages, left

    def _unmap(self, row: int, num_pages: int) -> None:
        kept = int(self.num_mapped[row]) - num_pages
        self._pool[self.num_unmapped : self.num_unmapped + num_pages] = self.table[row, kept : kept + num_pages][::-1]
        self.num_mapped[row], self.num_unmapped = kept, self.num_unmapped + num_pages
