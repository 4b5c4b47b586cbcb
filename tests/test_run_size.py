"""What is said before a run of many users: what it takes of this computer, or that it cannot be."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims import run_size
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, SimulationConfig
from pagedkv.sims.run_size import check_size, memory_here, users_of
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.units import GIB


def scenario(repeats: int = 1, **load: Any) -> Scenario:
    measurement = MeasurementConfig(allocator=("paged",), repeats=repeats)
    return resolve(SimulationConfig(load=LoadConfig(**load), measurement=measurement))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Memory of this computer and what is available of it, to be changed."""
    sizes: list[int | None] = [16 * GIB, 8 * GIB]
    monkeypatch.setattr(run_size, "memory_here", lambda: tuple(sizes))
    return sizes


def test_only_what_is_long_or_large_is_worth_a_word(here: list[int | None]) -> None:
    assert check_size([scenario(users=100)]) is None
    assert check_size([scenario(users=100_000)]) is None
    said = check_size([scenario(users=1_000_000)])
    assert said is not None
    assert "1,000,000 users take about 4.66 GiB" in said
    assert "available" not in said
    assert check_size([scenario(users=100_000)] * 5) is not None, "runs come one after the other"
    assert check_size([scenario(users=100_000, repeats=5)]) is not None
    here[1] = GIB // 4
    said = check_size([scenario(users=100_000)])
    assert said is not None
    assert "more than the 0.25 GiB that are available" in said
    here[:] = [None, None]
    assert check_size([scenario(users=100_000)]) is None


def test_more_than_the_memory_is_refused_with_a_number_that_fits(here: list[int | None]) -> None:
    here[:] = [2 * GIB, GIB]
    with pytest.raises(ConfigError, match=r"4\.66 GiB of memory, and this computer has 2\.00 GiB; --users \d+ would do") as refused:
        check_size([scenario(users=1_000_000)])
    check_size([scenario(users=int(str(refused.value).split()[-3]))])
    with pytest.raises(ConfigError, match="--users 500000"):
        check_size([scenario(users=500_000, workload="chat")])


def test_people_count_and_requests_that_arrive_by_themselves_do_not(here: list[int | None]) -> None:
    here[:] = [1, 1]
    assert users_of(scenario(users=7)) == users_of(scenario(users=7, workload="chat")) == 7
    assert users_of(scenario(request_rate=1.0)) == 0
    assert check_size([scenario(request_rate=1.0, num_prompts=10**6)]) is None
    assert check_size([]) is None


def test_this_computer_has_memory() -> None:
    total, available = memory_here()
    assert total is None or total > 0
    assert available is None or total is None or 0 < available <= total


@pytest.mark.parametrize("engines", ["vllm", "vllm,ollama"])
def test_a_refusal_leaves_no_folder(
    engines: str, here: list[int | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here[:] = [100_000, 100_000]
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(f"--users 1000 --engine {engines} --out {tmp_path}/run"))
    assert stopped.value.code == 2
    assert "this computer has 0.00 GiB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
