"""How many bits a weight takes, and what stays wide."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from pagedkv.errors import unknown_name

ComputeDtype = Literal["fp32", "bf16", "fp8", "fp4"]
Container = Literal["any", "safetensors", "gguf"]
"""Whose files have a format: a quantizer's for PyTorch, llama.cpp's, or both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way to store weights."""

    name: str
    """What a user writes after `--quantization`."""
    bits_per_weight: float
    """Bits of a quantized weight, its share of the scales included."""
    wide_bits: int
    """Bits of what stays unquantized: norms, biases, routers, and by default embeddings and output head."""
    dense_bits: float | None = None
    """Bits of the linear layers beside routed experts, in a model that has experts; None: `bits_per_weight`."""
    head_bits: float | None = None
    """Bits of the output head; None: `wide_bits`."""
    embedding_bits: float | None = None
    """Bits of input tables; None: `wide_bits`."""
    compute_dtype: ComputeDtype
    """What the matrix units multiply in; weight-only formats are widened to bf16 first."""
    container: Container = "safetensors"
    """Which files have it, and so which engines read it (`pagedkv.readable_formats`)."""
    source: str
    """Where the bits come from."""


def _gguf(name: str, bits: float, source: str) -> WeightFormat:
    """Return a format of llama.cpp, whose embeddings and head are quantized too and whose norms are 32 bits wide."""
    return WeightFormat(
        name=name,
        bits_per_weight=bits,
        wide_bits=32,
        head_bits=bits,
        embedding_bits=bits,
        compute_dtype="bf16",
        container="gguf",
        source=f"llama.cpp: {source}",
    )


_FORMATS = (
    WeightFormat(name="fp32", bits_per_weight=32, wide_bits=32, compute_dtype="fp32", container="any", source="IEEE 754 binary32"),
    WeightFormat(name="bf16", bits_per_weight=16, wide_bits=16, compute_dtype="bf16", container="any", source="bfloat16"),
    WeightFormat(name="fp16", bits_per_weight=16, wide_bits=16, compute_dtype="bf16", container="any", source="IEEE 754 binary16"),
    _gguf("q8_0", 8.5, "8 bits and a 16-bit scale per 32 weights"),
    WeightFormat(
        name="mxfp8",
        bits_per_weight=8.25,
        wide_bits=16,
        compute_dtype="fp8",
        source="OCP Microscaling 1.0: FP8 with an 8-bit scale per 32 weights, 8 + 8/32",
    ),
    WeightFormat(
        name="fp8",
        bits_per_weight=8,
        wide_bits=16,
        compute_dtype="fp8",
        source="E4M3; a scale per channel or per 128 x 128 weights is below 0.01 bit",
    ),
    WeightFormat(
        name="int8",
        bits_per_weight=8,
        wide_bits=16,
        compute_dtype="bf16",
        source="8-bit integers with a scale per output channel, weight-only",
    ),
    _gguf("q6_k", 6.5625, "210 bytes per 256 weights"),
    _gguf("q5_k_m", 5.7, "5.70 bits per weight for Llama-3.1-8B (tools/quantize/README.md): q5_k, some layers q6_k"),
    _gguf("q4_k_m", 4.85, "4.8 to 4.9 bits per weight (tools/quantize/README.md): q4_k, some layers and the head q6_k"),
    WeightFormat(
        name="nvfp4",
        bits_per_weight=4.5,
        wide_bits=16,
        compute_dtype="fp4",
        container="any",
        source="NVIDIA NVFP4: E2M1 with an FP8 scale per 16 weights, 4 + 8/16",
    ),
    WeightFormat(
        name="nvfp4+fp8",
        bits_per_weight=4.5,
        wide_bits=16,
        dense_bits=8,
        compute_dtype="fp4",
        source="routed experts as nvfp4, other linear layers as fp8",
    ),
    WeightFormat(
        name="int4+bf16",
        bits_per_weight=4.5,
        wide_bits=16,
        dense_bits=16,
        compute_dtype="bf16",
        source="routed experts as 4-bit integers in groups of 32 with a 16-bit scale, 4 + 16/32, the rest bf16: Kimi-K2.5",
    ),
    _gguf("q4_0", 4.5, "4 bits and a 16-bit scale per 32 weights"),
    replace(
        _gguf("q4_0+q8_0", 4.5, "4-bit integers of routed experts as they are in q4_0 (PR 17083), all else as q8_0: Kimi-K2.5"),
        dense_bits=8.5,
        head_bits=8.5,
        embedding_bits=8.5,
    ),
    replace(
        _gguf("nvfp4+q8_0", 4.5, "nvfp4 as it is, FP8 as q8_0 (convert_hf_to_gguf.py --fp8-as-q8)"),
        wide_bits=16,
        dense_bits=8.5,
        head_bits=None,
        embedding_bits=None,
    ),
    WeightFormat(
        name="mxfp4",
        bits_per_weight=4.25,
        wide_bits=16,
        dense_bits=16,
        compute_dtype="bf16",
        container="any",
        source="OCP Microscaling 1.0: E2M1 with an 8-bit scale per 32 weights, 4 + 8/32; in vLLM for routed experts",
    ),
    WeightFormat(
        name="mxfp4+q8_0",
        bits_per_weight=4.25,
        wide_bits=32,
        dense_bits=8.5,
        head_bits=8.5,
        embedding_bits=8.5,
        compute_dtype="bf16",
        container="gguf",
        source="llama.cpp's gpt-oss: routed experts as mxfp4, all else as q8_0; 11.27 GiB for 20b",
    ),
    WeightFormat(
        name="mxfp4-all",
        bits_per_weight=4.25,
        wide_bits=16,
        head_bits=4.25,
        compute_dtype="fp8",
        source="routed experts, other linear layers and head as mxfp4: vLLM built for the DGX Spark with "
        "--mxfp4-layers moe,qkv,o,lm_head (eugr/spark-vllm-docker)",
    ),
    WeightFormat(
        name="mxfp4+fp8",
        bits_per_weight=4.25,
        wide_bits=16,
        dense_bits=8,
        compute_dtype="fp8",
        source="routed experts as mxfp4, other linear layers as fp8: DeepSeek-V4",
    ),
    WeightFormat(
        name="int4",
        bits_per_weight=4.16,
        wide_bits=16,
        compute_dtype="bf16",
        source="AWQ, GPTQ in groups of 128: a 16-bit scale and a 4-bit zero point each, 4 + 20/128; weight-only",
    ),
)

WEIGHT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType({fmt.name: fmt for fmt in _FORMATS})
"""Every weight format by its name, widest first."""

_ALIASES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "modelopt": "fp8",
    "fbgemm_fp8": "fp8",
    "modelopt_fp4": "nvfp4",
    "awq": "int4",
    "gptq": "int4",
    "awq_marlin": "int4",
    "gptq_marlin": "int4",
}


def load_weight_format(name: str) -> WeightFormat:
    """Return the weight format of that name, or of vLLM's name for it (`awq`, `modelopt_fp4`, ...).

    Raises:
        ConfigError: If there is none, with the nearest names.
    """
    key = name.lower()
    try:
        return WEIGHT_FORMATS[_ALIASES.get(key, key)]
    except KeyError:
        raise unknown_name("--quantization", name, (*WEIGHT_FORMATS, *_ALIASES)) from None
