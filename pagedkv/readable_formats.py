"""Which weight formats an engine reads, and in which it has a model's weights where nobody asks for one."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pagedkv.errors import ConfigError
from pagedkv.weight_format import WEIGHT_FORMATS, Container, WeightFormat

ENGINE_CONTAINERS: Mapping[str, tuple[Container, ...]] = MappingProxyType(
    {
        "llama-cpp": ("any", "gguf"),
        "ollama": ("any", "gguf"),
        "sglang": ("any", "safetensors", "gguf"),
        "vllm@0.19": ("any", "safetensors", "gguf"),
    }
)
"""Which files an engine reads, where that is not what PyTorch has. llama.cpp and Ollama know GGUF alone; SGLang reads it, too
(`--quantization gguf`); vLLM did so until 0.23, and has a plugin since, which is not modelled (vllm-project/vllm PR 39612);
transformers widens it while it loads. Source: the engines' documentation, August 2026."""
_PYTORCH: tuple[Container, ...] = ("any", "safetensors")

OLLAMA_FORMAT = "q4_k_m"
"""What Ollama's library holds under a model's plain name. Source: ollama/ollama issue 1543, "The default is now q4_k_m" (December
2024), and 8989. Estimated for the whole library: some older names are still q4_0, and some of the smallest models q8_0."""
_OLLAMA_OWN = ("mxfp4",)
"""What its library keeps as it is: gpt-oss. Source: its page there, 14 and 65 GB: all beside the experts is 16 bits wide."""

_GGUF_OF = {"mxfp4": "mxfp4+q8_0", "mxfp4+fp8": "mxfp4+q8_0", "nvfp4+fp8": "nvfp4+q8_0", "int4+bf16": "q4_0+q8_0"}
"""What stands in a GGUF for formats of several parts. Source: ggml-org's gpt-oss-20b-GGUF, "MXFP4 MoE" in llama-bench; llama.cpp's
convert_hf_to_gguf.py for FP8 (--fp8-as-q8), and ggml-org/llama.cpp PR 17083 for the 4-bit integers of Kimi-K2."""


def default_format(engine: str, native: WeightFormat) -> WeightFormat:
    """Return the format in which `engine` has weights of the format `native` where nobody asks for one.

    That is the model's own, but for engines that know GGUF alone: llama.cpp has a GGUF of the model's own weights, and Ollama
    what its library holds.
    """
    if engine == "ollama":
        return native if native.name in _OLLAMA_OWN else WEIGHT_FORMATS[OLLAMA_FORMAT]
    if "safetensors" in ENGINE_CONTAINERS.get(engine, _PYTORCH):
        return native
    return as_gguf(native)


def as_gguf(native: WeightFormat) -> WeightFormat:
    """Return what weights of the format `native` are in a GGUF that keeps their values, or comes as near as it can.

    Of formats that no GGUF has it is the narrowest of whole models that is at least as wide: FP8 becomes q8_0, which llama.cpp's
    convert_hf_to_gguf.py writes with --fp8-as-q8 (without it bf16, of twice the size).
    """
    if native.name in _GGUF_OF:
        return WEIGHT_FORMATS[_GGUF_OF[native.name]]
    if native.container != "safetensors":
        return native
    plain = [fmt for fmt in WEIGHT_FORMATS.values() if fmt.container == "gguf" and fmt.dense_bits is None]
    return next((fmt for fmt in reversed(plain) if fmt.bits_per_weight >= native.bits_per_weight), plain[0])


def check_readable(weight_format: WeightFormat, engine: str, *, proposed: Iterable[str]) -> None:
    """Refuse a format of whose files `engine` reads none; `proposed` are formats that it does.

    Raises:
        ConfigError: With formats that it reads, and engines that read this one.
    """
    if weight_format.container in ENGINE_CONTAINERS.get(engine, _PYTORCH):
        return
    wide = [name for name, fmt in WEIGHT_FORMATS.items() if fmt.container == "any"]
    ours = ", ".join(dict.fromkeys((*wide, *proposed)))
    if weight_format.container == "gguf":
        whose, readers = "a format of GGUF files", "llama-cpp, ollama or sglang"
    else:
        whose, readers = "a format of PyTorch's files, and it reads GGUF", "vllm, sglang or tensorrt-llm"
    raise ConfigError(
        f"--quantization {weight_format.name}: {engine} does not read it, {whose}. It reads {ours}; {weight_format.name} is for "
        f"--engine {readers}"
    )
