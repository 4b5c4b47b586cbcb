"""Latency goals: what counts as served well."""

from collections.abc import Iterable
from dataclasses import dataclass

from pagedkv.errors import ConfigError, unknown_name

GOAL_METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
"""Metrics a goal can name, as in `vllm bench serve --goodput`, and ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """An upper bound of one metric that a request must keep."""

    metric: str
    """ttft, tpot or e2el."""
    limit_s: float
    """The bound, in seconds."""


def parse_goals(texts: Iterable[str]) -> tuple[Goal, ...]:
    """Return the goals in e.g. ["ttft:2000", "tpot:100"]: metric and milliseconds.

    Raises:
        ConfigError: If one is malformed, names an unknown metric, or comes twice.
    """
    goals: dict[str, Goal] = {}
    for text in texts:
        metric, _, limit = text.partition(":")
        if metric not in GOAL_METRICS:
            raise unknown_name("goodput metric", metric, GOAL_METRICS, hint="Write metric:milliseconds, e.g. ttft:2000.")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = -1.0
        if not 0 < limit_ms < float("inf"):
            raise ConfigError(f"goodput {text!r}: {limit!r} is not a number of milliseconds above 0, e.g. {metric}:2000")
        if metric in goals:
            raise ConfigError(f"goodput names {metric} twice: give one limit")
        goals[metric] = Goal(metric=metric, limit_s=limit_ms / 1e3)
    return tuple(goals.values())
