"""Server slots over one stream of cells, as arrays: which cells each slot has, and the moves of tokens in and out of them."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.cell_cache import HELD, CellArrays, carry_cells, num_empty_cells, place_cells
from pagedkv.jit import lean_jit
from pagedkv.slot_arrays import SlotArrays, end_slot, start_slot


class SlotCells(NamedTuple):
    """Server slots and their cells."""

    cells: CellArrays
    slots: SlotArrays
    tables: Int32Array
    """[server slots, longest request]: the cell of each token of what runs in a slot, or of what an idle one remembers."""
    held: Int32Array
    """By server slot: cells of what runs there; 0 while it is idle."""

    @classmethod
    def over(cls, cells: CellArrays, slots: SlotArrays, max_model_len: int) -> "SlotCells":
        """Return slots without cells. What is never used of the tables takes no memory."""
        number, longest = slots.runs.size, min(max_model_len, cells.num_seqs.size)
        return cls(cells, slots, np.zeros((number, longest), np.int32), np.zeros(number, np.int32))

    def of(self, slot: int) -> Int32Array:
        """Return the cells of `slot`, a view."""
        return self.tables[slot, : self.held[slot] + self.slots.num_kept[slot]]


@lean_jit
def _fits(memory: SlotCells, slot: int, num_kept: int, count: int) -> bool:
    """Whether `count` cells can be had for `slot`, which keeps its first `num_kept`, if all other idle slots may be purged."""
    if num_empty_cells(memory.cells) >= count:
        return True
    num_live, table, held = memory.cells.num_live, memory.tables[slot], memory.cells.counters[HELD]
    if memory.slots.runs[slot] == 0:
        for cell in table[:num_kept]:
            held += num_live[cell] == 0
    else:
        for cell in table[num_kept : memory.held[slot]]:
            held -= num_live[cell] == 1
    return bool(num_live.size - held >= count)


@lean_jit
def take_cells(memory: SlotCells, slot: int, num_kept: int, count: int) -> bool:
    """Let `slot`, which runs from now on, keep its first `num_kept` tokens and have empty cells for `count` more.

    Idle slots are purged, by number, as far as it takes and only if that is enough. O(cells passed, taken and given back).

    Returns:
        Whether there are so many; if not, nothing has changed.
    """
    if not _fits(memory, slot, num_kept, count):
        return False
    cells, slots, table = memory.cells, memory.slots, memory.tables[slot]
    if slots.runs[slot] == 0:
        carry_cells(cells, table[:num_kept], 0, 1)
        carry_cells(cells, table[num_kept : slots.num_kept[slot]], -1, 0)
        start_slot(slots, slot)
    else:
        carry_cells(cells, table[num_kept : memory.held[slot]], -1, -1)
    other = 0
    while num_empty_cells(cells) < count:
        if slots.runs[other] == 0:
            purge_slot(memory, other)
        other += 1
    place_cells(cells, table[num_kept : num_kept + count])
    memory.held[slot] = num_kept + count
    return True


@lean_jit
def purge_slot(memory: SlotCells, slot: int) -> None:
    """Give back all cells of an idle slot, and forget what they held. O(cells)."""
    carry_cells(memory.cells, memory.tables[slot, : memory.slots.num_kept[slot]], -1, 0)
    memory.slots.num_kept[slot] = 0


@lean_jit
def leave_slot(memory: SlotCells, slot: int, num_kept: int) -> None:
    """Make `slot` idle: it remembers the first `num_kept` of its tokens, in their cells. O(cells)."""
    carry_cells(memory.cells, memory.tables[slot, num_kept : memory.held[slot]], -1, -1)
    carry_cells(memory.cells, memory.tables[slot, :num_kept], 0, -1)
    memory.held[slot] = 0
    end_slot(memory.slots, slot, num_kept)


@lean_jit
def share_cells(memory: SlotCells, parent: int, child: int, num_tokens: int) -> None:
    """Let a request run in idle slot `child`, carried by the cells of the first `num_tokens` of `parent`. O(cells)."""
    purge_slot(memory, child)
    start_slot(memory.slots, child)
    for i in range(num_tokens):
        memory.tables[child, i] = memory.tables[parent, i]
    carry_cells(memory.cells, memory.tables[child, :num_tokens], 1, 1)
    memory.held[child] = num_tokens
