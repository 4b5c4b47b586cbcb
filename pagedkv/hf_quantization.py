"""How the weights of a config.json are stored: its dtype, or its quantization_config as several tools write it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from pagedkv.hf_fields import ConfigFields
from pagedkv.weight_format import WEIGHT_FORMATS, WeightFormat

_DTYPES = {"": "bf16", "auto": "bf16", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
_ALGORITHMS = {"fp8": "fp8", "nvfp4": "nvfp4", "w4a16_nvfp4": "nvfp4", "mxfp4": "mxfp4", "mxfp8": "mxfp8", "int8": "int8"}
_METHODS = ("awq", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4")

_EXPERTS = re.compile(r"(?<!shared_)experts\b")
_ATTENTION = re.compile(r"(attn|attention|mixer)(\W*$|\.\w*(q|k|v|o|out|in)(_[ab])?_proj\w*$)")
_FEED_FORWARD = re.compile(r"(mlp|ffn|shared_experts?)(\W*$|.*(gate|up|down)_proj|.*(gate\|up))")
_LAYER = re.compile(r"layers?\.(\d+)")


class LinearParams(NamedTuple):
    """Weights that a checkpoint may quantize, apart from routed experts and output head."""

    mixers: int
    """Of attention, linear attention and Mamba."""
    feed_forwards: int
    """Of dense and shared feed-forward parts."""
    num_layers: int
    """Layers of the model."""
    mixer_layers: int
    """Those with a mixer."""
    feed_forward_layers: int
    """Those with a feed-forward part."""
    has_experts: bool
    """Whether there are routed experts beside them."""


def native_format(fields: ConfigFields, quantization: ConfigFields | None, params: LinearParams) -> WeightFormat:
    """Return how the weights are stored.

    Args:
        fields: The text model's fields.
        quantization: Its quantization_config, None if it has none.
        params: What may be quantized: a part that the file exempts counts at 16 bits, so that the format states a mean.

    Raises:
        ConfigError: For a dtype or a method that is not known; it names the field.
    """
    if quantization is None:
        dtype = fields.text("dtype", "torch_dtype").removeprefix("torch.")
        if dtype not in _DTYPES:
            raise fields.error("torch_dtype", f"is {dtype[:40]!r}: needs bfloat16, float16 or float32")
        return WEIGHT_FORMATS[_DTYPES[dtype]]
    listed = quantization.section("quantized_layers")
    experts_only = fields.text("expert_dtype", default=quantization.text("expert_dtype"))
    if listed is not None:
        return _listed(quantization, listed.table, params)
    base = _base_format(quantization)
    if base.name == "fp8" and experts_only == "fp4":
        return WEIGHT_FORMATS["mxfp4+fp8"]
    exempt = [name for key in ("ignore", "exclude_modules", "modules_to_not_convert") for name in quantization.items(key) or ()]
    patterns = [re.sub(r"^re:|[\\^$]", "", name) for name in exempt if isinstance(name, str)]
    wide, bits = base.wide_bits, base.bits_per_weight if base.dense_bits is None or not params.has_experts else base.dense_bits
    mixer_bits, feed_forward_bits = (
        bits + min(1.0, _exempt_layers(patterns, part, params.num_layers) / max(layers, 1)) * (wide - bits)
        for part, layers in ((_ATTENTION, params.mixer_layers), (_FEED_FORWARD, params.feed_forward_layers))
    )
    return _combined(base, mixer_bits, feed_forward_bits, None, params)


def _base_format(quantization: ConfigFields) -> WeightFormat:
    """Return the format of what is quantized at all."""
    method = quantization.text("quant_method", default="modelopt" if quantization.has("quant_algo") else "").lower()
    algorithm = quantization.text("quant_algo").lower()
    if method in ("fp8", "fbgemm_fp8", "mxfp4"):
        return WEIGHT_FORMATS["mxfp4" if method == "mxfp4" else "fp8"]
    if method in ("awq", "gptq"):
        bits = quantization.integer("bits", "w_bit", maximum=8)
        group = quantization.integer("group_size", "q_group_size", default=128, minimum=-1)
        return _integer_format(bits, group, zero_point=True)
    if method == "modelopt" and algorithm in _ALGORITHMS:
        return WEIGHT_FORMATS[_ALGORITHMS[algorithm]]
    if method in ("modelopt", "compressed-tensors"):
        return _group_format(quantization)
    raise quantization.error("quant_method", f"is {method[:40]!r}: needs one of {', '.join(_METHODS)}")


def _group_format(quantization: ConfigFields) -> WeightFormat:
    """Return the format of the first of `config_groups`."""
    groups = quantization.section("config_groups")
    first = None if groups is None else next(iter(groups.table), None)
    group = None if groups is None or first is None else groups.section(first)
    weights = None if group is None else group.section("weights")
    if weights is None:
        raise quantization.error("config_groups", "is missing or has no weights: needs num_bits, type and group_size")
    bits, kind = weights.integer("num_bits", maximum=16), weights.text("type", default="int")
    size = weights.integer("group_size", default=-1, minimum=-1)
    if kind == "float" and bits in (4, 8):
        return WEIGHT_FORMATS["fp8" if bits == 8 else "nvfp4" if size == 16 else "mxfp4"]
    if kind == "int" and bits <= 8:
        return _integer_format(bits, size, zero_point=not weights.flag("symmetric", default=True))
    raise weights.error("num_bits and type", f"are {bits} and {kind[:40]!r}: needs int of 8 bits or fewer, or float of 4 or 8")


def _integer_format(bits: int, group: int, *, zero_point: bool) -> WeightFormat:
    """Return integers with a 16-bit scale and perhaps a zero point of their own width per group, or per channel below 1."""
    scale = (16 + bits * zero_point) / group if group > 0 else 0.0
    if bits == 8 and scale == 0:
        return WEIGHT_FORMATS["int8"]
    base = WEIGHT_FORMATS["int4"]
    if bits == 4 and abs(bits + scale - base.bits_per_weight) < 0.01:
        return base
    return replace(base, name=f"int{bits}, groups of {group}", bits_per_weight=bits + scale, source="quantization_config")


def _exempt_layers(patterns: Iterable[str], part: re.Pattern[str], num_layers: int) -> int:
    """Return in how many layers the patterns exempt the `part`; one without a layer number exempts it in all."""
    layers: set[str] = set()
    for pattern in patterns:
        if part.search(pattern):
            numbered = _LAYER.search(pattern)
            if numbered is None:
                return num_layers
            if int(numbered[1][:9]) < num_layers:  # drafting layers come after
                layers.add(numbered[1])
    return len(layers)


def _listed(quantization: ConfigFields, layers: Mapping[str, object], params: LinearParams) -> WeightFormat:
    """Return the format of a checkpoint that lists every quantized module: the mean of each part."""
    rest = WEIGHT_FORMATS["fp8" if quantization.text("quant_method") == "fp8" else "bf16"]
    parts: dict[str, list[WeightFormat]] = {"experts": [], "mixers": [], "feed_forwards": [], "head": []}
    for name, how in layers.items():
        algorithm = how.get("quant_algo") if isinstance(how, Mapping) else None
        if not isinstance(algorithm, str) or algorithm.lower() not in _ALGORITHMS:
            raise quantization.error(f"quantized_layers, {name[:80]}", f"has no quant_algo of {', '.join(_ALGORITHMS)}")
        part = "experts" if _EXPERTS.search(name) else "mixers" if _ATTENTION.search(name) else "feed_forwards"
        parts["head" if name.endswith("head") else part].append(WEIGHT_FORMATS[_ALGORITHMS[algorithm.lower()]])
    bits = {part: sum(f.bits_per_weight for f in fmts) / len(fmts) for part, fmts in parts.items() if fmts}
    narrowest = min((fmt for fmts in parts.values() for fmt in fmts), key=lambda fmt: fmt.bits_per_weight, default=rest)
    expert_bits = bits.get("experts", narrowest.bits_per_weight)
    base = next((fmt for fmt in parts["experts"] if fmt.bits_per_weight == expert_bits), narrowest)
    usual = rest.bits_per_weight
    return _combined(base, bits.get("mixers", usual), bits.get("feed_forwards", usual), bits.get("head"), params)


def _combined(
    base: WeightFormat, mixer_bits: float, feed_forward_bits: float, head_bits: float | None, params: LinearParams
) -> WeightFormat:
    """Return `base` for the experts and the mean over the other linear layers; a named format where one is the same."""
    linear = params.mixers + params.feed_forwards
    dense = (mixer_bits * params.mixers + feed_forward_bits * params.feed_forwards) / linear if linear else base.bits_per_weight
    bits = base.bits_per_weight if params.has_experts else dense
    for fmt in (base, *WEIGHT_FORMATS.values()):
        fmt_dense = fmt.dense_bits if params.has_experts and fmt.dense_bits is not None else fmt.bits_per_weight
        same_rest = (fmt.compute_dtype, fmt.wide_bits, fmt.head_bits) == (base.compute_dtype, base.wide_bits, head_bits)
        if (fmt.bits_per_weight, fmt_dense) == (bits, dense) and same_rest:
            return fmt
    return replace(
        base, name=f"{base.name}, mixed", bits_per_weight=bits, dense_bits=dense, head_bits=head_bits, source="quantization_config"
    )
