"""Simulated time on a real clock."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class ServeClock(Protocol):
    """Time as a simulated engine has it."""

    def now(self) -> float:
        """Return the simulated time, in seconds."""

    async def sleep_until(self, at_s: float) -> None:
        """Return at the simulated time `at_s`, or as soon as possible after it; let others run in any case."""


class WallClock:
    """Simulated time passes `speed` times as fast as real time.

    A machine that is late catches up, if it can within `SLACK_S`; beyond that simulated time stands still until it is there, so
    that a speed that nobody can keep is a lower speed, and not a lag that grows.
    """

    SLACK_S = 0.1
    """Real seconds that a step may be late: longer than a thread switch or a garbage collection takes. Chosen."""

    def __init__(self, speed: float, now: Callable[[], float] = time.monotonic) -> None:
        """Let simulated time begin at 0, now."""
        self._speed, self._real_now = speed, now
        self._began_s = now()
        self.lost_s = 0.0
        """Real seconds for which simulated time stood still."""

    def now(self) -> float:
        """Return the simulated time, in seconds."""
        return (self._real_now() - self._began_s) * self._speed

    async def sleep_until(self, at_s: float) -> None:
        """Return at the simulated time `at_s`, or as soon as possible after it."""
        ahead_s = (at_s - self.now()) / self._speed
        await asyncio.sleep(max(ahead_s, 0.0))
        late_s = (self.now() - at_s) / self._speed
        if late_s > self.SLACK_S:
            self._began_s += late_s
            self.lost_s += late_s
