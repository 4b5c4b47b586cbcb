"""Which mixer (attention, linear attention, Mamba) and which feed-forward part each layer of a config.json has."""

import reprlib
from collections.abc import Mapping
from dataclasses import replace

from pagedkv.hf_blocks import pattern_blocks, searched_blocks
from pagedkv.hf_family import Family
from pagedkv.hf_fields import MAX_LAYERS, ConfigFields
from pagedkv.layer_plan import FeedForward, LayerPlan, Mixer

_LAYER_TYPES: Mapping[str, Mixer] = {
    "full_attention": "full",
    "deepseek_sparse_attention": "full",
    "sliding_attention": "sliding_window",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
}
_MLP_LAYER_TYPES: Mapping[str, FeedForward] = {"dense": "dense", "sparse": "moe", "moe": "moe", "hash_moe": "moe"}
_LAYOUT_FIELDS = (
    "full_attention_interval",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "no_rope_layer_interval",
    "no_rope_layers",
    "max_window_layers",
    "use_sliding_window",
    "sliding_window",
    "attention_chunk_size",
    "attn_type_list",
)
"""What layer_types answers; windows are read where a layer has one."""


def plan_layers(fields: ConfigFields, family: Family) -> list[LayerPlan]:
    """Return a plan for each layer, in their order.

    Raises:
        ConfigError: For a layout that is not understood; it names the field.
    """
    if fields.has("block_configs"):
        return searched_blocks(fields)
    if blocks := pattern_blocks(fields):
        return blocks
    num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    compressions = _compressions(fields, num_layers) if family.compressed else [0] * num_layers
    mixers: list[Mixer] = ["sliding_window"] * num_layers if family.compressed else _mixers(fields, num_layers)
    shared = fields.integer("num_kv_shared_layers", default=0, minimum=0, maximum=num_layers - 1)
    plans = [
        LayerPlan(mixer=mixer, feed_forward=feed_forward, compression=ratio, has_indexer=has_indexer)
        for mixer, feed_forward, ratio, has_indexer in zip(
            mixers, _feed_forwards(fields, num_layers), compressions, _indexers(fields, num_layers), strict=True
        )
    ]
    owners, readers = plans[: num_layers - shared], plans[num_layers - shared :]
    if missing := {plan.mixer for plan in readers} - {plan.mixer for plan in owners}:
        raise fields.error("num_kv_shared_layers", f"is {shared}: no layer before those has a cache of kind {missing.pop()}")
    return owners + [replace(plan, owns_cache=False) for plan in readers]


def _mixers(fields: ConfigFields, num_layers: int) -> list[Mixer]:
    """Return each layer's attention: as listed, or by the rule of whichever field is there."""
    if (listed := fields.choices("layer_types", num_layers, _LAYER_TYPES)) is not None:
        fields.supersede(*_LAYOUT_FIELDS)
        return _checked_windows(fields, [_LAYER_TYPES[name] for name in listed])
    if (kinds := fields.per_layer("attn_type_list", num_layers)) is not None and any(kind != 1 for kind in kinds):
        raise fields.error("attn_type_list", f"is {reprlib.repr(kinds)}: only 1, full attention, is understood")
    if fields.has("full_attention_interval"):
        return _every(fields.integer("full_attention_interval"), num_layers, other="linear")
    if fields.has("attention_chunk_size"):
        if not fields.items("no_rope_layers"):
            return _every(fields.integer("no_rope_layer_interval"), num_layers, other="chunked")
        fields.supersede("no_rope_layer_interval")
        return ["chunked" if rope else "full" for rope in fields.per_layer("no_rope_layers", num_layers) or ()]
    if fields.has("sliding_window_pattern") or fields.has("_sliding_window_pattern"):
        pattern = fields.integer("sliding_window_pattern", "_sliding_window_pattern")
        return _checked_windows(fields, _every(pattern, num_layers, other="sliding_window"))
    full_layers = fields.integer("max_window_layers", default=0, minimum=0) if fields.has("use_sliding_window") else 0
    windowed = fields.has("sliding_window") and fields.flag("use_sliding_window", default=True)
    return ["sliding_window" if windowed and i >= full_layers else "full" for i in range(num_layers)]


def _every(interval: int, num_layers: int, *, other: Mixer) -> list[Mixer]:
    """Return full attention in every `interval`-th layer, counted from 1, and `other` in the rest."""
    return [other if (i + 1) % interval else "full" for i in range(num_layers)]


def _checked_windows(fields: ConfigFields, mixers: list[Mixer]) -> list[Mixer]:
    for mixer, name in (("sliding_window", "sliding_window"), ("chunked", "attention_chunk_size")):
        if mixer in mixers and not fields.has(name):
            raise fields.error(name, f"is missing: {mixers.count(mixer)} layers need it, a whole number of tokens")
    return mixers


def _indexers(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Return which layers select tokens themselves; the others take the selection of the layer before them (GLM-5.2)."""
    if not (fields.has("kv_lora_rank") and fields.has("index_topk")):
        return [True] * num_layers
    listed = fields.choices("indexer_types", num_layers, ("full", "shared"))
    every = fields.integer("index_topk_freq", default=1)
    offset = fields.integer("index_skip_topk_offset", default=2, minimum=0)
    if listed is None and fields.has("index_topk_pattern"):
        raise fields.error("index_topk_pattern", "is not understood: needs indexer_types, or index_topk_freq")
    fields.supersede("index_topk_pattern")
    if listed is not None:
        return [name == "full" for name in listed]
    return [max(i - offset + 1, 0) % every == 0 for i in range(num_layers)]


def _compressions(fields: ConfigFields, num_layers: int) -> list[int]:
    """Return the tokens per compressed entry of each of DeepSeek-V4's layers, 0 for a window alone."""
    drafting = fields.integer("num_nextn_predict_layers", default=0, minimum=0)
    ratios = fields.per_layer("compress_ratios", num_layers, spare=drafting)
    if ratios is None:
        raise fields.error("compress_ratios", f"is missing: needs 0, 4 or 128 for each of {num_layers} layers")
    compressions = []
    for ratio in ratios:
        if ratio not in (0, 4, 128) or not isinstance(ratio, int) or isinstance(ratio, bool):
            raise fields.error("compress_ratios", f"has {reprlib.repr(ratio)}: needs 0, 4 or 128")
        compressions.append(ratio)
    return compressions


def _feed_forwards(fields: ConfigFields, num_layers: int) -> list[FeedForward]:
    """Return which layers route their tokens to experts."""
    if not fields.flag("enable_moe_block", default=True) or not has_experts(fields):
        return ["dense"] * num_layers
    if (listed := fields.choices("mlp_layer_types", num_layers, _MLP_LAYER_TYPES)) is not None:
        fields.supersede("moe_layer_freq", "first_k_dense_replace")
        return [_MLP_LAYER_TYPES[name] for name in listed]
    first = fields.integer("first_k_dense_replace", default=0, minimum=0)
    if isinstance(fields.value("moe_layer_freq"), list):
        moe = [bool(layer) for layer in fields.per_layer("moe_layer_freq", num_layers) or ()]
    else:
        every = fields.integer("moe_layer_freq", default=1)
        moe = [i >= first and i % every == 0 for i in range(num_layers)]
    step = fields.integer("decoder_sparse_step", "interleave_moe_layer_step", default=1)
    dense_layers = fields.items("mlp_only_layers") or ()
    return ["moe" if moe[i] and (i + 1) % step == 0 and i not in dense_layers else "dense" for i in range(num_layers)]


def has_experts(fields: ConfigFields) -> bool:
    """Return whether the file speaks of routed experts."""
    return any(fields.value(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
