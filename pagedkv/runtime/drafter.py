"""A draft model beside the target: its keys and values lie in the same blocks, and its tokens in the slots that look ahead."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.runtime.model_layers import linear_layers
from pagedkv.runtime.model_runner import ModelRunner, StepInput
from pagedkv.runtime.sampling import sample
from pagedkv.runtime.storage import PagedKVStorage
from pagedkv.runtime.texts import Text
from pagedkv.runtime.verification import Drafts

MOST_DRAFTS = 64
"""As many as the simulator takes (`pagedkv.sims.drafting`)."""


class Drafter:
    """Drafts what a step will verify, before the target computes it: k passes for k drafts, as the simulator has it.

    Its first pass computes all known tokens of the step, prompts too, so that whatever block the target has filled, it has filled
    as well: who finds a block in the prefix cache finds the keys of both. The last draft is never computed here, so a text whose
    drafts were all accepted is one token behind: `Text.draft_lag`.
    """

    def __init__(self, model: Any, storage: PagedKVStorage, *, layers: range, backend: str) -> None:
        """Let `model` draft, with these layers of `storage`.

        Raises:
            ConfigError: If it cannot.
        """
        self.runner = ModelRunner(model, storage, layers=layers, backend=backend)

    def draft(
        self,
        texts: Sequence[Text],
        *,
        first: Int64Array,
        last: Int64Array,
        known: Int64Array,
        tables: Sequence[Int32Array],
        rows: Int64Array,
    ) -> list[Drafts]:
        """Return by entry of a step its drafts: as many as the step computes tokens beyond the known ones.

        Args:
            texts: By entry.
            first: By entry: tokens that the target has computed.
            last: By entry: tokens that it will have.
            known: By entry: tokens known.
            tables: By group of layers and entry: its blocks, with room for `last` tokens.
            rows: By entry: its place in the running batch.
        """
        number = np.maximum(last - known, 0)
        drafts = [Drafts() for _ in texts]
        lags = np.array([text.draft_lag for text in texts], np.int64)
        begin, end = (first - lags).tolist(), np.minimum(last, known)
        new = [text.chain.token_ids[i:j] for text, i, j in zip(texts, begin, end.tolist(), strict=True)]
        logits = self.runner.logits(StepInput(tokens=new, last=end, num_logits=np.minimum(number, 1), tables=tables, rows=rows))
        entries, done = np.flatnonzero(number), 0
        while entries.size:
            samplers = [texts[i].sampler for i in entries.tolist()]
            for i, token, row in zip(entries.tolist(), sample(logits, samplers), logits, strict=True):
                drafts[i].tokens.append(token)
                if texts[i].sampler.params.temperature:
                    drafts[i].logits.append(row)
            done += 1
            entries = entries[number[entries] > done]
            if entries.size:
                new = [np.array(drafts[i].tokens[-1:], np.int32) for i in entries.tolist()]
                ones, own = np.ones(entries.size, np.int64), [table[entries] for table in tables]
                logits = self.runner.logits(
                    StepInput(tokens=new, last=known[entries] + done, num_logits=ones, tables=own, rows=rows[entries])
                )
        return drafts


def check_draft(draft: Any, target: Any, number: int) -> None:
    """Refuse a draft model that cannot draft for `target`, or no sensible `number` of drafts.

    Raises:
        ConfigError: With what would work.
    """
    if not 1 <= number <= MOST_DRAFTS:
        raise ConfigError(f"num-speculative-tokens is {number}: a draft model needs 1 to {MOST_DRAFTS}")
    if linear_layers(target.config):
        raise ConfigError(
            f"a draft model for {target.config.model_type}: the state of its linear attention cannot take rejected drafts back; it "
            "is served without one"
        )
    sizes = [int(model.get_input_embeddings().weight.shape[0]) for model in (draft, target)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the draft model {draft.config.model_type} has {sizes[0]:,} words, the target {target.config.model_type} "
            f"{sizes[1]:,}: a draft model needs the vocabulary of its target"
        )
    for what in ("dtype", "device"):
        mine, its = getattr(draft, what), getattr(target, what)
        if mine != its:
            raise ConfigError(f"the draft model is {mine}, the target {its}: both share blocks, and need one {what}")
