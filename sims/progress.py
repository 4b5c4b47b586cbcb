"""Progress on stderr, for whatever takes longer than a second."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from pagedkv.compilation import COMPILATION, Compilation

STARTING = "starting"
"""What is said before the first report."""
_QUIET_S = 1.0
_INTERVAL_S = 5.0
_POLL_S = 0.2
_KNOWN_AFTER_S = 3.0
"""What is left is estimated from so many seconds of progress on."""
_NOT_KEPT = (
    "note: no folder can keep compiled code, so that every run compiles anew for up to a minute: set NUMBA_CACHE_DIR to a folder "
    "that can be written"
)


class ProgressOnStderr:
    """Says how far a simulation is: a line that renews itself on a terminal, a new line every few seconds elsewhere."""

    def __init__(self, allocators: Sequence[str], *, repeats: int) -> None:
        self._order = {name: i for i, name in enumerate(allocators)}
        self._repeats = repeats
        self._live = sys.stderr.isatty()
        self._share = 0.0
        self._what = STARTING
        self._line = ProgressLine(COMPILATION)
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
            note, line = self._line.at(time.monotonic(), self._share, self._what)
            wipe = "\r\x1b[K" if self._live else ""
            if note:
                sys.stderr.write(f"{wipe}{note}\n")
            if self._live:
                sys.stderr.write(f"{wipe}{line}")
                sys.stderr.flush()
            elif time.monotonic() - self._shown_s >= _INTERVAL_S:
                self._shown_s = time.monotonic()
                sys.stderr.write(f"{line}\n")
            if self._done.wait(_POLL_S):
                break
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class ProgressLine:
    """What there is to say at a time: how far, with what, and how much longer, once some progress has been seen.

    Time spent compiling does not count, and neither does what comes before the first report: it will not be spent again.
    """

    def __init__(self, compilation: Compilation) -> None:
        self._compilation = compilation
        self._begun = compilation.num_begun
        self._noted = False
        self._from: tuple[float, float] | None = None
        self._last: tuple[float, float] = (0.0, 0.0)

    def at(self, now_s: float, share: float, what: str) -> tuple[str, str]:
        """Return what is to be said once, if anything, and the line."""
        state = self._compilation
        compiles = state.num_running > 0 or state.num_begun != self._begun
        self._begun = state.num_begun
        note = _NOT_KEPT if compiles and not state.kept and not self._noted else ""
        self._noted = self._noted or bool(note)
        if compiles:
            self._from = None
            return note, f"{share:4.0%} {what}, compiling" + (" (kept for later runs)" if state.kept else "")
        if what == STARTING:
            return note, f"{share:4.0%} {what}"
        if self._from is None:
            self._from = self._last = (now_s, share)
        if share != self._last[1]:
            self._last = (now_s, share)
        return note, f"{share:4.0%} {what}{self._left(now_s)}"

    def _left(self, now_s: float) -> str:
        """Return how long it will still take if it goes on as so far, "" while that is unknown."""
        assert self._from is not None
        (from_s, before), (last_s, share) = self._from, self._last
        if share <= before or last_s - from_s < _KNOWN_AFTER_S:
            return ""
        left_s = (1 - share) * (last_s - from_s) / (share - before) - (now_s - last_s)
        return f", {in_words(left_s)} left" if left_s >= 1 else ""


def in_words(duration_s: float) -> str:
    """Return a duration of a second or more as one would say it: "about 40 s", "about 7 min", "about 2.5 h"."""
    steps: tuple[tuple[float, Callable[[float], str]], ...] = (
        (90, lambda s: f"{s:.0f} s" if s < 10 else f"{round(s, -1):.0f} s"),
        (90 * 60, lambda s: f"{s / 60:.0f} min"),
        (36 * 3600, lambda s: f"{s / 3600:.1f} h"),
    )
    words = next((say(duration_s) for below, say in steps if duration_s < below), f"{duration_s / 86400:.1f} days")
    return f"about {words}"
