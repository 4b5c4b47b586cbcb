"""Models whose layers are listed block by block: Nemotron-H's patterns and Nemotron-NAS's search results."""

import reprlib
from collections.abc import Iterable, Mapping

from pagedkv.hf_fields import MAX_LAYERS, ConfigFields
from pagedkv.layer_plan import FeedForward, LayerPlan, Mixer

_BLOCK_TYPES: Mapping[str, tuple[Mixer, FeedForward]] = {
    "mamba": ("mamba", "none"),
    "attention": ("full", "none"),
    "moe": ("none", "moe"),
    "mlp": ("none", "dense"),
    "M": ("mamba", "none"),
    "*": ("full", "none"),
    "E": ("none", "moe"),
    "-": ("none", "dense"),
}


def pattern_blocks(fields: ConfigFields) -> list[LayerPlan]:
    """Return Nemotron-H's blocks, each a mixer or a feed-forward part; none where the file describes none.

    Raises:
        ConfigError: For a block that is not known, or if they are not num_hidden_layers.
    """
    pattern = fields.text("hybrid_override_pattern")
    entries: Iterable[object] = pattern or fields.items("layers_block_type") or ()
    blocks = []
    for entry in entries:
        if not isinstance(entry, str) or entry not in _BLOCK_TYPES:
            name = "hybrid_override_pattern" if pattern else "layers_block_type"
            raise fields.error(name, f"has {reprlib.repr(entry)}: needs {', '.join(_BLOCK_TYPES)}")
        mixer, feed_forward = _BLOCK_TYPES[entry]
        blocks.append(LayerPlan(mixer=mixer, feed_forward=feed_forward))
    num_layers = fields.integer("num_hidden_layers", default=len(blocks), maximum=MAX_LAYERS) if blocks else 0
    if len(blocks) != num_layers:
        raise fields.error("num_hidden_layers", f"is {num_layers}, but the block pattern has {len(blocks)} blocks")
    return blocks


def searched_blocks(fields: ConfigFields) -> list[LayerPlan]:
    """Return the layers of Nemotron-NAS, where a search gave each its own heads and width or took a part away.

    Source: its remote code: width = 2/3 x ffn_mult x hidden_size, rounded up to a multiple of 256.

    Raises:
        ConfigError: For a part that is missing, out of range or of another kind; it names the field.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    plans = []
    for i, entry in enumerate(fields.per_layer("block_configs", num_layers) or ()):
        where = f"{fields.where}, block_configs[{i}]"
        block = ConfigFields(entry if isinstance(entry, Mapping) else {}, where=where)
        attention, ffn = block.section("attention"), block.section("ffn")
        if attention is None or ffn is None:
            raise block.error("attention or ffn", "is missing: needs an object each")
        mixer: Mixer = "none" if attention.flag("no_op") else "full"
        group = 1 if mixer == "none" else attention.integer("n_heads_in_group", maximum=heads)
        if heads % group:
            raise attention.error("n_heads_in_group", f"is {group}: needs a divisor of num_attention_heads {heads}")
        for part in (attention, ffn):
            part.supersede("n_heads_in_group")
            part.check_all_understood()
        feed_forward: FeedForward = "none" if ffn.flag("no_op") else "dense"
        width = 0 if feed_forward == "none" else int(2 * ffn.number("ffn_mult", maximum=1e6) * hidden / 3)
        plans.append(
            LayerPlan(mixer=mixer, feed_forward=feed_forward, num_kv_heads=heads // group, intermediate_size=-(-width // 256) * 256)
        )
    return plans
