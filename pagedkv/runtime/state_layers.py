"""Layers of linear attention: a state of fixed size for each sequence, where several sequences stand in one row of tokens."""

import copy
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from pagedkv.errors import ConfigError
from pagedkv.runtime.model_layers import linear_layers

Forward = Callable[..., torch.Tensor]
_PIECES = (3, 4, 1)
"""A prompt in pieces, the last of them as short as a decode step."""
_ALIKE = 0.02
"""How far outputs may be apart, as a share of the largest: 16-bit weights round."""


class Span(NamedTuple):
    """The tokens of one sequence in a pass."""

    begin: int
    """Its first column."""
    end: int
    """One past its last."""
    row: int
    """Of the running batch: what keeps its state."""
    starts: bool
    """Whether its first token is among them: then there is no state yet."""
    keeps: bool = True
    """Whether its state goes on with them; else they will be computed again, and it stays as it is."""


class StateLayer(LinearAttentionLayer):
    """What transformers sees of one layer's states: those of the sequence that is computed now.

    A row keeps its state from its sequence's first token until another sequence begins in it: preemption computes a sequence
    anew, and with it its state. Layers write to states in place, so a fork has a copy from the beginning.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[int, LinearAttentionLayer] = {}

    def select(self, span: Span) -> None:
        """Let the state be that of `span`."""
        if span.starts:
            self._rows[span.row] = LinearAttentionLayer()
        of_row = self._rows[span.row]
        self.__dict__.update(vars(of_row if span.keeps else copy.deepcopy(of_row)))

    def keep(self, span: Span) -> None:
        """Let the row of `span` keep what was computed, if it does."""
        if span.keeps:
            self._rows[span.row].__dict__.update({name: value for name, value in vars(self).items() if name != "_rows"})

    def fork(self, row: int, child_row: int) -> None:
        """Let the state of `child_row` be what that of `row` is now."""
        self._rows[child_row] = copy.deepcopy(self._rows[row])

    @property
    def state_bytes(self) -> int:
        """What all rows keep."""
        return sum(
            state.numel() * state.element_size()
            for layer in self._rows.values()
            for states in (layer.conv_states, layer.recurrent_states)
            for state in states.values()
            if state is not None
        )


def mixers(model: Any) -> dict[int, Any]:
    """Return the module that computes each layer of linear attention.

    Raises:
        ConfigError: If there is not exactly one module that takes hidden states and a cache.
    """
    found: dict[int, Any] = {}
    for index in linear_layers(model.config):
        own = [
            module
            for module in model.modules()
            if getattr(module, "layer_idx", None) == index
            and {"hidden_states", "cache"} <= inspect.signature(module.forward).parameters.keys()
        ]
        if len(own) != 1:
            raise ConfigError(
                f"{type(model.config).__name__}: layer {index} of linear attention is computed by {len(own)} modules that take a "
                "cache: needs one, as in Qwen3-Next"
            )
        found[index] = own[0]
    return found


def state_bytes(model: Any) -> int:
    """Return what layers of linear attention keep of a sequence, after trying that they compute one in pieces as they do it whole.

    Raises:
        ConfigError: If they do not: then chunked prefill would give other tokens.
    """
    random, total = torch.Generator().manual_seed(0), 0
    tokens = torch.randn(1, sum(_PIECES), model.config.hidden_size, generator=random).to(model.device, model.dtype)
    ends = list(accumulate(_PIECES))
    in_pieces = [Span(end - size, end, 0, starts=end == size) for end, size in zip(ends, _PIECES, strict=True)]
    for index, module in mixers(model).items():
        cache = Cache(layers=[StateLayer() for _ in range(model.config.num_hidden_layers)])
        alone = getattr(module.forward, "pagedkv_alone", module.forward)
        with torch.no_grad():
            whole, pieces = (
                _sequence_by_sequence(alone, tokens, cache, index, spans)
                for spans in ([Span(0, sum(_PIECES), 0, starts=True)], in_pieces)
            )
        if (pieces - whole).abs().max() > _ALIKE * whole.abs().max():
            raise ConfigError(
                f"{model.config.model_type}: layer {index} of linear attention, as transformers computes it, has another output in "
                "pieces than at once: prompts could not come in chunks. Qwen3-Next's has not"
            )
        total += cache.layers[index].state_bytes
    return total


def pack(model: Any, spans_of: Callable[[Any], Sequence[Span] | None]) -> None:
    """Let layers of linear attention compute sequence by sequence from now on, where `spans_of(cache)` says which there are."""
    for index, module in mixers(model).items():
        module.forward = _packed(getattr(module.forward, "pagedkv_alone", module.forward), index, spans_of)


def _packed(alone: Forward, index: int, spans_of: Callable[[Any], Sequence[Span] | None]) -> Forward:
    def forward(hidden_states: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
        spans = None if cache is None else spans_of(cache)
        if spans is None:
            return alone(hidden_states, cache=cache, **more)
        return _sequence_by_sequence(alone, hidden_states, cache, index, spans, **more)

    forward.pagedkv_alone = alone  # type: ignore[attr-defined]
    return forward


def _sequence_by_sequence(
    alone: Forward, hidden_states: torch.Tensor, cache: Any, index: int, spans: Sequence[Span], **more: Any
) -> torch.Tensor:
    layer, outputs = cache.layers[index], []
    for span in spans:
        layer.select(span)
        outputs.append(alone(hidden_states[:, span.begin : span.end], cache=cache, **more))
        layer.keep(span)
    return torch.cat(outputs, dim=1)
