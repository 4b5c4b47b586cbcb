"""All models of the catalogue at a glance: the table in docs/models.md, which `python -m pagedkv.model_table` prints."""

from collections.abc import Iterator

from pagedkv.catalogue import load_model, model_names
from pagedkv.kv_spec import LayerGroup
from pagedkv.model_spec import ModelSpec

_HEADER = (
    "`--model`",
    "repository",
    "layers by what they cache",
    "KV bytes per token",
    "beyond windows",
    "state, bytes per sequence",
    "parameters",
    "active",
    "weights",
    "context",
    "source",
)


def markdown() -> str:
    """Return the table: KV in 16 bits, with every token kept and with windows full; parameters counted."""
    rows = (_row(load_model(name)) for name in model_names())
    return "".join(f"| {' | '.join(row)} |\n" for row in (_HEADER, ["---"] * len(_HEADER), *rows))


def describe(group: LayerGroup) -> str:
    """Return a layer group in a few words: how many layers, of what kind, and what is special about their cache."""
    text = f"{group.num_layers} {group.kind.replace('_', ' ')}"
    if group.window is not None:
        text += f" {group.window:,}"
    if group.kind != "state":
        dims = f"{group.key_dim} + {group.value_dim}" if group.value_dim else f"{group.key_dim}"
        text += f" ({group.num_kv_heads} × {dims})"
    if group.compression > 1:
        text += f", an entry per {group.compression} tokens"
    if group.index_key_dim:
        text += f", index keys of {group.index_key_dim}"
    if group.index_topk is not None:
        text += f", reads {group.index_topk:,}"
    if group.num_sharing_layers:
        text += f", read by {group.num_sharing_layers} more"
    return text


def _row(model: ModelSpec) -> Iterator[str]:
    kv = model.kv_spec("auto")
    yield f"`{model.name}`"
    yield model.hf_id
    yield "; ".join(map(describe, model.layer_groups))
    unbounded = (size for group, size in zip(model.layer_groups, kv.group_bytes_per_token, strict=True) if group.window is None)
    yield f"{kv.bytes_per_token:,}"
    yield f"{sum(unbounded):,.0f}"
    yield f"{kv.state_bytes_per_sequence:,}" if kv.state_bytes_per_sequence else "–"
    yield _billions(model.params_total)
    yield _billions(model.params_active) if model.num_experts else "all"
    yield model.native_format.name
    yield f"{model.max_context:,}"
    yield model.source


def _billions(params: int) -> str:
    return f"{params / 1e9:,.2f} B"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
