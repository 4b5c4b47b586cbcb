"""Where each layer's keys and values lie: which block table it reads, and which tensor.

A block of the pool is a page for one group of layers. Layer i of a group lies in tensor i, whichever group it is: so all groups can
take any block, and a block's bytes are those of one layer times the layers of the largest group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from pagedkv.errors import ConfigError
from pagedkv.kv_spec import LayerGroup
from pagedkv.layer_groups import plan_layer_groups

_PLAN_ELEMENT_BYTES = 2
"""Of `plan_layer_groups` under "auto": only to tell groups apart, whatever type the tensors have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlace:
    """Where one layer's keys and values lie."""

    group: int
    """Which block table it reads."""
    tensor: int
    """Which tensor of the storage holds it."""
    block_size: int
    """Tokens in one of its blocks."""
    num_kv_heads: int
    """Heads of its keys and values."""
    head_dim: int
    """Elements of a head."""
    window: int | None
    """Tokens that its queries see, their own included; None: all."""

    @property
    def block_elements(self) -> int:
        """Elements of a block's keys and values."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageLayout:
    """Where all layers of a model lie."""

    places: tuple[LayerPlace, ...]
    """By layer."""

    @property
    def num_groups(self) -> int:
        """Block tables per sequence."""
        return 1 + max(place.group for place in self.places)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """By group: tokens per block."""
        sizes = {place.group: place.block_size for place in self.places}
        return tuple(sizes[group] for group in range(self.num_groups))

    @property
    def widest_layers(self) -> tuple[int, ...]:
        """By tensor: a layer whose blocks fill those of the tensor."""
        widest: dict[int, int] = {}
        for layer, place in enumerate(self.places):
            if place.tensor not in widest or place.block_elements > self.places[widest[place.tensor]].block_elements:
                widest[place.tensor] = layer
        return tuple(widest[tensor] for tensor in range(len(widest)))

    @property
    def token_elements(self) -> int:
        """Elements of one token's keys and values in all layers."""
        return sum(2 * place.num_kv_heads * place.head_dim for place in self.places)

    @property
    def tensor_elements(self) -> tuple[int, ...]:
        """By tensor: elements of one block, those of the largest layer that lies there."""
        return tuple(self.places[layer].block_elements for layer in self.widest_layers)


def plan_storage(layers: Sequence[LayerGroup], *, block_size: int = 16, share_windows: bool = False) -> StorageLayout:
    """Place the layers of a model.

    Args:
        layers: One per layer of the model, in order, `num_layers` 1 each.
        block_size: Tokens per block.
        share_windows: Layers that keep different tokens have block tables of their own, as the allocator `hybrid` fills them, and
            share the tensors; else all have one table, as of `paged`, and keep all tokens.

    Raises:
        ConfigError: If a layer keeps something else than a key and a value of one size per token and head.
    """
    if not layers or not isinstance(block_size, Integral) or block_size < 1:
        raise ConfigError(f"{len(layers)} layers, blocks of {block_size!r} tokens: needs 1 or more of each, whole numbers")
    for i, layer in enumerate(layers):
        fits = layer.kind in ("full", "sliding_window") and layer.key_dim == layer.value_dim and layer.compression == 1
        if not fits or layer.num_layers != 1:
            raise ConfigError(
                f"layer {i} is {layer.num_layers} x {layer.kind}, keys of {layer.key_dim} and values of {layer.value_dim} "
                "elements: needs one layer of full or sliding-window attention, with keys and values of one size"
            )
    if not share_windows:
        return StorageLayout(places=tuple(_place(layer, 0, i, block_size) for i, layer in enumerate(layers)))
    places: dict[int, LayerPlace] = {}
    for group, planned in enumerate(plan_layer_groups(layers, block_size=block_size).groups):
        bytes_per_token = planned.used_bytes / planned.num_layers / planned.block_size
        alike = [
            i
            for i, layer in enumerate(layers)
            if i not in places
            and (layer.kind, layer.window) == (planned.kind, planned.window)
            and layer.entry_bytes(_PLAN_ELEMENT_BYTES, _PLAN_ELEMENT_BYTES) == bytes_per_token
        ]
        for tensor, i in enumerate(alike[: planned.num_layers]):
            places[i] = _place(layers[i], group, tensor, planned.block_size)
    return StorageLayout(places=tuple(places[i] for i in range(len(layers))))


def _place(layer: LayerGroup, group: int, tensor: int, block_size: int) -> LayerPlace:
    return LayerPlace(
        group=group,
        tensor=tensor,
        block_size=block_size,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.key_dim,
        window=layer.window,
    )
