"""The largest number of users is the largest: it fits when it is run, and one more does not."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.errors import ConfigError
from pagedkv.sims import capacity
from pagedkv.sims.capacity import MOST_USERS, largest_users
from pagedkv.sims.command import changed
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve

TINY = SimulationConfig(
    load=LoadConfig(think_time="1s", random_input_len=400, random_output_len=60, random_range_ratio=0.5),
    serving=ServingConfig(hardware="rtx-4090", num_gpu_blocks_override=200, max_model_len=1024),
    measurement=MeasurementConfig(duration="20s", warmup="4s", goodput=("ttft:400", "tpot:40")),
)


def fits(config: SimulationConfig, users: int, allocator: str) -> bool:
    return simulate(resolve(changed(config, users=users, allocator=(allocator,)))).by_allocator[allocator].verdict.fits


@pytest.mark.parametrize("goals", [TINY.measurement.goodput, ()], ids=["goals", "no goals"])
@pytest.mark.parametrize("allocator", ["paged", "contiguous-max", "contiguous-oracle"])
def test_it_fits_and_one_more_does_not(allocator: str, goals: tuple[str, ...]) -> None:
    config = changed(TINY, goodput=goals)
    most = largest_users(config, allocator)
    assert most > 1
    assert fits(config, most, allocator)
    assert not fits(config, most + 1, allocator)


def test_paging_serves_more() -> None:
    assert largest_users(TINY, "paged") > largest_users(TINY, "contiguous-max")


@pytest.mark.parametrize(
    "changes", [{"goodput": ("ttft:0.001",)}, {"random_input_len": None, "random_output_len": None, "random_range_ratio": None}]
)
def test_nobody(changes: dict[str, Any]) -> None:
    """Nobody gets an answer that soon; and requests of the default lengths are longer than the context."""
    assert largest_users(changed(TINY, **changes), "paged") == 0


def test_what_the_allocators_of_the_configuration_are_does_not_matter() -> None:
    assert largest_users(changed(TINY, allocator=("contiguous-pow2",)), "paged") == largest_users(TINY, "paged")


@pytest.mark.parametrize("changes", [{"request_rate": 2.0}, {"model": "llama-3.1-70b"}, {"goodput": ("tfft:9",)}])
def test_what_cannot_work_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        largest_users(changed(TINY, **changes), "paged")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine that serves so many users as `limit` says, and the numbers of users that were tried on it."""
    machine: dict[str, Any] = {"limit": 0, "tried": []}

    def simulated(config: SimulationConfig) -> Any:
        users = config.load.users or 0
        machine["tried"].append(users)
        verdict = SimpleNamespace(fits=users <= machine["limit"])
        return SimpleNamespace(by_allocator={config.measurement.allocator[0]: SimpleNamespace(verdict=verdict)})

    monkeypatch.setattr(capacity, "resolve", lambda config: config)
    monkeypatch.setattr(capacity, "simulate", simulated)
    return machine


@given(data=st.data())
@settings(max_examples=200)
def check_search(asked: dict[str, Any], data: st.DataObject) -> None:
    asked["limit"] = limit = data.draw(st.integers(0, MOST_USERS - 1) | st.integers(0, 40))
    asked["tried"].clear()
    assert largest_users(TINY, "paged") == limit
    assert len(asked["tried"]) == len(set(asked["tried"])) <= 2 * limit.bit_length() + 1


def test_the_search_finds_any_limit_in_few_runs(asked: dict[str, Any]) -> None:
    check_search(asked)


@pytest.mark.parametrize("limit", [MOST_USERS, MOST_USERS + 1, 10**9])
def test_it_tries_no_more_users_than_the_most(limit: int, asked: dict[str, Any]) -> None:
    asked["limit"] = limit
    assert largest_users(TINY, "paged") == min(limit, MOST_USERS)
    assert max(asked["tried"]) <= MOST_USERS
