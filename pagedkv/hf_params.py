"""The parameters of a model outside its mixers: feed-forward parts, experts, norms, tables."""

from typing import NamedTuple

from pagedkv.hf_family import Family
from pagedkv.hf_fields import ConfigFields
from pagedkv.hf_layers import has_experts
from pagedkv.layer_plan import LayerPlan


class Experts(NamedTuple):
    """The routed experts of a model; all its mixture layers have the same."""

    total: int
    """Experts per layer, 0 for a dense model."""
    per_token: int
    """How many of them a token visits."""


class FeedForwardCost(NamedTuple):
    """One layer's share."""

    linear_params: int
    """Weights that formats quantize, shared experts included."""
    wide_params: int
    """Router, gates and biases."""
    expert_params: int
    """Routed experts."""


def read_experts(fields: ConfigFields) -> Experts:
    """Return the routed experts; a file without them says so by leaving them out, by null or by 0."""
    if not has_experts(fields):
        return Experts(0, 0)
    total = fields.integer("num_experts", "num_local_experts", "n_routed_experts", maximum=100_000)
    return Experts(total, fields.integer("num_experts_per_tok", "top_k_experts", "experts_per_token", maximum=total))


def feed_forward_cost(fields: ConfigFields, family: Family, plan: LayerPlan) -> FeedForwardCost:
    """Return the parameters of one layer's feed-forward part.

    Raises:
        ConfigError: For a field that is missing or out of range; it names the field.
    """
    if plan.feed_forward == "none":
        return FeedForwardCost(0, 0, 0)
    hidden, matrices = fields.integer("hidden_size"), 3 if family.gated_mlp else 2
    parallel = fields.flag("enable_moe_block")  # Gemma-4: dense and routed parts side by side
    linear = wide = 0
    if plan.feed_forward == "dense" or parallel:
        width = plan.intermediate_size or fields.integer("intermediate_size_mlp", "intermediate_size", "ffn_dim")
        if not plan.owns_cache and fields.flag("use_double_wide_mlp"):
            width *= 2
        linear = matrices * hidden * width
        if fields.flag("mlp_bias") or "mlp" in family.biases:
            wide = (matrices - 1) * width + hidden
    if plan.feed_forward == "dense":
        return FeedForwardCost(linear, wide, 0)

    experts = read_experts(fields).total
    width = fields.integer("moe_intermediate_size", "intermediate_size")
    latent = fields.integer("moe_latent_size", default=0)
    biases = (matrices - 1) * width + hidden if "expert" in family.biases else 0
    routed = experts * (matrices * (latent or hidden) * width + biases)
    linear += 2 * hidden * latent + matrices * hidden * _shared_width(fields, width)
    wide += experts * (hidden + ("router" in family.biases))
    wide += hidden if family.shared_gate else 0
    wide += 4 * hidden + experts if parallel else 0  # three more norms, the router's scales
    return FeedForwardCost(linear, wide, routed)


def _shared_width(fields: ConfigFields, expert_width: int) -> int:
    """Return the width of the experts that every token visits, together."""
    count = fields.integer("n_shared_experts", default=0, minimum=0, maximum=1000)
    for name in ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"):
        if fields.has(name):
            return fields.integer(name, minimum=0) * max(count, 1)
    return count * expert_width


def norm_params(fields: ConfigFields, family: Family, num_layers: int) -> int:
    """Return the parameters of all norms of hidden states, and of DeepSeek-V4's hyper-connections."""
    hidden = fields.integer("hidden_size")
    norms = (family.norms * num_layers + 1) * hidden * (2 if "norm" in family.biases else 1)
    if (streams := fields.integer("hc_mult", default=0, maximum=1000)) == 0:
        return norms
    # Two per layer mix the streams among each other, in and out; one more joins them at the end.
    mixes = (2 + streams) * streams
    return norms + num_layers * 2 * (mixes * (streams * hidden + 1) + 3) + streams * (streams * hidden + 1) + 1


class Tables(NamedTuple):
    """Parameters at the ends of a model."""

    embedding_params: int
    """Input tables."""
    head_params: int
    """Output head."""
    linear_params: int
    """Projections of per-layer inputs."""
    wide_params: int
    """Their norms."""


def tables(fields: ConfigFields, family: Family, num_layers: int) -> Tables:
    """Return the parameters of input tables and output head. Gemma-4's small models have an input table for each layer."""
    hidden, vocab = fields.integer("hidden_size"), fields.integer("vocab_size")
    if fields.integer("word_embed_proj_dim", default=hidden) != hidden:
        raise fields.error("word_embed_proj_dim", f"differs from hidden_size {hidden}, which is not supported")
    embedding = vocab * hidden
    if family.learned_positions is not None:
        embedding += (fields.integer("max_position_embeddings") + family.learned_positions) * hidden
    inputs = fields.integer("hidden_size_per_layer_input", default=0, minimum=0)
    per_layer = num_layers * inputs
    if inputs:
        embedding += fields.integer("vocab_size_per_layer_input") * per_layer
    return Tables(
        embedding_params=embedding,
        head_params=vocab * hidden,
        linear_params=3 * hidden * per_layer,
        wide_params=num_layers * hidden + inputs if inputs else 0,
    )
