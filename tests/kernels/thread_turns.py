"""numba's CUDA simulator, with a thread block's threads taking turns: each runs alone from one barrier to the next.

The simulator lets threads run as they come, and a missing barrier rarely shows. Here whatever a thread reads before a barrier was
written by itself, or by those that had their turn: in one order of turns or the other that is wrong, if another thread's is meant.
What is read from shared memory without having been written is NaN, or no valid index.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numba.cuda.simulator import kernel, kernelapi


class TurnThread(kernel.BlockThread):
    """A thread that runs when it is told to, until the next barrier or its end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.go, self.paused, self.ended = threading.Event(), threading.Event(), False

    def run(self) -> None:
        """Run whole, in turns."""
        self._await_turn()
        super().run()
        self.ended = True
        self.paused.set()

    def syncthreads(self) -> None:
        """Let the others come here."""
        self.paused.set()
        self._await_turn()

    def _await_turn(self) -> None:
        self.go.wait()
        self.go.clear()

    def turn(self) -> None:
        """Run to the next barrier."""
        self.go.set()
        self.paused.wait()
        self.paused.clear()
        if self.exception:
            raise self.exception[0].with_traceback(self.exception[1])


class TurnManager(kernel.BlockManager):
    """Runs a thread block's threads in turns."""

    backwards = False
    """Whether the last thread is the first."""

    def run(self, grid_point: Any, *arguments: Any) -> None:
        """Run one block."""
        points = list(np.ndindex(*self._block_dim))
        threads = [TurnThread(lambda: self._f(*arguments), self, grid_point, point, self._debug) for point in points]
        for thread in threads:
            thread.start()
        while threads:
            for thread in reversed(threads) if self.backwards else threads:
                thread.turn()
            assert len({thread.ended for thread in threads}) == 1, "some threads wait at a barrier that others never reach"
            threads = [thread for thread in threads if not thread.ended]


class UnwrittenShared(kernelapi.FakeCUDAShared):
    """Shared memory that tells when it is read before it is written."""

    def array(self, shape: Any, dtype: Any) -> Any:
        """Return the block's array of the line that calls, full of what nobody can take for a value when it is new."""
        caller = sys._getframe(1)
        line = caller.f_code.co_filename, caller.f_lineno
        if line not in self._allocations:
            kind = np.dtype(dtype)
            self._allocations[line] = np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).max, kind)
        return self._allocations[line]


@contextmanager
def in_turns(patch: pytest.MonkeyPatch, *, backwards: bool) -> Iterator[None]:
    """Run kernels so while this lasts."""
    patch.setattr(TurnManager, "backwards", backwards)
    patch.setattr(kernel, "BlockManager", TurnManager)
    patch.setattr(kernelapi, "FakeCUDAShared", UnwrittenShared)
    yield
