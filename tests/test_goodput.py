"""Latency goals: how they are written, and which requests keep them."""

import numpy as np
import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.goodput import GOAL_METRICS, Goal, parse_goals
from pagedkv.sims.latencies import Latencies


def test_goals_are_metric_and_milliseconds() -> None:
    assert parse_goals([]) == ()
    assert parse_goals(["ttft:2000", "tpot:0.5", "e2el:1e4"]) == (
        Goal(metric="ttft", limit_s=2.0),
        Goal(metric="tpot", limit_s=0.0005),
        Goal(metric="e2el", limit_s=10.0),
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["tftt:2000"], r"unknown goodput metric 'tftt': did you mean ttft .*Write metric:milliseconds, e.g. ttft:2000"),
        (["2000"], r"unknown goodput metric '2000': known: e2el, tpot, ttft"),
        ([""], r"unknown goodput metric ''"),
        (["ttft"], r"goodput 'ttft': '' is not a number of milliseconds above 0, e.g. ttft:2000"),
        (["ttft:2s"], r"goodput 'ttft:2s': '2s' is not a number"),
        (["tpot:0"], r"goodput 'tpot:0': '0' is not a number .* e.g. tpot:2000"),
        (["tpot:-5"], r"'-5' is not a number"),
        (["tpot:nan"], r"'nan' is not a number"),
        (["tpot:inf"], r"'inf' is not a number"),
        (["ttft:1:2"], r"'1:2' is not a number"),
        (["ttft:1", "tpot:5", "ttft:2"], r"goodput names ttft twice: give one limit"),
    ],
)
def test_a_malformed_goal_is_named_with_what_would_work(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_goals(texts)


def test_every_goal_must_be_kept() -> None:
    nan = float("nan")
    latencies = Latencies(
        ttft_s=np.array([1.0, 2.0, 2.001, 1.0, 1.0]),
        tpot_s=np.array([0.1, 0.1, 0.1, 0.101, nan]),  # the last has one output token: it cannot miss a goal for gaps
        e2e_s=np.array([9.0, 9.0, 9.0, 9.0, 9.5]),
    )
    assert latencies.meet(parse_goals(["ttft:2000", "tpot:100"])).tolist() == [True, True, False, False, True]
    assert latencies.meet(parse_goals(["e2el:9000"])).tolist() == [True, True, True, True, False]
    assert latencies.meet(()).all()
    assert set(GOAL_METRICS.values()) <= set(Latencies.__dataclass_fields__)
