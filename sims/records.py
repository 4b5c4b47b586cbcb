"""What happened to each request."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array, Int8Array, Int64Array


class Outcome(IntEnum):
    """How a request stands when the run ends."""

    UNFINISHED = 0
    FINISHED = 1
    REJECTED = 2
    """Refused at arrival: it could never run here."""
    FAILED = 3
    """Accepted, then given up by the engine or lost with its replica; or sent while no replica was up."""


TOKEN_TIMES = np.dtype([("arrival_s", "<f8"), ("scheduled_s", "<f8"), ("first_token_s", "<f8"), ("last_token_s", "<f8")])
"""Instants on the virtual clock in seconds, NaN as long as they have not come: arrival; start of the first step that computed any
of it; end of the step that gave its first output token, and of the one that gave its newest: of a finished request, its end."""

TokenTimes: TypeAlias = npt.NDArray[np.void]
"""`TOKEN_TIMES`, by request index."""


def no_times(capacity: int) -> TokenTimes:
    """Return times for `capacity` requests to which nothing has happened."""
    return np.full(capacity, np.nan, TOKEN_TIMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLog:
    """One entry per request of a run, rejected ones included, in order of arrival."""

    arrival_s: Float64Array
    scheduled_s: Float64Array
    first_token_s: Float64Array
    last_token_s: Float64Array
    prompt_tokens: Int64Array
    output_tokens: Int64Array
    """What it asks for."""
    num_output_tokens: Int64Array
    """What it has got."""
    num_cached_tokens: Int64Array
    """Those of its prompt that the prefix cache had when it was first scheduled."""
    num_preemptions: Int64Array
    outcome: Int8Array
    user_class: Int64Array
    """Which class of a workload it comes from; 0 without one."""
    model: Int64Array
    """Which of the server's models it names; 0 with one."""

    def __len__(self) -> int:
        """Return the number of requests."""
        return self.arrival_s.size

    def of(self, outcome: Outcome) -> "RequestLog":
        """Return the requests that ended so."""
        return self.where(self.outcome == outcome)

    def where(self, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> "RequestLog":
        """Return the entries that `mask` selects: this log itself if all are."""
        return self if mask.all() else RequestLog(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    def output_tokens_since(self, from_s: float) -> int:
        """Return the output tokens that came at `from_s` or later; those of a request count as if they had come evenly."""
        got = self.num_output_tokens > 0
        first_s, last_s, number = self.first_token_s[got], self.last_token_s[got], self.num_output_tokens[got]
        gaps = (number - 1) * (last_s - from_s) / np.where(last_s > first_s, last_s - first_s, 1.0)
        later = np.where(last_s >= from_s, np.floor(gaps) + 1, 0)
        return int(np.where(first_s >= from_s, number, later).sum())

    @classmethod
    def joined(cls, logs: Sequence["RequestLog"]) -> "RequestLog":
        """Return the entries of `logs`, one or more, by arrival; those that arrive together in the order of `logs`."""
        order = np.argsort(np.concatenate([log.arrival_s for log in logs]), kind="stable")
        return cls(**{f.name: np.concatenate([getattr(log, f.name) for log in logs])[order] for f in fields(cls)})

    @classmethod
    def refused(cls, arrival_s: Float64Array, rows: Int64Array, outcome: Outcome) -> "RequestLog":
        """Return requests, [prompt tokens, output tokens, user class] each, that nobody took at `arrival_s`."""
        never, nothing = np.full(arrival_s.size, np.nan), np.zeros(arrival_s.size, np.int64)
        return cls(
            arrival_s=arrival_s,
            scheduled_s=never,
            first_token_s=never,
            last_token_s=never,
            prompt_tokens=rows[:, 0],
            output_tokens=rows[:, 1],
            num_output_tokens=nothing,
            num_cached_tokens=nothing,
            num_preemptions=nothing,
            outcome=np.full(arrival_s.size, outcome, np.int8),
            user_class=rows[:, 2],
            model=nothing,
        )
