"""Computes a scheduler's step with a model of transformers: all tokens in one row, keys and values in blocks."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from pagedkv.arrays import BoolArray, Int32Array, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.runtime.attention import use_paged_attention
from pagedkv.runtime.forward_plan import ForwardPlan, plan_tokens
from pagedkv.runtime.model_layers import linear_layers
from pagedkv.runtime.paged_layer import PagedLayer
from pagedkv.runtime.state_layers import Span, StateLayer, pack
from pagedkv.runtime.storage import PagedKVStorage

_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies follow the longest sequence of the forward pass: others in the batch would change a text."""


class StepCache(Cache):
    """What transformers sees of the blocks: a cache for one row of tokens, of which each step begins anew."""

    def __init__(self, config: Any, storage: PagedKVStorage, layers: range, backend: str) -> None:
        """Let the model of `config` have these layers of `storage`."""
        self.config, self.storage, self.backend = config, storage, backend
        self._plan: ForwardPlan | None = None
        self.spans: Sequence[Span] | None = None
        """The sequences of the pass, for layers that keep a state of each."""
        places, linear = iter(layers), linear_layers(config)
        kinds = [i in linear for i in range(len(layers) + len(linear))]
        super().__init__(layers=[StateLayer() if is_linear else PagedLayer(self, next(places)) for is_linear in kinds])

    @property
    def is_forkable(self) -> bool:
        """No: who shares and what is cut, the scheduler decides."""
        return False

    def begin(self, plan: ForwardPlan, spans: Sequence[Span]) -> None:
        """Let the next forward pass be this one."""
        self._plan, self.spans = plan, spans
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.begin(0)

    def fork(self, row: int, child_row: int) -> None:
        """Copy the states of a row of the running batch to another row."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.fork(row, child_row)

    @property
    def state_bytes(self) -> int:
        """What layers of linear attention keep."""
        return sum(layer.state_bytes for layer in self.layers if isinstance(layer, StateLayer))

    def plan_step(self, first_column: int, batch: int, columns: int, attention_mask: torch.Tensor | None) -> ForwardPlan:
        """Return the plan that was begun; every layer asks."""
        plan = self._plan
        assert plan is not None and attention_mask is None  # noqa: PT018
        assert (first_column, batch, columns) == (0, 1, plan.last_column)
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What a forward pass computes, sequence by sequence."""

    tokens: Sequence[Int32Array]
    """Token ids of those that are computed."""
    last: Int64Array
    """Tokens of the sequence that are in the cache afterwards: the new ones are the last of them."""
    num_logits: Int64Array
    """How many of the new tokens, from the last one back, give logits of what follows them."""
    tables: Sequence[Int32Array]
    """By group of layers: its blocks [sequences, max_blocks], int32, -1 behind those that it holds."""
    rows: Int64Array
    """Its place in the running batch, which is another's only after it has gone."""
    again: BoolArray | None = None
    """Whether its last token is computed again in a later step: then its state stays before it. None: nobody's is."""


class ModelRunner:
    """Runs a model over blocks that somebody else gives out.

    Several sequences of a pass may share blocks, even those that the pass itself fills: each layer writes all new keys and values
    before anybody attends.
    """

    def __init__(self, model: Any, storage: PagedKVStorage, *, layers: range | None = None, backend: str = "auto") -> None:
        """Let `model` attend over `storage` from now on, in these of its layers; None: in all.

        Raises:
            ConfigError: If it cannot, or its tokens would depend on who else is in the batch.
        """
        check_packs(model)
        use_paged_attention(model, with_states=True)
        pack(model, lambda cache: cache.spans if isinstance(cache, StepCache) else None)
        self.model, self.storage = model, storage
        self._cache = StepCache(model.config, storage, range(len(storage.layout.places)) if layers is None else layers, backend)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, step: StepInput) -> torch.Tensor:
        """Compute a step and return the logits that it asks for [sum of num_logits, vocabulary], sequence after sequence."""
        device = self.storage.device
        counts = np.array([new.size for new in step.tokens], np.int64)
        tokens = np.concatenate(step.tokens).astype(np.int64)
        positions = np.concatenate([np.arange(last - new.size, last) for new, last in zip(step.tokens, step.last, strict=True)])
        ends = np.cumsum(counts)
        kept = np.concatenate([np.arange(end - number, end) for end, number in zip(ends, step.num_logits, strict=True)])
        places = torch.from_numpy(kept.astype(np.int64)).to(device)
        sizes = self.storage.layout.block_sizes
        self._cache.begin(plan_tokens(counts, step.last, tables=step.tables, block_sizes=sizes, device=device), _spans(step))
        with torch.no_grad():
            out = self.model(
                input_ids=torch.from_numpy(tokens)[None].to(device),
                position_ids=torch.from_numpy(positions)[None].to(device),
                cache=self._cache,
                use_cache=True,
                **({"logits_to_keep": places} if self._keeps_logits else {}),
            )
        logits: torch.Tensor = out.logits[0] if self._keeps_logits else out.logits[0, places]
        return logits

    def fork_state(self, row: int, child_row: int) -> None:
        """Let the sequence in `child_row` go on from the state of that in `row`; nothing to do without linear attention."""
        self._cache.fork(row, child_row)


def _spans(step: StepInput) -> list[Span]:
    """Return where sequences stand in the row of tokens: a last token that is computed again is a span of its own."""
    spans, begin = [], 0
    twice = [False] * len(step.tokens) if step.again is None else step.again.tolist()
    for new, last, row, again in zip(step.tokens, step.last.tolist(), step.rows.tolist(), twice, strict=True):
        end, starts = begin + new.size, last == new.size
        if again and new.size > 1:
            spans.append(Span(begin, end - 1, row, starts))
            begin, starts = end - 1, False
        spans.append(Span(begin, end, row, starts, keeps=not again))
        begin = end
    return spans


def check_packs(model: Any) -> None:
    """Refuse models that cannot compute several sequences in one row.

    Raises:
        ConfigError: With the reason, and what works.
    """
    name = type(model.config).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{name}: the model takes no position_ids, so sequences cannot stand in one row: use PagedCache for it")
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (rope, *(part for part in rope.values() if isinstance(part, dict)))}
    if strange := kinds.intersection(_BATCH_DEPENDENT_ROPE):
        raise ConfigError(
            f"{name}: rotary embeddings of type {', '.join(sorted(strange))} follow the longest sequence of a batch: a text would "
            "depend on its company. Use PagedCache for one sequence, or a model with another type, e.g. 'default' or 'yarn'"
        )
