"""What a layer's mixer caches, and its parameters."""

from dataclasses import replace
from typing import NamedTuple

from pagedkv.hf_family import Family
from pagedkv.hf_fields import ConfigFields
from pagedkv.kv_spec import LayerGroup
from pagedkv.layer_plan import LayerPlan

OVERLAPPING_COMPRESSION = 4
"""The compression of DeepSeek-V4 whose entries overlap, twice as wide before pooling, and are selected by an indexer.
Source: transformers and vLLM, DeepSeek-V4; the other, 128, has neither."""

_STATE_DTYPE_BYTES = {"": 2, "auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


class MixerCost(NamedTuple):
    """One layer's share."""

    caches: tuple[LayerGroup, ...]
    """What it owns or, with `num_sharing_layers`, reads."""
    linear_params: int
    """Weights that formats quantize."""
    wide_params: int
    """Norms, biases, convolutions, gates and the like."""


def mixer_cost(fields: ConfigFields, family: Family, plan: LayerPlan) -> MixerCost:
    """Return what one layer of that plan caches and weighs.

    Raises:
        ConfigError: For a field that is missing or out of range; it names the field.
    """
    if plan.mixer == "none":
        return MixerCost((), 0, 0)
    if plan.mixer == "linear":
        return _gated_delta_net(fields)
    if plan.mixer == "mamba":
        return _mamba(fields)
    if family.compressed:
        return _compressed_attention(fields, plan)
    if fields.has("kv_lora_rank"):
        return _latent_attention(fields, plan)
    return _attention(fields, family, plan)


def _attention(fields: ConfigFields, family: Family, plan: LayerPlan) -> MixerCost:
    """Multi-head, grouped-query and multi-query attention, with or without a window."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = plan.num_kv_heads or fields.integer("num_key_value_heads", default=heads)
    head_dim = fields.integer("head_dim", "attention_head_dim", default=0) or _divided(fields, "hidden_size", hidden, heads)
    one_projection = plan.mixer == "full" and fields.flag("attention_k_eq_v")
    if plan.mixer == "full" and fields.has("global_head_dim"):
        head_dim = fields.integer("global_head_dim")
    if one_projection:
        kv_heads = fields.integer("num_global_key_value_heads", default=kv_heads)
    fields.supersede("num_global_key_value_heads", "global_head_dim", "attention_k_eq_v")
    if heads % kv_heads:
        raise fields.error("num_attention_heads", f"is {heads}: needs a multiple of the {kv_heads} num_key_value_heads")
    window = _window(fields, plan)
    kind = "full" if window is None else plan.mixer
    assert kind in ("full", "sliding_window", "chunked")
    cache = LayerGroup(kind=kind, num_layers=1, num_kv_heads=kv_heads, key_dim=head_dim, value_dim=head_dim, window=window)

    queries, keys = heads * head_dim, kv_heads * head_dim
    projected = keys * (1 if one_projection else 2) if plan.owns_cache else 0
    gated = "attn_output_gate" in family.defaults and fields.flag("attn_output_gate")
    biased = fields.flag("attention_bias")
    wide = queries + projected if biased or "qkv" in family.biases else 0
    wide += hidden if (biased and family.output_bias) or "output" in family.biases else 0
    if family.qk_norm and fields.flag("use_qk_norm", default=True):
        wide += head_dim * (1 + plan.owns_cache) if family.qk_norm == "head" else queries + keys
    wide += heads if family.sinks else 0
    return MixerCost((cache,), hidden * (queries * (3 if gated else 2) + projected), wide)


def _window(fields: ConfigFields, plan: LayerPlan) -> int | None:
    """Return the window of a layer, None if it never binds."""
    if plan.mixer not in ("sliding_window", "chunked"):
        return None
    window = fields.integer("sliding_window" if plan.mixer == "sliding_window" else "attention_chunk_size")
    return window if window < fields.integer("max_position_embeddings") else None


def _latent_attention(fields: ConfigFields, plan: LayerPlan) -> MixerCost:
    """MLA (DeepSeek-V2 to V3.2, Kimi-K2, GLM-5): one latent for all heads, and perhaps an indexer that selects tokens."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    latent, rope = fields.integer("kv_lora_rank"), fields.integer("qk_rope_head_dim")
    query_dim, value_dim = fields.integer("qk_nope_head_dim") + rope, fields.integer("v_head_dim")
    if fields.integer("qk_head_dim", default=query_dim) != query_dim:
        raise fields.error(
            "qk_head_dim", f"is {fields.value('qk_head_dim')}, but qk_nope_head_dim + qk_rope_head_dim is {query_dim}"
        )
    fields.supersede("num_key_value_heads", "head_dim")  # of the expanded heads, which are not cached
    if plan.mixer != "full":
        raise fields.error(
            "kv_lora_rank", f"does not go with {plan.mixer} layers: latent attention with a window is not understood"
        )
    query_rank = fields.integer("q_lora_rank", default=0)
    linear = hidden * query_rank + query_rank * heads * query_dim if query_rank else hidden * heads * query_dim
    linear += hidden * (latent + rope) + latent * heads * (query_dim - rope + value_dim) + heads * value_dim * hidden
    wide = query_rank + latent
    if fields.flag("attention_bias"):
        wide += query_rank + latent + rope + hidden
    cache = LayerGroup(kind="mla", num_layers=1, num_kv_heads=1, key_dim=latent + rope, attention_dim=query_dim + value_dim)
    if fields.has("index_topk"):
        index_heads, index_dim = fields.integer("index_n_heads"), fields.integer("index_head_dim")
        cache = replace(cache, index_topk=fields.integer("index_topk"), index_key_dim=index_dim if plan.has_indexer else 0)
        if plan.has_indexer:
            if not query_rank:
                raise fields.error("q_lora_rank", "is missing: the indexer (index_topk) reads the compressed query")
            linear += query_rank * index_heads * index_dim + hidden * index_dim
            wide += 2 * index_dim + hidden * index_heads
    return MixerCost((cache,), linear, wide)


def _compressed_attention(fields: ConfigFields, plan: LayerPlan) -> MixerCost:
    """DeepSeek-V4: a window of shared keys and values, and in most layers one entry per 4 or 128 tokens beside it."""
    hidden, heads, head_dim = (fields.integer(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    query_rank, groups, output_rank = (fields.integer(name) for name in ("q_lora_rank", "o_groups", "o_lora_rank"))
    index_heads, index_dim = fields.integer("index_n_heads"), fields.integer("index_head_dim")
    topk = fields.integer("index_topk")
    fields.supersede("qk_rope_head_dim")  # a part of head_dim
    if fields.integer("num_key_value_heads") != 1:
        raise fields.error("num_key_value_heads", f"is {fields.value('num_key_value_heads')}: shared keys and values have 1")
    window = LayerGroup(
        kind="sliding_window", num_layers=1, num_kv_heads=1, key_dim=head_dim, window=fields.integer("sliding_window")
    )
    linear = hidden * query_rank + query_rank * heads * head_dim + hidden * head_dim
    linear += (
        _divided(fields, "num_attention_heads", heads * head_dim, groups) * groups * output_rank + groups * output_rank * hidden
    )
    wide = query_rank + head_dim + heads
    if not (ratio := plan.compression):
        return MixerCost((window,), linear, wide)
    overlaps = ratio == OVERLAPPING_COMPRESSION
    widths = [(1 + overlaps) * head_dim] + [2 * index_dim] * overlaps
    for width in widths:
        linear += 2 * hidden * width
        wide += ratio * width
    wide += head_dim
    # Tokens not yet pooled: 32-bit keys and scores of one compression, or of two that overlap (vLLM, CompressorStateCache).
    state = sum(2 * width * 4 for width in widths) * (1 + overlaps) * ratio
    entries = LayerGroup(kind="full", num_layers=1, num_kv_heads=1, key_dim=head_dim, compression=ratio, state_bytes=state)
    if overlaps:
        linear += query_rank * index_heads * index_dim
        wide += index_dim + hidden * index_heads
        entries = replace(entries, index_key_dim=index_dim, index_topk=topk)
    return MixerCost((window, entries), linear, wide)


def _gated_delta_net(fields: ConfigFields) -> MixerCost:
    """Linear attention of Qwen3-Next and Qwen3.5: a matrix per value head, and the last inputs of a short convolution."""
    hidden = fields.integer("hidden_size")
    heads, head_dim = fields.integer("linear_num_value_heads"), fields.integer("linear_value_head_dim")
    key_heads, key_dim = fields.integer("linear_num_key_heads"), fields.integer("linear_key_head_dim")
    kernel = fields.integer("linear_conv_kernel_dim")
    values, convolved = heads * head_dim, 2 * key_heads * key_dim + heads * head_dim
    state = heads * key_dim * head_dim * _state_element_bytes(fields) + (kernel - 1) * convolved * 2
    cache = LayerGroup(kind="state", num_layers=1, state_bytes=state, state_heads=heads)
    gates = 2 * hidden * heads + 2 * heads
    return MixerCost((cache,), hidden * (convolved + 2 * values), gates + convolved * kernel + head_dim)


def _mamba(fields: ConfigFields) -> MixerCost:
    """Mamba-2: a matrix per head, and the last inputs of a short convolution."""
    hidden = fields.integer("hidden_size")
    heads, head_dim = fields.integer("mamba_num_heads"), fields.integer("mamba_head_dim")
    groups, state_size = fields.integer("n_groups"), fields.integer("ssm_state_size")
    kernel = fields.integer("conv_kernel")
    inner = heads * head_dim
    convolved = inner + 2 * groups * state_size
    state = inner * state_size * _state_element_bytes(fields) + (kernel - 1) * convolved * 2
    cache = LayerGroup(kind="state", num_layers=1, state_bytes=state, state_heads=heads)
    biases = convolved * fields.flag("use_conv_bias", default=True)
    biases += (inner + convolved + heads + hidden) * fields.flag("mamba_proj_bias")
    return MixerCost(
        (cache,), hidden * (inner + convolved + heads) + inner * hidden, convolved * kernel + 3 * heads + inner + biases
    )


def _state_element_bytes(fields: ConfigFields) -> int:
    """Return the bytes of an element of a recurrent state: vLLM takes the file's type, or else the model's 16 bits."""
    name = fields.text("mamba_ssm_dtype", "mamba_ssm_cache_dtype")
    if name not in _STATE_DTYPE_BYTES:
        known = ", ".join(filter(None, _STATE_DTYPE_BYTES))
        raise fields.error("mamba_ssm_dtype or mamba_ssm_cache_dtype", f"is {name[:40]!r}: needs one of {known}")
    return _STATE_DTYPE_BYTES[name]


def _divided(fields: ConfigFields, name: str, size: int, parts: int) -> int:
    if size % parts:
        raise fields.error(name, f"of {size} does not divide into {parts} parts: needs a multiple, or its own field (head_dim)")
    return size // parts
