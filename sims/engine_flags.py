"""Which settings only some engines have. What is not here, all have."""

from dataclasses import fields, replace
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.config import ServingConfig

_PAGED = ("vllm", "orca", "vattention")
_LLAMA_CPP = ("llama-cpp", "ollama")

ENGINE_FLAGS: dict[str, tuple[str, ...]] = {
    "block_size": _PAGED,
    "gpu_memory_utilization": _PAGED,
    "kv_cache_memory_bytes": _PAGED,
    "num_gpu_blocks_override": _PAGED,
    "offload_size": ("vllm",),
    "offload_tier": ("vllm",),
    "offload_bandwidth": ("vllm",),
    "watermark": ("vllm", "vattention"),
    "long_prefill_token_threshold": ("vllm",),
    "disable_hybrid_kv_cache_manager": ("vllm",),
    "scheduler_reserve_full_isl": ("vllm",),
    "enable_chunked_prefill": ("vllm", "sglang", "tensorrt-llm", "vattention"),
    "enable_prefix_caching": ("vllm", "sglang", "tensorrt-llm", *_LLAMA_CPP),
    "enforce_eager": (*_PAGED, "sglang", "tensorrt-llm"),
    "contiguous_heap": ("vllm", "orca", "naive"),
    "mem_fraction_static": ("sglang",),
    "page_size": ("sglang",),
    "schedule_policy": ("sglang",),
    "schedule_conservativeness": ("sglang",),
    "enable_mixed_chunk": ("sglang",),
    "radix_eviction_policy": ("sglang",),
    "capacity_scheduler_policy": ("tensorrt-llm",),
    "free_gpu_memory_fraction": ("tensorrt-llm",),
    "tokens_per_block": ("tensorrt-llm",),
    "ctx_size": _LLAMA_CPP,
    "parallel": _LLAMA_CPP,
    "kv_unified": ("llama-cpp",),
    "ubatch_size": _LLAMA_CPP,
    "swa_full": _LLAMA_CPP,
    "ctx_checkpoints": _LLAMA_CPP,
    "max_queue": ("ollama",),
    "max_loaded_models": ("ollama",),
    "keep_alive": ("ollama",),
    "disk_bandwidth": ("ollama",),
    "speculative_method": ("vllm", "sglang"),
    "speculative_model": ("vllm", "sglang"),
    "num_speculative_tokens": ("vllm", "sglang"),
    "acceptance_rate": ("vllm", "sglang"),
    "acceptance_spread": ("vllm", "sglang"),
}
"""By field of `ServingConfig`: the engines that have it."""


def engine_names(serving: ServingConfig) -> tuple[str, ...]:
    """Return the engines that `serving` names, each once, in its order.

    Raises:
        ConfigError: If it names none.
    """
    names = [name.strip() for name in serving.engine.split(",") if name.strip()]
    if not names:
        raise ConfigError("no engine given: write --engine vllm")
    return tuple(dict.fromkeys(names))


def refuse_flags_of_others(serving: ServingConfig) -> None:
    """Refuse settings that none of the engines has.

    Raises:
        ConfigError: With the engines that have it.
    """
    asked = {name.partition("@")[0] for name in engine_names(serving)}
    for name in _set_here(serving):
        if asked.isdisjoint(engines := ENGINE_FLAGS[name]):
            flag = f"--{name.replace('_', '-')} {getattr(serving, name)}"
            raise ConfigError(f"{flag}: {', '.join(sorted(asked))} has no such setting; it is for --engine {' or '.join(engines)}")


def of_one_engine(serving: ServingConfig, engine: str) -> ServingConfig:
    """Return what `serving`, which may name several engines, says to one of them: without settings that it does not have."""
    refuse_flags_of_others(serving)
    name, defaults = engine.partition("@")[0], ServingConfig()
    changes: dict[str, Any] = {each: getattr(defaults, each) for each in _set_here(serving) if name not in ENGINE_FLAGS[each]}
    return replace(serving, engine=engine, **changes)


def _set_here(serving: ServingConfig) -> list[str]:
    defaults = ServingConfig()
    names = (field.name for field in fields(serving) if field.name in ENGINE_FLAGS)
    return [name for name in names if getattr(serving, name) != getattr(defaults, name)]
