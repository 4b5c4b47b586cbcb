"""The comparison table says what the verdict says, and names what differs from it."""

import pytest

from pagedkv.sims.comparison import comparison
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve


def test_the_share_that_meets_the_goals_is_the_verdict_s() -> None:
    """What the end of the run cuts off is a miss of goodput alone: both shares are there, each under its own name."""
    config = SimulationConfig(
        load=LoadConfig(users=20, think_time="2s", random_input_len=200, random_output_len=100),
        serving=ServingConfig(hardware="h100", max_model_len=2048),
        measurement=MeasurementConfig(duration="20s", warmup="2s", goodput=("ttft:2000", "tpot:100"), allocator=("paged",)),
    )
    document = simulate(resolve(config)).document()
    (result,) = document["results"]
    lines = {row.label: row.values for row in comparison(document)}
    attained = result["verdict"]["attained"]
    assert lines["meet the goals"] == (f"{100 * attained:.1f} %",)
    assert f"{attained:.1%} of requests meet the goals" in result["verdict"]["text"]
    assert lines["goodput, of all requests"] == (f"{100 * result['goodput_share']:.1f} %",)
    assert result["num_unfinished"] > 0
    assert result["goodput_share"] < attained
    known = result["num_injected"] - result["num_unfinished"]  # nobody of these is beyond a goal yet
    assert attained == pytest.approx(result["goodput_share"] * result["num_injected"] / known)
