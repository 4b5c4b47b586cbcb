"""What several presets need: what an engine of one version has, vLLM's memory rule, the longest request."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.vllm import VLLMLedger
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.config import ServingConfig
from pagedkv.units import size_bytes

DEFAULT_MAX_MODEL_LEN = 32_768
"""Where the user says nothing: a context of 128k tokens and more would be reserved for few."""


class OneVersion(ABC):
    """What an engine does that is modelled in one version only, and has no rule of admission of vLLM's kind."""

    __slots__ = ()
    name: str
    """What a user writes after --engine."""

    @abstractmethod
    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return its allocators, what it runs on first."""

    def at(self, engine: str) -> NoReturn:
        """Refuse any version.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"--engine {engine}: {self.name} is modelled in one version; write --engine {self.name}")

    def columns(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return all its allocators: they are what it offers."""
        return self.allocators(serving)

    def default_utilization(self, hardware: HardwareSpec) -> float:
        """Return the machine's: this engine does not look at it."""
        return hardware.default_utilization.value

    def admission(self, serving: ServingConfig) -> tuple[bool, bool]:
        """Return vLLM's rules: what the engine's own scheduler does instead is not among them."""
        del serving
        return True, True

    def derived_settings(self, serving: ServingConfig) -> Mapping[str, Any]:
        """Return none: each of its settings is decided alone."""
        del serving
        return {}

    def runs_eagerly(self, serving: ServingConfig) -> bool:
        """Return what the user says."""
        return serving.enforce_eager


def vllm_ledger(serving: ServingConfig, default_utilization: float, *, cuda_graphs_set_aside: bool = True) -> VLLMLedger:
    """Return vLLM's memory rule, which the research engines built on it share, with what the user set."""
    utilization = serving.gpu_memory_utilization
    return VLLMLedger(
        block_size=serving.block_size,
        gpu_memory_utilization=default_utilization if utilization is None else utilization,
        kv_cache_memory_bytes=size_bytes(serving.kv_cache_memory_bytes, "kv-cache-memory-bytes"),
        num_gpu_blocks_override=serving.num_gpu_blocks_override,
        cuda_graphs_set_aside=cuda_graphs_set_aside,
    )


def longest_request(serving: ServingConfig, model: ModelSpec) -> int:
    """Return max-model-len: as asked for, else 32,768 or the model's limit if that is less.

    Raises:
        ConfigError: If the model was not made for that.
    """
    longest = min(DEFAULT_MAX_MODEL_LEN, model.max_context) if serving.max_model_len is None else serving.max_model_len
    if longest > model.max_context:
        raise ConfigError(f"max-model-len {longest} is more than {model.title} was made for: at most {model.max_context}")
    return longest
