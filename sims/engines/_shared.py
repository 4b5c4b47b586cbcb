"""What several presets need: what an engine of one version has, a memory plan, the longest request."""

from typing import NoReturn

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.vllm import VLLMLedger
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_plan import plan
from pagedkv.memory_request import Ledger, MemoryRequest
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.scheduler import SchedulerSettings
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.drafting import drafting_of
from pagedkv.units import parse_bytes
from pagedkv.weight_format import WeightFormat

DEFAULT_MAX_MODEL_LEN = 32_768
"""Where the user says nothing: a context of 128k tokens and more would be reserved for few."""


class OneVersion:
    """What an engine does that is modelled in one version only, and has no rule of admission of vLLM's kind."""

    __slots__ = ()
    name: str
    """What a user writes after --engine."""

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return its allocators, what it runs on first."""
        raise NotImplementedError

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

    def runs_eagerly(self, serving: ServingConfig) -> bool:
        """Return what the user says."""
        return serving.enforce_eager


def plan_with(
    ledger: Ledger,
    serving: ServingConfig,
    model: ModelSpec,
    weight_format: WeightFormat,
    hardware: HardwareSpec,
    limits: SchedulerSettings,
) -> MemoryBudget:
    """Return how `ledger` divides the machine's memory.

    Raises:
        ConfigError: If the engine would not start, with settings under which it would.
    """
    return plan(request_with(ledger, serving, model, weight_format, hardware, limits))


def request_with(
    ledger: Ledger,
    serving: ServingConfig,
    model: ModelSpec,
    weight_format: WeightFormat,
    hardware: HardwareSpec,
    limits: SchedulerSettings,
) -> MemoryRequest:
    """Return what `ledger` is asked, not checked yet.

    Raises:
        ConfigError: If a size is none.
    """
    drafting = drafting_of(serving, model, weight_format)
    return MemoryRequest(
        model=model,
        hardware=hardware,
        ledger=ledger,
        weight_format=weight_format,
        kv_cache_dtype=serving.kv_cache_dtype,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        enforce_eager=serving.enforce_eager,
        tensor_parallel_size=serving.tensor_parallel_size,
        draft=None if drafting is None else drafting.memory,
        free_memory_bytes=size_bytes(serving.free_memory, "free-memory"),
        os_reserve_bytes=size_bytes(serving.os_reserve, "os-reserve"),
        other_programs_bytes=parse_bytes(serving.other_programs, name="other-programs"),
    )


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


def size_bytes(text: str | None, name: str) -> int | None:
    """Return the bytes that `text` says, None where it says nothing."""
    return None if text is None else parse_bytes(text, name=name)


def longest_request(serving: ServingConfig, model: ModelSpec) -> int:
    """Return max-model-len: as asked for, else 32,768 or the model's limit if that is less.

    Raises:
        ConfigError: If the model was not made for that.
    """
    longest = min(DEFAULT_MAX_MODEL_LEN, model.max_context) if serving.max_model_len is None else serving.max_model_len
    if longest > model.max_context:
        raise ConfigError(f"max-model-len {longest} is more than {model.title} was made for: at most {model.max_context}")
    return longest
