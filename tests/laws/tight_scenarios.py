"""A machine with little memory, and which designs do what there."""

from dataclasses import replace
from typing import Any

from pagedkv.allocators import ALLOCATORS
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.step_allocation import step_allocator

LENGTHS: dict[str, Any] = {"random_input_len": 300, "random_output_len": 60, "random_range_ratio": 0.9}


def scenario(load: LoadConfig, *, num_blocks: int = 100, duration: str | None = None, **serving: Any) -> Scenario:
    """A Spark with few blocks and small pages: requests queue, are preempted and, if longer than 900 tokens, rejected."""
    limits = {"max_model_len": 900, "max_num_batched_tokens": 512, "num_gpu_blocks_override": num_blocks, **serving}
    if "model" not in serving:  # the other has state, which is not cached
        limits["offload_size"] = "1GiB"
    resolved = resolve(
        SimulationConfig(
            load=load,
            serving=ServingConfig(**limits),
            measurement=MeasurementConfig(allocator=ALLOCATORS.names(), duration=duration),
        )
    )
    deployment = resolved.deployment
    return replace(resolved, deployment=replace(deployment, pool=replace(deployment.pool, page_tokens=64)))


GROWS = {"contiguous-growing", "hybrid", "llama-cpp-unified", "paged", "paged-offload", "radix", "tensorrt-llm", "vattention"}
"""Here requests take slots as their tokens come. The others reserve what a request may ever hold."""

LESS_THAN_THE_POOL = {"llama-cpp-split"}
"""Here one request cannot have the whole pool: it has a server slot's part, and whoever is accepted finds a slot."""


def with_room(one: Scenario, name: str) -> Scenario:
    """Return `one` with as few places as it takes for a request of mean length: some designs divide the pool among the places."""
    deployment = one.deployment
    while step_allocator(name, deployment.pool_of(name)).admission_slots(300, 60) is None:
        places = deployment.scheduler.max_num_seqs // 2
        deployment = replace(
            deployment,
            pool=replace(deployment.pool, max_num_seqs=places),
            scheduler=replace(deployment.scheduler, max_num_seqs=places),
        )
    return replace(one, deployment=deployment)
