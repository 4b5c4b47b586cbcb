"""The attention function "pagedkv" of transformers: it writes new keys and values to blocks, and reads all through block tables."""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pagedkv.errors import ConfigError
from pagedkv.runtime.model_layers import check_model
from pagedkv.runtime.paged_layer import ATTENTION, LAYER_TAG, PagedLayer, uncompiled

_WINDOW_TAG = "pagedkv_window"
"""Attribute of a mask from `padding_mask`: the window that the model would have laid over it."""
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


@uncompiled
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
        attention_mask: Which columns hold tokens [batch, all columns], from `padding_mask`; None or empty: all.
        scaling: Factor of the scores; None: head_dim ** -0.5.
        dropout: Must be 0.
        sliding_window: Tokens that a query sees, its own included; None: as many as the mask says. Must be what the cache keeps.
        softcap: Scores become softcap * tanh(score / softcap).
        s_aux: One extra logit per query head, a sink (gpt-oss).
        more: What else models pass along.

    Returns:
        (out [batch, columns, num_q_heads, head_dim], None for the weights, which nobody computes).

    Raises:
        ConfigError: If the call asks for something else than causal attention to a `PagedCache`.
    """
    layer = getattr(key, LAYER_TAG, None)
    if isinstance(layer, PagedLayer):
        layer.read()
    if torch.is_grad_enabled() and query.requires_grad:
        raise ConfigError(
            f"the attention {ATTENTION!r} computes no gradients: call the model under torch.no_grad(), or train it after "
            "model.set_attn_implementation('sdpa')"
        )
    if not isinstance(layer, PagedLayer):
        raise ConfigError(
            f"the attention {ATTENTION!r} reads a PagedCache, and got none: pass past_key_values=PagedCache(model, "
            "num_blocks=...), or go back by model.set_attn_implementation('sdpa'). If one was passed, the model changes keys "
            "after they went to the cache, which blocks cannot do"
        )
    strange = [name for name in _CHANGES_SCORES if more.get(name) is not None]
    if dropout or strange or more.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ConfigError(
            f"attention with dropout {dropout}, {strange or 'in both directions'}: {ATTENTION!r} is causal, without either"
        )
    window = getattr(attention_mask, _WINDOW_TAG, None) if sliding_window is None else sliding_window
    if window != layer.window:
        raise ConfigError(
            f"layer {layer.index} attends to {_seen(window)}, and its cache keeps {_seen(layer.window)}: make the cache by "
            "PagedCache of this very model. If it is, the model does as its configuration does not say: set sliding_window or "
            "layer_types there to what it does"
        )
    if attention_mask is not None and not attention_mask.numel():
        attention_mask = None
    return layer.attend(query, key, value, attention_mask, softmax_scale=scaling, softcap=softcap or 0.0, sinks=s_aux), None


@uncompiled
def padding_mask(
    *,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **_: Any,
) -> torch.Tensor | None:
    """Return the mask that the attention function takes: which columns hold tokens [batch, all columns], or None.

    That queries see what is before them, and how far, the kernels know. A model need not name its window to the attention function,
    so a mask for one bears `local_size`, and is empty if all columns hold tokens.

    Raises:
        ConfigError: If the model lays another pattern over that (images seen in both directions, packed sequences).
    """
    if use_vmap or not allow_is_causal_skip:
        raise ConfigError(f"the model changes the causal mask (images, packed sequences): {ATTENTION!r} is causal, text only")
    if local_size is None:
        return attention_mask
    mask = torch.empty(0) if attention_mask is None else attention_mask[:]  # a view: layers without a window get the tensor itself
    setattr(mask, _WINDOW_TAG, local_size)
    return mask


def _seen(window: int | None) -> str:
    return "all tokens" if window is None else f"a window of {window}"


AttentionInterface.register(ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION, padding_mask)
