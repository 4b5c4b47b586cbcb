"""The attention function "pagedkv" of transformers: it writes new keys and values to blocks, and reads all through block tables."""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pagedkv.errors import ConfigError
from pagedkv.runtime.model_layers import check_model
from pagedkv.runtime.paged_layer import ATTENTION, LAYER_TAG, PagedLayer

_CHANGES_SCORES = ("position_bias", "alibi", "indices", "block_indices", "sinks")
"""Keywords with which models change what attention computes, in ways that the kernels do not know."""


def use_paged_attention(model: Any, *, with_states: bool = False) -> None:
    """Let `model` attend by "pagedkv" from now on: `model.generate(..., past_key_values=PagedCache(model, num_blocks=...))`.

    `model.set_attn_implementation("sdpa")` takes it back.

    Raises:
        ConfigError: If the model caches something else than keys and values of all tokens or of a window: which, and what works.
    """
    check_model(model, with_states=with_states)
    model.set_attn_implementation(ATTENTION)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Write `key` and `value` [batch, num_kv_heads, columns, head_dim] and attend, as transformers asks.

    Args:
        module: The attention layer.
        query: Queries [batch, num_q_heads, columns, head_dim].
        key: Keys of the new columns, as `PagedLayer.update` returned them.
        value: Their values.
        attention_mask: Which columns hold tokens [batch, all columns], from `padding_mask`; None: all.
        scaling: Factor of the scores; None: head_dim ** -0.5.
        dropout: Must be 0.
        sliding_window: Tokens that a query sees, its own included: must be what the model's configuration says.
        softcap: Scores become softcap * tanh(score / softcap).
        s_aux: One extra logit per query head, a sink (gpt-oss).
        more: What else models pass along.

    Returns:
        (out [batch, columns, num_q_heads, head_dim], None for the weights, which nobody computes).

    Raises:
        ConfigError: If the call asks for something else than causal attention to a `PagedCache`.
    """
    layer = getattr(key, LAYER_TAG, None)
    if not isinstance(layer, PagedLayer):
        raise ConfigError(
            f"the attention {ATTENTION!r} reads a PagedCache, and got none: pass past_key_values=PagedCache(model, "
            "num_blocks=...), or go back by model.set_attn_implementation('sdpa')"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        raise ConfigError(f"the attention {ATTENTION!r} computes no gradients: call the model under torch.no_grad()")
    strange = [name for name in _CHANGES_SCORES if more.get(name) is not None]
    if dropout or strange or more.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ConfigError(
            f"attention with dropout {dropout}, {strange or 'in both directions'}: {ATTENTION!r} is causal, without either"
        )
    if sliding_window is not None and sliding_window != layer.window:
        raise ConfigError(f"a window of {sliding_window} in layer {layer.index}, by the model's configuration {layer.window}")
    return layer.attend(query, key, value, attention_mask, softmax_scale=scaling, softcap=softcap or 0.0, sinks=s_aux), None


def padding_mask(
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **_: Any,
) -> torch.Tensor | None:
    """Return the mask that the attention function takes: which columns hold tokens [batch, all columns], or None.

    That queries see what is before them, and how far, the kernels know.

    Raises:
        ConfigError: If the model lays another pattern over that (images seen in both directions, packed sequences).
    """
    if use_vmap or not allow_is_causal_skip:
        raise ConfigError(f"the model changes the causal mask (images, packed sequences): {ATTENTION!r} is causal, text only")
    return attention_mask


AttentionInterface.register(ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION, padding_mask)
