"""A clock that stands still while others have the processor."""

import time


class ProcessorClock:
    """The processor time of this process, and the time that it would have waited: what a clock shows if it is alone.

    For one thread that computes. What others take of caches and memory bandwidth still counts.
    """

    def __init__(self) -> None:
        self._waited_s = 0.0

    def now(self) -> float:
        """Return the time in seconds, from any moment on."""
        return time.process_time() + self._waited_s

    def sleep(self, seconds: float) -> None:
        """Let so much time pass, at once."""
        self._waited_s += seconds
