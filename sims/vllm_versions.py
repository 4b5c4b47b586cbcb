"""What differs between the versions of vLLM that can be simulated: `--engine vllm@0.19` beside `vllm`, which is 0.33."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pagedkv.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMVersion:
    """The rules of one version. What is not here is alike in all of them."""

    name: str
    """As written behind `vllm@`."""
    reserve_full_isl: bool
    """Admit a request only if all its known tokens fit, unless --scheduler-reserve-full-isl says otherwise."""
    freed_to_front: bool
    """Blocks freed without a key are handed out next; if not, all freed blocks go to the back of the queue."""
    has_watermark: bool
    """There is a --watermark. Source: vLLM PR 44594."""
    gpu_memory_utilization: float
    """Share of the visible memory taken without --gpu-memory-utilization. Source: CacheConfig."""
    cuda_graphs_set_aside: bool
    """The graphs' memory is estimated before the KV cache is sized; if not, they are captured on top of what utilization gives.

    Source: on by default since 0.21 (VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS).
    """
    knows_gb10: bool
    """The GB10 counts as a device of small compute, with its smaller default limits of a step; if not, its memory counts alone.

    Source: EngineArgs.
    """


_VERSIONS = (
    VLLMVersion(
        name="0.19",
        reserve_full_isl=False,
        freed_to_front=False,
        has_watermark=False,
        gpu_memory_utilization=0.9,
        cuda_graphs_set_aside=False,
        knows_gb10=False,
    ),
    VLLMVersion(
        name="0.33",
        reserve_full_isl=True,
        freed_to_front=True,
        has_watermark=True,
        gpu_memory_utilization=0.92,
        cuda_graphs_set_aside=True,
        knows_gb10=True,
    ),
)

VLLM_VERSIONS: Mapping[str, VLLMVersion] = MappingProxyType({version.name: version for version in _VERSIONS})
"""Every version by its name, the oldest first."""
CURRENT = _VERSIONS[-1]
"""What `vllm` without a version means."""


def vllm_version(engine: str) -> VLLMVersion:
    """Return the version that `engine`, such as "vllm" or "vllm@0.19", names.

    Raises:
        ConfigError: If there is no such version, with those that there are.
    """
    _, at, name = engine.partition("@")
    if not at:
        return CURRENT
    if name not in VLLM_VERSIONS:
        raise ConfigError(
            f"unknown version {name!r} of engine vllm: the versions are {', '.join(VLLM_VERSIONS)}; "
            f"use {' or '.join(f'vllm@{each}' for each in VLLM_VERSIONS)} (vllm alone is {CURRENT.name})"
        )
    return VLLM_VERSIONS[name]
