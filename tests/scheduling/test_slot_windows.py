"""llama.cpp's server with layers that have a window: what of a slot's last prompt can be gone on from."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp_scheduling import finish
from steps import advance

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError
from pagedkv.scheduling.content import shared_segments
from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppScheduler, LlamaCppSettings
from pagedkv.slot_windows import SlotWindows, begin_window, count_computed, end_window, first_in_window, reusable_tokens

WINDOW, UBATCH = 8, 16
CELLS = WINDOW + UBATCH
"""Of a stream."""


def server(*, slots: int = 1, allocator: str = "llama-cpp-split", **own: Any) -> LlamaCppScheduler:
    settings = {"window_tokens": WINDOW, "window_cells": CELLS * slots, "ubatch_tokens": UBATCH, **own}
    pool = KVPoolSettings(
        num_blocks=1000 * slots, block_size=1, max_num_seqs=slots, max_model_len=1000, enable_prefix_caching=True, **settings
    )
    return LlamaCppScheduler(LlamaCppSettings(n_ubatch=UBATCH), ALLOCATORS.load(allocator)(pool))  # type: ignore[arg-type]


def ask(one: LlamaCppScheduler, texts: list[tuple[int, int]], prompt: int, output: int = 1) -> int:
    """Add a request that runs through `texts`, each a stream and where it ends; return what it finds once it is done."""
    streams, ends = np.array(texts, np.int64).reshape(-1, 2).T
    request = one.add(prompt_tokens=prompt, output_tokens=output, content=shared_segments(streams, ends))
    assert request is not None
    finish(one)
    return int(one.requests.arrays["num_cached_tokens"][request])


def test_a_conversation_that_goes_on_finds_all_of_itself() -> None:
    one = server()
    ask(one, [(1, 900)], 200, 50)
    assert ask(one, [(1, 900)], 300) == 249, "its window is there"


def test_a_text_that_parts_with_it_goes_on_from_a_checkpoint() -> None:
    """ "slot update_slots: restored context checkpoint (pos_max = 987, n_tokens = 988, n_past = 987)"."""
    for parts_at, found in ((249, 249), (234, 234), (233, 195), (195, 195), (194, 179), (179, 179), (178, 0)):
        one = server()
        ask(one, [(1, 900)], 200, 50)
        assert ask(one, [(1, parts_at), (2, 900)], 300) == found, "checkpoints at 180 and 196; the last 24 tokens are there"


def test_without_checkpoints_all_is_computed_again() -> None:
    one = server(context_checkpoints=0)
    ask(one, [(1, 900)], 200, 50)
    assert ask(one, [(1, 220), (2, 900)], 300) == 0
    full = server(window_tokens=0, window_cells=0)
    ask(full, [(1, 900)], 200, 50)
    assert ask(full, [(1, 220), (2, 900)], 300) == 220


def test_a_system_prompt_is_kept_for_others_by_a_checkpoint_behind_it() -> None:
    one = server()
    ask(one, [(1, 100), (2, 900)], 200, 50)
    assert ask(one, [(1, 100), (3, 900)], 200, 50) == 99
    assert ask(one, [(1, 100), (4, 900)], 200, 50) == 99, "it is still there"


def test_the_oldest_checkpoint_leaves_when_there_are_too_many() -> None:
    one = server(context_checkpoints=2)
    ask(one, [(1, 100), (2, 900)], 200, 50)
    assert one._memory.slots.windows.checkpoints[0].tolist() == [180, 196], "that at 100 was the third"
    assert ask(one, [(1, 100), (3, 900)], 200) == 0


def test_what_others_compute_takes_cells_behind_a_slots_window() -> None:
    found = []
    for others in (0, 1):
        one = server(slots=2, allocator="llama-cpp-unified")
        ask(one, [(1, 900)], 200, 50)
        found += [ask(one, [(2, 900)], 20) for _ in range(others)]
        found.append(ask(one, [(1, 900)], 300))
    assert found == [249, 0, 195], "then only a checkpoint is left to go on from"
    apart = server(slots=2)
    ask(apart, [(1, 900)], 200, 50)
    ask(apart, [(2, 900)], 200)
    assert ask(apart, [(1, 900)], 300) == 249


def test_a_batch_ends_where_a_checkpoint_is_made() -> None:
    def steps(**own: Any) -> list[list[tuple[int, int]]]:
        one = server(**own)
        one.add(prompt_tokens=200, output_tokens=1, content=shared_segments(np.array([1, 2]), np.array([100, 200])))
        return [advance(one) for _ in range(4)] if not own else [advance(one)]

    assert steps() == [[(0, 100)], [(0, 80)], [(0, 16)], [(0, 4)]]
    assert steps(context_checkpoints=0) == steps(window_tokens=0, window_cells=0) == [[(0, 200)]]


def test_a_short_common_text_is_computed_again_unless_a_checkpoint_is_in_it() -> None:
    """The server looks for a checkpoint wherever the window reaches back to the first token."""
    one = server()
    ask(one, [(1, 900)], 30, 1)
    assert ask(one, [(1, 7), (2, 900)], 30) == 0


@pytest.mark.parametrize("own", [{"window_tokens": -1}, {"context_checkpoints": -1}, {"ubatch_tokens": 0}])
def test_windows_that_cannot_be_are_refused(own: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"needs [01] or more"):
        server(**own)


class Cells:
    """The cells of llama_kv_cache for layers with a window, one by one, as its find_slot and apply_ubatch take and purge them."""

    def __init__(self, size: int) -> None:
        self.cells: list[tuple[int, int] | None] = [None] * size
        self.head = 0

    def positions(self, seq: int) -> list[int]:
        return sorted(cell[1] for cell in self.cells if cell is not None and cell[0] == seq)

    def put(self, seq: int, positions: range) -> None:
        ends = {each: max(self.positions(each), default=-1) for each in {cell[0] for cell in self.cells if cell is not None}}
        if self.head > sum(cell is not None for cell in self.cells) + 2 * len(positions):
            self.head = 0
        self.head %= len(self.cells)
        taken: list[int] = []
        tested = 0
        while len(taken) < len(positions):
            assert tested < len(self.cells), "there are always enough"
            at = (self.head + tested) % len(self.cells)
            cell, tested = self.cells[at], tested + 1
            if cell is None or ends[cell[0]] + 1 - cell[1] >= WINDOW:
                taken.append(at)
        purged: dict[int, int] = {}
        for at, position in zip(taken, positions, strict=True):
            cell = self.cells[at]
            if cell is not None:
                purged[cell[0]] = max(cell[1], purged.get(cell[0], -1))
            self.cells[at] = (seq, position)
        for other, last in purged.items():
            self.remove(other, lambda position, last=last: position <= last)
        self.head = taken[-1] + 1

    def remove(self, seq: int, which: Any) -> None:
        for at, cell in enumerate(self.cells):
            if cell is not None and cell[0] == seq and which(cell[1]):
                self.cells[at] = None
                self.head = min(self.head, at)


MOVES = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 90), st.integers(0, 40), st.floats(0, 1)), min_size=1, max_size=12)


@pytest.mark.parametrize("shared", [False, True])
@given(moves=MOVES)
def test_layers_with_a_window_have_at_least_what_is_said(shared: bool, moves: list[tuple[int, int, int, float]]) -> None:
    """Against the cells one by one: just what is said in a stream of one's own, as long as all that was there is gone on from."""
    pool = KVPoolSettings(
        num_blocks=9,
        max_model_len=9,
        window_tokens=WINDOW,
        window_cells=WINDOW * 2 + UBATCH if shared else CELLS * 2,
        ubatch_tokens=UBATCH,
    )
    windows = SlotWindows.of(pool, 2, shared=shared)
    streams = [Cells(pool.window_cells)] * 2 if shared else [Cells(CELLS), Cells(CELLS)]
    kept = [0, 0]
    for slot, prompt, output, share in moves:
        common = int(share * kept[slot])
        total = common + prompt
        found = reusable_tokens(windows, slot, kept[slot], common, total)
        restored = found > 0 and not first_in_window(windows, slot, kept[slot]) < found - WINDOW
        begin_window(windows, slot, kept[slot], found, total, 0)
        if restored or not found:
            streams[slot].remove(slot, lambda _: True)
        else:
            streams[slot].remove(slot, lambda position, found=found: position >= found)
        if restored:
            streams[slot].put(slot, range(max(found + 1 - WINDOW, 0), found))
        at = found
        while at < total + output:
            size = min(UBATCH, total - at) if at < total else 1
            streams[slot].put(slot, range(at, at + size))
            count_computed(windows, slot, size)
            at += size
        kept[slot] = at
        end_window(windows, slot, at)
        for each in range(2):
            there = streams[each].positions(each)
            first = first_in_window(windows, each, kept[each])
            assert there == list(range(kept[each] - len(there), kept[each])), "no holes"
            assert first >= kept[each] - len(there)
            assert shared or windows.holes[each] or first == kept[each] - len(there)
