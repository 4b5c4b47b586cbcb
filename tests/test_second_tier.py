"""A second tier in a simulation: what comes back from it, what its copies take, and what is refused."""

from typing import Any

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.engine_comparison import scenarios
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.serve_command import serve_command
from pagedkv.sims.step_formula import CopyCoefficients, beside_copies
from pagedkv.sims.step_time import StepCost

TIGHT: dict[str, Any] = {"kv_cache_memory_bytes": "4GiB", "max_model_len": 16384, "offload_size": "100GiB"}


def config(*, allocator: tuple[str, ...] | None = None, **serving: Any) -> SimulationConfig:
    return SimulationConfig(
        load=LoadConfig(workload="chat", users=20),
        serving=ServingConfig(**TIGHT | serving),
        measurement=MeasurementConfig(duration="400s", warmup="20s", allocator=allocator),
    )


@pytest.fixture(scope="module")
def both() -> dict[str, dict[str, Any]]:
    results = simulate(resolve(config(allocator=("paged-offload", "paged"))))
    return {name: result.figures for name, result in results.by_allocator.items()}


def test_what_left_the_cache_comes_back_from_the_tier_instead_of_being_computed(both: dict[str, dict[str, Any]]) -> None:
    with_tier, without = both["paged-offload"], both["paged"]
    assert with_tier["prefix_hit_rate"] > without["prefix_hit_rate"] + 0.05
    assert min(with_tier["num_loaded_tokens"], with_tier["num_offloaded_tokens"]) > 0
    assert with_tier["ttft_s"]["mean"] < without["ttft_s"]["mean"]
    assert without["num_loaded_tokens"] is without["num_offloaded_tokens"] is None


def test_a_disk_that_is_too_slow_costs_more_than_it_spares(both: dict[str, dict[str, Any]]) -> None:
    slow = simulate(resolve(config(allocator=("paged-offload",), offload_bandwidth="20MB/s"))).by_allocator["paged-offload"]
    assert slow.figures["ttft_s"]["mean"] > 3 * both["paged"]["ttft_s"]["mean"]


def test_a_tier_that_keeps_nothing_long_enough_changes_nothing_but_the_time_of_its_copies() -> None:
    """One block, overwritten by the next: it has what a prompt begins with only by chance."""
    block = deploy(ServingConfig()).budget.block_bytes
    tiny, without = (
        simulate(resolve(config(allocator=(name,), offload_size=str(block)))).by_allocator[name].figures
        for name in ("paged-offload", "paged")
    )
    assert tiny["num_loaded_tokens"] <= 16 * 20
    assert tiny["prefix_hit_rate"] == pytest.approx(without["prefix_hit_rate"], abs=0.01)


def test_copies_run_beside_a_step_and_it_waits_for_the_rest() -> None:
    cost = StepCost(0.02, 0.01, 0.01, 0.5, 0.25)
    disk, link = CopyCoefficients(0.01, 0.001, both_at_once=False), CopyCoefficients(0.01, 0.0, both_at_once=True)
    assert beside_copies(disk, (*cost,), 0, 0) == (*cost,)
    assert beside_copies(disk, (*cost,), 2, 1) == (*cost,)  # 31 ms of 40
    assert beside_copies(disk, (*cost,), 3, 4)[0] == pytest.approx(0.02 + 0.071 - 0.04)
    assert beside_copies(disk, (*cost,), 3, 4)[1:] == (*cost,)[1:]
    assert beside_copies(link, (*cost,), 3, 4) == (*cost,)  # 40 ms: both ways at once
    assert beside_copies(link, (*cost,), 3, 5)[0] == pytest.approx(0.03)


def test_the_columns_begin_with_what_was_asked_for() -> None:
    assert resolve(config()).allocators == ("paged-offload", "paged", "contiguous-max", "contiguous-oracle")
    ready, _ = scenarios(config(engine="vllm,sglang"))
    assert ready["vllm"].allocators == ("paged-offload", "paged")


@pytest.mark.parametrize(
    ("serving", "why"),
    [
        ({"offload_tier": "host"}, "host memory is the memory that the KV cache is in.*nvme"),
        ({"offload_tier": "tape"}, "'tape'.*host.*nvme"),
        ({"offload_size": "1kB"}, "no room for a block"),
        ({"offload_size": "much"}, "--offload-size"),
        ({"offload_bandwidth": "0GB/s"}, "needs more than 0"),
        ({"offload_bandwidth": "fast"}, "--offload-bandwidth"),
        ({"offload_size": None, "offload_tier": "nvme"}, "--offload-tier nvme.*add --offload-size"),
        ({"enable_prefix_caching": False}, "needs prefix caching"),
        ({"hardware": "h100-80gb"}, "link to the host's memory of .*--offload-bandwidth 25GB/s"),
        ({"hardware": "h100-80gb", "offload_tier": "nvme"}, "how fast the disk of .*--offload-bandwidth 5GB/s"),
        ({"engine": "sglang", "kv_cache_memory_bytes": None}, "--offload-size 100GiB: sglang has no such setting"),
        ({"model": "qwen3-next-80b-a3b", "quantization": "nvfp4"}, "layers with a state are not cached"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_with_what_would_work(serving: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        deploy(ServingConfig(**TIGHT | serving))


def test_a_card_has_a_tier_in_its_host_s_memory_at_the_rate_that_is_said() -> None:
    deployment = deploy(ServingConfig(**TIGHT, hardware="h100-80gb", offload_bandwidth="50GB/s"))
    assert deployment.tier is not None
    copies = deployment.step_time.coefficients.copies
    assert deployment.tier.title == f"second tier {deployment.tier.num_blocks:,} blocks, host, 50 GB/s (--offload-bandwidth)"
    assert (deployment.tier.kind, copies.both_at_once, copies.latency_s) == ("host", True, 0.0)
    assert copies.block_s == pytest.approx(deployment.budget.block_bytes / 50e9)
    assert deployment.pool_of("paged-offload").offload_blocks == (100 << 30) // deployment.budget.block_bytes


def test_vllm_s_command_does_not_pass_over_a_tier() -> None:
    with pytest.raises(ConfigError, match="--offload-size"):
        serve_command(ServingConfig(**TIGHT))
