"""The virtual clock."""

import simpy

from pagedkv.errors import IntegrityError


class Clock(simpy.Environment):
    """A simpy environment whose time can be moved on to a moment before its next event, without an event for that."""

    @property
    def num_events(self) -> int:
        """How many events are to come. O(1)."""
        return len(self._queue)

    def advance(self, to_s: float) -> None:
        """Let it be `to_s` now. O(1).

        Raises:
            IntegrityError: If that is in the past, or something would have happened before.
        """
        if not self._now <= to_s <= self.peek():
            raise IntegrityError(f"the clock cannot go from {self._now} to {to_s} s: the next event is at {self.peek()} s")
        self._now = to_s
