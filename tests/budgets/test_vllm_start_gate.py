"""Which share of the memory vLLM starts with."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_budgets import GIB, SPARK_VISIBLE, plan, suggestions

from pagedkv.errors import ConfigError
from pagedkv.ledgers.vllm import highest_utilization_that_starts, start_gate


@pytest.mark.parametrize(
    ("utilization", "asked_gib", "starts"),
    [(0.92, 111.95, False), (0.87, 105.87, False), (0.85, 103.44, False), (0.83, 101.00, True)],
)
def test_start_gate_of_a_spark_with_102_gib_free(utilization: float, asked_gib: float, starts: bool) -> None:
    free = int(102.2 * GIB)
    assert round(math.ceil(SPARK_VISIBLE * utilization) / GIB, 2) == asked_gib
    assert start_gate(visible=SPARK_VISIBLE, free=free, utilization=utilization) is starts
    if starts:
        assert plan(gpu_memory_utilization=utilization, free_memory_bytes=free).requested <= free
        return
    with pytest.raises(ConfigError) as caught:
        plan(gpu_memory_utilization=utilization, free_memory_bytes=free)
    message = str(caught.value)
    for number in ("121.69 GiB", f"{asked_gib:.2f} GiB", "102.20 GiB", "0.83 is the highest that starts"):
        assert number in message
    assert "MemAvailable falls to 1.20 GiB" in message  # with 0.83, or with what 0.83 would be refused for
    assert suggestions(caught.value)[0] == {"gpu_memory_utilization": 0.77}


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_the_gate_rounds_what_it_asks_up_and_lets_the_exact_amount_pass(spare: int) -> None:
    assert start_gate(visible=1001, free=501 + spare, utilization=0.5) is (spare >= 0)


@given(visible=st.integers(1, 2**40), free=st.integers(0, 2**40))
def test_the_named_utilization_is_the_highest_hundredth_that_starts(visible: int, free: int) -> None:
    highest = highest_utilization_that_starts(visible=visible, free=free)
    assert highest == 0 or start_gate(visible=visible, free=free, utilization=highest)
    if highest < 1:
        assert not start_gate(visible=visible, free=free, utilization=highest + 0.01)


def test_unified_memory_checks_the_operating_system_but_never_subtracts_it() -> None:
    headless, desktop = plan(), plan(os_reserve_bytes=7 * GIB, other_programs_bytes=3 * GIB)
    assert headless.kv_cache == desktop.kv_cache
    assert (headless.os_reserve, desktop.os_reserve) == (4 * GIB, 7 * GIB)
    assert headless.unassigned - desktop.unassigned == 6 * GIB
    assert headless.free_at_start == headless.visible - 4 * GIB


def test_known_free_memory_shows_what_the_operating_system_really_holds() -> None:
    free = int(102.2 * GIB)
    budget = plan(gpu_memory_utilization=0.8, free_memory_bytes=free, other_programs_bytes=5 * GIB)
    assert budget.other_programs == 5 * GIB
    assert budget.os_reserve == budget.visible - free - 5 * GIB
    explained = plan(free_memory_bytes=free, other_programs_bytes=40 * GIB)
    assert (explained.other_programs, explained.os_reserve) == (explained.visible - free, 0)
    discrete = plan("llama-3.1-8b", "rtx-4090", free_memory_bytes=23 * GIB)
    assert (discrete.os_reserve, discrete.other_programs) == (0, discrete.visible - 23 * GIB)


@pytest.mark.parametrize(
    ("chosen", "warned"),
    [
        ({"gpu_memory_utilization": 0.80}, False),
        ({"gpu_memory_utilization": 0.90}, False),
        ({"gpu_memory_utilization": 0.91}, True),
        ({"gpu_memory_utilization": 0.80, "os_reserve_bytes": 16 * GIB, "other_programs_bytes": GIB}, True),
        ({"gpu_memory_utilization": 0.83, "free_memory_bytes": int(102.2 * GIB)}, True),
        ({"kv_cache_memory_bytes": 80 * GIB}, False),
        ({"kv_cache_memory_bytes": 90 * GIB}, True),
        ({"hardware": "h100", "gpu_memory_utilization": 0.99}, False),
    ],
)
def test_a_machine_near_its_floor_is_warned_of(chosen: dict[str, Any], warned: bool) -> None:
    budget = plan(**chosen)
    assert bool(budget.warnings) is warned
    for warning in budget.warnings:
        assert "8.00 GiB" in warning
        if named := re.search(r"--gpu-memory-utilization ([0-9.]+) leaves enough", warning):
            assert not plan(**{**chosen, "gpu_memory_utilization": float(named[1])}).warnings
        else:
            assert "kv_cache_memory_bytes" in chosen
