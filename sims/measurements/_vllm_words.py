"""What vLLM says of itself: weight formats and settings by their names here."""

from collections.abc import Mapping
from types import MappingProxyType

WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "fp8": "fp8",
        "modelopt": "fp8",
        "modelopt_fp4": "nvfp4",
        "mxfp4": "mxfp4",
        "awq": "int4",
        "awq_marlin": "int4",
        "gptq": "int4",
        "gptq_marlin": "int4",
    }
)
"""vLLM's --quantization by what it loads; others, such as compressed-tensors, can be anything."""
SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "gpu_memory_utilization": "gpu_memory_utilization",
        "max_model_len": "max_model_len",
        "max_seq_len": "max_model_len",
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "block_size": "block_size",
        "kv_cache_dtype": "kv_cache_dtype",
        "enforce_eager": "enforce_eager",
        "tensor_parallel_size": "tensor_parallel_size",
        "num_gpu_blocks_override": "num_gpu_blocks_override",
        "kv_cache_memory_bytes": "kv_cache_memory_bytes",
    }
)
"""Settings that say how memory is divided, by the field of `ServingConfig`."""


def settings_of(stated: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Return those of `SETTINGS` that are stated, as text; what is None or "None" is not."""
    found = {field: str(stated[name]) for name, field in SETTINGS.items() if str(stated.get(name)) not in ("None", "")}
    return tuple(found.items())
