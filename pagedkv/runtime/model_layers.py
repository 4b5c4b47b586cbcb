"""What the layers of a transformers model cache, and which models cannot be served."""

from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from pagedkv.errors import ConfigError
from pagedkv.kernels.simd import LANES
from pagedkv.kv_spec import LayerGroup

WORKS = "pagedkv serves decoder-only models with full and sliding-window attention, such as Llama, Qwen3, Gemma 3, gpt-oss, Mixtral"
"""What to say to whoever has another."""

LINEAR = "linear_attention"
"""What transformers calls layers that have a state of fixed size instead of keys and values."""


def linear_layers(config: Any) -> tuple[int, ...]:
    """Return which layers have linear attention."""
    return tuple(i for i, kind in enumerate(get_layer_types_and_kwargs(config)[0]) if kind == LINEAR)


def model_layers(config: Any, *, with_states: bool = False) -> tuple[LayerGroup, ...]:
    """Return what each layer of a model with this configuration caches.

    Args:
        config: Of transformers.
        with_states: Leave layers of linear attention out, instead of refusing them: somebody else keeps their states.

    Raises:
        ConfigError: If a layer caches something else than keys and values of all tokens or of a sliding window.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(config, "has an encoder, and cross-attention to it")
    if config.get_text_config(decoder=True) is not config:
        raise _refused(config, "is a model of several parts", "load its language model alone, by its ...ForCausalLM class")
    if getattr(config, "kv_lora_rank", None):
        raise _refused(
            config, f"has latent attention (MLA, kv_lora_rank {config.kv_lora_rank}), whose keys and values differ in size"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise _refused(config, f"lets {config.num_kv_shared_layers} layers read what others cache")
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        raise _refused(config, "attends in both directions")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) in ("alibi", "relative_key"):
        raise _refused(config, "adds biases to attention scores")
    kinds, more = get_layer_types_and_kwargs(config)
    layers = []
    for i, (kind, options, layer) in enumerate(zip(kinds, more, config.per_layer_config, strict=True)):
        if with_states and kind == LINEAR:
            continue
        if kind not in ("full_attention", "sliding_attention"):
            raise _refused(config, f"has layer {i} of type {kind!r}")
        heads = layer.num_attention_heads
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        if head_dim < LANES:
            raise _refused(config, f"has heads of {head_dim} elements in layer {i}", f"{LANES} or more work here")
        layers.append(
            LayerGroup(
                kind="full" if kind == "full_attention" else "sliding_window",
                num_layers=1,
                num_kv_heads=kv_heads,
                key_dim=head_dim,
                value_dim=head_dim,
                window=options.get("sliding_window"),
            )
        )
    return tuple(layers)


def check_model(model: Any, *, with_states: bool = False) -> None:
    """Raise ConfigError unless the attention of `model` can be replaced, and reads what `pagedkv` can store."""
    if not model_layers(model.config, with_states=with_states):
        raise _refused(model.config, "has no layer of attention")
    # transformers marks no hybrid as a backend, for its states; its attention goes through the interface nevertheless.
    marked = getattr(model, "_supports_attention_backend", False) or (with_states and linear_layers(model.config))
    if not model._can_set_attn_implementation() or not marked:
        raise _refused(model.config, "computes attention in code of its own, which cannot be replaced")


def _refused(config: Any, problem: str, works: str = WORKS) -> ConfigError:
    return ConfigError(f"{type(config).__name__}: {config.model_type} {problem}: {works}")
