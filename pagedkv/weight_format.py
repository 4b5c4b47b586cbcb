"""How many bits a weight takes, and what stays wide."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pagedkv.errors import unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way to store weights."""

    name: str
    """What a user writes after `--quantization`."""
    bits_per_weight: float
    """Bits of a quantized weight, its share of the scales included."""
    wide_bits: int
    """Bits of what stays unquantized: embeddings, output head, norms, biases, routers."""
    compute_dtype: Literal["fp32", "bf16", "fp8", "fp4"]
    """What the matrix units multiply in; weight-only formats are widened to bf16 first."""
    scope: Literal["linear", "experts"] = "linear"
    """What is quantized: every linear layer, or only the routed experts where a model has any."""
    source: str
    """Where the bits come from."""


_FORMATS = (
    WeightFormat(name="fp32", bits_per_weight=32, wide_bits=32, compute_dtype="fp32", source="IEEE 754 binary32"),
    WeightFormat(name="bf16", bits_per_weight=16, wide_bits=16, compute_dtype="bf16", source="bfloat16, no scales"),
    WeightFormat(name="fp16", bits_per_weight=16, wide_bits=16, compute_dtype="bf16", source="IEEE 754 binary16"),
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
    WeightFormat(
        name="nvfp4",
        bits_per_weight=4.5,
        wide_bits=16,
        compute_dtype="fp4",
        source="NVIDIA NVFP4: E2M1 with an FP8 scale per 16 weights, 4 + 8/16",
    ),
    WeightFormat(
        name="mxfp4",
        bits_per_weight=4.25,
        wide_bits=16,
        compute_dtype="bf16",
        scope="experts",
        source="OCP Microscaling 1.0: E2M1 with an 8-bit scale per 32 weights, 4 + 8/32; in vLLM for routed experts",
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
