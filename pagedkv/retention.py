"""Retention priorities, TensorRT-LLM's: how much what a block holds is worth once nobody uses it, and for how long."""

from dataclasses import dataclass
from typing import NamedTuple

from pagedkv.errors import ConfigError

DEFAULT_PRIORITY = 35
"""Retention priority of what nobody said anything about. Source: TensorRT-LLM, KvCacheRetentionConfig."""
MAX_PRIORITY = 100
"""The highest retention priority; the lowest is 0. Source: as above."""
FOR_GOOD = float("inf")
"""The duration of what never expires, in arrays."""


def check_priority(priority: int) -> None:
    """Raise ConfigError unless `priority` is a retention priority."""
    if not 0 <= priority <= MAX_PRIORITY:
        raise ConfigError(f"retention priority {priority}: needs 0 to {MAX_PRIORITY}; {DEFAULT_PRIORITY} is usual")


class Retention(NamedTuple):
    """How much what a block holds is worth once nobody uses it."""

    priority: int = DEFAULT_PRIORITY
    """0 to 100; the lowest goes first."""
    duration: float | None = None
    """How long after each release that holds, in the owner's unit of time; then it is DEFAULT_PRIORITY. None: for good."""

    @property
    def duration_or_for_good(self) -> float:
        """The duration as arrays have it."""
        return FOR_GOOD if self.duration is None else float(self.duration)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionRange:
    """Retention of the tokens `first` to `last` of a request. A block follows the range that its first token lies in."""

    first: int = 0
    """First token."""
    last: int | None = None
    """One past the last token; None: to the end of the sequence."""
    priority: int
    """0 to 100."""
    duration: float | None = None
    """As in `Retention`."""

    def __post_init__(self) -> None:
        """Refuse a range without a token, and priorities and durations that are none.

        Raises:
            ConfigError: With the values that would work.
        """
        check_priority(self.priority)
        if self.first < 0 or (self.last is not None and self.last <= self.first):
            raise ConfigError(
                f"retention of tokens {self.first} to {self.last}: first needs 0 or more, last {self.first + 1} or more"
            )
        if self.duration is not None and not self.duration > 0:
            raise ConfigError(f"retention for {self.duration}: a duration needs more than 0, or None for good")
