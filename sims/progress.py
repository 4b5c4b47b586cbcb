"""Progress on stderr, for whatever takes longer than a second."""

import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

_QUIET_S = 1.0
_INTERVAL_S = 5.0


class ProgressOnStderr:
    """Says how far a simulation is: a line that renews itself on a terminal, a new line every few seconds elsewhere."""

    def __init__(self, allocators: Sequence[str], *, repeats: int) -> None:
        self._order = {name: i for i, name in enumerate(allocators)}
        self._repeats = repeats
        self._live = sys.stderr.isatty()
        self._share = 0.0
        self._what = "compiling (the first run after an installation takes longer)"
        self._shown_s = -_INTERVAL_S
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._show_until_done, daemon=True)

    def __call__(self, allocator: str, repeat: int, share: float) -> None:
        """Note that `share` of this allocator's simulated time has passed."""
        self._what = allocator if self._repeats == 1 else f"{allocator}, repeat {repeat + 1} of {self._repeats}"
        done = self._order[allocator] + (repeat + share) / self._repeats
        self._share = done / len(self._order)

    def __enter__(self) -> "ProgressOnStderr":
        """Start watching the time."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop, and wipe the line."""
        self._done.set()
        self._thread.join()

    def _show_until_done(self) -> None:
        if self._done.wait(_QUIET_S):
            return
        while True:
            line = f"{self._share:4.0%} {self._what}"
            if self._live:
                sys.stderr.write(f"\r\x1b[K{line}")
                sys.stderr.flush()
            elif time.monotonic() - self._shown_s >= _INTERVAL_S:
                self._shown_s = time.monotonic()
                sys.stderr.write(f"{line}\n")
            if self._done.wait(0.2):
                break
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
