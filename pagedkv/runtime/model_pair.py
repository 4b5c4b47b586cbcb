"""A model, and maybe a smaller one that drafts for it, over blocks that hold the keys and values of both."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pagedkv.arrays import Int32Array
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import LayerGroup
from pagedkv.layer_groups import groups_differ
from pagedkv.runtime.beam_search import held_beams
from pagedkv.runtime.drafter import Drafter, check_draft
from pagedkv.runtime.model_layers import check_model, linear_layers, model_layers
from pagedkv.runtime.model_runner import ModelRunner, StepInput
from pagedkv.runtime.state_layers import state_bytes
from pagedkv.runtime.storage import PagedKVStorage
from pagedkv.runtime.storage_layout import plan_storage
from pagedkv.runtime.texts import Text
from pagedkv.runtime.verification import Drafts
from pagedkv.step_batch import StepBatch


class Computed(NamedTuple):
    """What a step gave those of its entries whose known tokens are all computed."""

    entries: list[int]
    """Which they are."""
    drafts: list[Drafts]
    """By each of them: what was drafted for it, none without a draft model."""
    logits: torch.Tensor
    """By each: what follows its last known token, then what follows each draft [entries + drafts, vocabulary]."""


class ModelPair:
    """Computes the steps of a scheduler."""

    def __init__(
        self,
        model: Any,
        draft: Any,
        *,
        num_drafts: int,
        num_blocks: int | None,
        budget_bytes: int | None,
        block_size: int,
        max_num_seqs: int,
        dtype: torch.dtype | str | None,
        backend: str,
        layers_apart: bool,
    ) -> None:
        """Take the memory, and let both models attend over it; `draft` is None where nobody drafts.

        With `layers_apart`, layers that keep different tokens have block tables of their own; not where somebody drafts.

        Raises:
            ConfigError: If a model is not supported, or both do not go together: with what would work.
        """
        check_model(model, with_states=True)
        self.has_states = bool(linear_layers(model.config))
        """Whether layers keep a state of each sequence, which is copied for a fork, and cannot be taken back."""
        if draft is not None:
            check_draft(draft, model, num_drafts)
            check_model(draft)
        elif num_drafts:
            raise ConfigError(f"num-speculative-tokens is {num_drafts}: nothing drafts; give a speculative model too")
        if self.has_states:
            budget_bytes = _beside_states(budget_bytes, state_bytes(model), max_num_seqs)
        own, its = model_layers(model.config, with_states=True), () if draft is None else model_layers(draft.config)
        self.layers: tuple[LayerGroup, ...] = (*own, *its)
        """What layers with keys and values cache, one by one: the model's, then the draft's."""
        # A draft model may be a token behind, whose window begins one before what the target's rules keep.
        self.layers_apart = layers_apart and draft is None and groups_differ(own)
        """Whether layers that keep different tokens have block tables of their own."""
        self.storage = PagedKVStorage(
            plan_storage(self.layers, block_size=block_size, share_windows=self.layers_apart),
            num_blocks=num_blocks,
            budget_bytes=budget_bytes,
            dtype=model.dtype if dtype is None else dtype,
            device=model.device,
        )
        self.runner = ModelRunner(model, self.storage, layers=range(len(own)), backend=backend)
        self.drafter: Drafter | None = None
        if draft is not None:
            self.drafter = Drafter(draft, self.storage, layers=range(len(own), len(own) + len(its)), backend=backend)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        """Token ids are below it."""
        limits = [getattr(each.config, "max_position_embeddings", None) for each in (model, draft) if each is not None]
        self.max_positions: int | None = min((limit for limit in limits if limit), default=None)
        """Longest sequence that both take; None: there is no limit."""

    def compute(self, texts: Sequence[Text], batch: StepBatch, tables: Sequence[Int32Array]) -> Computed:
        """Compute a step.

        Args:
            texts: By entry.
            batch: Its entries.
            tables: By group of layers and entry: its blocks, with room for all that it computes [entries, max_blocks], -1 behind
                those that it holds.
        """
        last, known = batch["num_slots_needed"].copy(), batch["num_known_tokens"].copy()
        first, rows = last - batch["num_scheduled_tokens"], batch["row"].astype(np.int64)
        drafts = [Drafts() for _ in texts]
        if self.drafter is not None:
            drafts = self.drafter.draft(texts, first=first, last=last, known=known, tables=tables, rows=rows)
        tokens = [
            np.concatenate((text.chain.token_ids[begin:end], np.array(drafted.tokens, np.int32)))
            for text, drafted, begin, end in zip(texts, drafts, first.tolist(), np.minimum(last, known).tolist(), strict=True)
        ]
        wanted = np.maximum(last - known + 1, 0)
        entries = np.flatnonzero(wanted).tolist()
        again = None
        if self.has_states:
            again = np.zeros(len(texts), np.bool_)
            again[entries] = held_beams([texts[i].search for i in entries])
        logits = self.runner.logits(StepInput(tokens=tokens, last=last, num_logits=wanted, tables=tables, rows=rows, again=again))
        return Computed(entries, [drafts[i] for i in entries], logits)


def _beside_states(budget_bytes: int | None, each: int, max_num_seqs: int) -> int | None:
    """Return what is left of the memory beside the states of all rows; None: nobody said how much there is."""
    if budget_bytes is None or budget_bytes > max_num_seqs * each:
        return None if budget_bytes is None else budget_bytes - max_num_seqs * each
    raise ConfigError(
        f"{budget_bytes:,} bytes: the states of max_num_seqs {max_num_seqs} sequences take {each:,} each; needs fewer, or "
        "more memory"
    )
