"""The architectures whose config.json is understood: what each implies beside what its file says."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pagedkv.errors import ConfigError
from pagedkv.hf_fields import ConfigFields


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture, as a difference to Llama's: RMS norms, gated feed-forward layers, no biases.

    Source of all rows: the modules and defaults of transformers 5.24, but for nemotron-nas, which is its own remote code.
    """

    model_types: tuple[str, ...]
    """`model_type` of its config.json, also of a nested text_config."""
    architectures: tuple[str, ...]
    """Entries of `architectures`."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Fields that its files leave out."""
    gated_mlp: bool = True
    """Three matrices per feed-forward layer and expert, else two."""
    biases: frozenset[Literal["qkv", "output", "mlp", "norm", "router", "expert"]] = frozenset()
    """What has biases whatever the file says."""
    output_bias: bool = True
    """Whether `attention_bias` means the output projection too."""
    norms: int = 2
    """Norm vectors of hidden_size per layer."""
    qk_norm: Literal["", "head", "all"] = ""
    """Norms of queries and keys: one vector for every head alike, or one over all heads."""
    sinks: bool = False
    """Whether each query head has a learned sink."""
    shared_gate: bool = False
    """Whether a shared expert has a gate."""
    learned_positions: int | None = None
    """Rows of the position table beyond max_position_embeddings; None: no such table."""
    compressed: bool = False
    """DeepSeek-V4's attention: shared keys and values in a window, beside entries for several tokens."""


_QWEN = {"use_sliding_window": False, "tie_word_embeddings": False}
_GEMMA = {"tie_word_embeddings": True}
_LLAMA4 = {"attention_chunk_size": 8192, "no_rope_layer_interval": 4, "n_shared_experts": 1, "interleave_moe_layer_step": 1}
_GEMMA3 = {
    **_GEMMA,
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
_GEMMA4 = {
    **_GEMMA,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}

_FAMILIES = (
    Family(
        model_types=("llama", "mistral", "mistral3", "ministral", "phi3"),
        architectures=(
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Mistral3ForConditionalGeneration",
            "MinistralForCausalLM",
            "Phi3ForCausalLM",
        ),
    ),
    Family(model_types=("mixtral",), architectures=("MixtralForCausalLM",)),
    Family(
        model_types=("opt",),
        architectures=("OPTForCausalLM",),
        defaults={"tie_word_embeddings": True},
        gated_mlp=False,
        biases=frozenset({"qkv", "output", "mlp", "norm"}),
        learned_positions=2,
    ),
    Family(model_types=("qwen2",), architectures=("Qwen2ForCausalLM",), defaults=_QWEN, biases=frozenset({"qkv"})),
    Family(
        model_types=("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text"),
        architectures=(
            "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
        ),
        defaults=_QWEN,
        qk_norm="head",
    ),
    Family(
        model_types=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        architectures=(
            "Qwen3NextForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForCausalLM",
            "Qwen3_5MoeForConditionalGeneration",
        ),
        defaults={**_QWEN, "attn_output_gate": True, "full_attention_interval": 4},
        qk_norm="head",
        shared_gate=True,
    ),
    Family(
        model_types=("gemma2",),
        architectures=("Gemma2ForCausalLM",),
        defaults={**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 2},
        norms=4,
    ),
    Family(
        model_types=("gemma3", "gemma3_text"),
        architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        defaults=_GEMMA3,
        norms=4,
        qk_norm="head",
    ),
    Family(
        model_types=("gemma4", "gemma4_text"),
        architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        defaults=_GEMMA4,
        norms=4,
        qk_norm="head",
    ),
    Family(
        model_types=("gpt_oss",),
        architectures=("GptOssForCausalLM",),
        defaults={"attention_bias": True, "sliding_window_pattern": 2},
        biases=frozenset({"router", "expert"}),
        sinks=True,
    ),
    Family(
        model_types=("llama4", "llama4_text"),
        architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        defaults=_LLAMA4,
    ),
    Family(
        model_types=("deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm4_moe_lite", "glm_moe_dsa"),
        architectures=(
            "DeepseekV3ForCausalLM",
            "DeepseekV32ForCausalLM",
            "KimiK25ForConditionalGeneration",
            "Glm4MoeLiteForCausalLM",
            "GlmMoeDsaForCausalLM",
        ),
    ),
    Family(
        model_types=("deepseek_v4",),
        architectures=("DeepseekV4ForCausalLM",),
        sinks=True,
        compressed=True,
    ),
    Family(
        model_types=("glm4_moe",),
        architectures=("Glm4MoeForCausalLM",),
        output_bias=False,
        qk_norm="head",
        defaults={"use_qk_norm": False},
    ),
    Family(model_types=("minimax_m2",), architectures=("MiniMaxM2ForCausalLM",), qk_norm="all", defaults={"use_qk_norm": True}),
    Family(model_types=("nemotron_h",), architectures=("NemotronHForCausalLM",), gated_mlp=False, norms=1),
    Family(model_types=("nemotron-nas",), architectures=("DeciLMForCausalLM",)),
)

_BY_MODEL_TYPE = {model_type: family for family in _FAMILIES for model_type in family.model_types}
_BY_ARCHITECTURE = {name: family for family in _FAMILIES for name in family.architectures}


def family_of(fields: ConfigFields) -> Family:
    """Return the family of a config.json: by `architectures`, as engines do, or, where it has none, by `model_type`.

    Raises:
        ConfigError: If it is not one of those supported.
    """
    names = fields.items("architectures") or []
    model_type = fields.text("model_type")
    for name in names:
        if isinstance(name, str) and name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    if not names and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    if names:
        raise unsupported(fields, "architectures", names, _BY_ARCHITECTURE)
    if model_type:
        raise unsupported(fields, "model_type", model_type, _BY_MODEL_TYPE)
    raise fields.error("architectures", f"and model_type are missing: needs one of {', '.join(sorted(_BY_ARCHITECTURE))}")


def unsupported(fields: ConfigFields, name: str, value: object, known: Mapping[str, Family]) -> ConfigError:
    """Return the error for an architecture that is not in the table."""
    return fields.error(name, f"is {reprlib.repr(value)}, which is not supported: needs one of {', '.join(sorted(known))}")
