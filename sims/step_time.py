"""How long a step takes: a roofline over weights, KV cache and arithmetic, plus fixed costs."""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from operator import add
from typing import NamedTuple, Protocol

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.jit import lean_jit
from pagedkv.kv_spec import KVCacheSpec, LayerGroup
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.drafting import Drafting
from pagedkv.step_batch import StepBatch, empty_batch
from pagedkv.weight_format import WeightFormat

NO_WINDOW = np.iinfo(np.int64).max

EAGER_S_PER_LAYER = 40e-6
"""What launching one layer's kernels adds to a step without CUDA graphs: about 10 launches of 4 microseconds. Estimated."""


class StepCost(NamedTuple):
    """How long a step takes, in seconds, by what binds it. The parts follow each other: their sum is the step."""

    memory_s: float
    """Bound by reading weights or KV."""
    compute_s: float
    """Bound by arithmetic."""
    overhead_s: float
    """Launches and host work."""

    @property
    def total_s(self) -> float:
        """Duration of the step."""
        return self.memory_s + self.compute_s + self.overhead_s


def total_cost(costs: Iterable[StepCost]) -> StepCost:
    """Return what one or more forward passes cost, one after the other."""
    return reduce(lambda sofar, cost: StepCost(*map(add, sofar, cost)), costs)


class StepTimeModel(Protocol):
    """Gives each step its duration on the virtual clock."""

    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        """Return what a step over the first `num_entries` of `batch` costs."""


class RooflineCoefficients(NamedTuple):
    """One machine running one model, reduced to what a step costs."""

    dense_weight_s: float
    """Reading the weights that every step reads."""
    expert_weight_s: float
    """Reading all routed experts."""
    expert_share: float
    """Share of the routed experts that one token uses: k / E."""
    linear_s_per_token: float
    """Multiplying with the active weights, output head excluded."""
    head_s_per_sequence: float
    """Multiplying with the output head, once per sequence."""
    windows: Int64Array
    """By layer group: how many tokens its attention reads at most, or NO_WINDOW."""
    kv_s_per_token: Float64Array
    """By layer group: reading or writing the KV of one token in all its layers."""
    state_s_per_sequence: float
    """Reading and writing the state of linear-attention and Mamba layers."""
    attention_s_per_pair: Float64Array
    """By layer group: one query against one key in all its layers."""
    step_overhead_s: float
    """Launching a step: host work and kernel launches."""
    sequence_overhead_s: float
    """Host work per sequence of a step."""
    overlap: float
    """How sharply the longer of reading and arithmetic hides the other: the p of `overlapped`."""
    most_drafts: int
    """Drafts that a step verifies for a sequence at most: the output head is applied to these too."""


class StepCoefficients(NamedTuple):
    """What a step costs with the model, and what drafting for the next one costs."""

    model: RooflineCoefficients
    draft: RooflineCoefficients
    """Of what drafts; not looked at without passes."""
    num_draft_passes: int
    """Passes of it after each step: the first over the step's own tokens, those behind it over one token of each that decodes."""


class StepParts(NamedTuple):
    """What a step does, part by part, in seconds: with coefficients of one byte and one operation a second, in bytes and operations."""

    weights: float
    """Reading weights."""
    linear: float
    """Multiplying with them."""
    kv: float
    """Reading and writing keys and values."""
    attention: float
    """Queries against keys, and weighted values."""
    state: float
    """Reading and writing states of fixed size."""


@lean_jit
def step_parts(c: RooflineCoefficients, batch: StepBatch, num_entries: int) -> StepParts:
    """Return the parts of a step, before they overlap. O(entries × layer groups)."""
    num_tokens, num_sampled = 0, num_entries
    kv_s = attention_s = 0.0
    for i in range(num_entries):
        new, context = batch["num_scheduled_tokens"][i], batch["num_slots_needed"][i]
        before = context - new
        num_tokens += new
        num_sampled += min(max(context - batch["num_known_tokens"][i], 0), c.most_drafts)
        for g in range(c.windows.size):
            window = c.windows[g]
            # Query j (1..new) sees min(before + j, window) keys: a triangle, cut at the window.
            growing = min(max(window - before, 0), new)
            pairs = growing * before + growing * (growing + 1) / 2.0 + (new - growing) * float(min(window, context))
            kv_s += c.kv_s_per_token[g] * (min(before, window) + 2.0 * new)  # keys before are read; new ones written, then read
            attention_s += c.attention_s_per_pair[g] * pairs
    touched = 1.0 - (1.0 - c.expert_share) ** num_tokens
    return StepParts(
        c.dense_weight_s + c.expert_weight_s * touched,
        c.linear_s_per_token * num_tokens + c.head_s_per_sequence * num_sampled,
        kv_s,
        attention_s,
        c.state_s_per_sequence * num_entries,
    )


@lean_jit
def overlapped(memory_s: float, compute_s: float, sharpness: float) -> float:
    """Return how long reading and arithmetic take together: (m^p + c^p)^(1/p), from their sum (p = 1) to the longer one (p infinite)."""
    longer, shorter = max(memory_s, compute_s), min(memory_s, compute_s)
    if shorter == 0.0 or sharpness == np.inf:
        return longer
    if sharpness == 1.0:
        return longer + shorter
    return longer * (1.0 + (shorter / longer) ** sharpness) ** (1.0 / sharpness)


@lean_jit
def _priced(c: RooflineCoefficients, parts: StepParts, num_entries: int) -> tuple[float, float, float]:
    """Return seconds bound by memory and by arithmetic, and of overhead: each half counts as what takes longer in it."""
    linear_s = overlapped(parts.weights, parts.linear, c.overlap)
    attention_s = overlapped(parts.kv, parts.attention, c.overlap)
    memory_s = (linear_s if parts.weights >= parts.linear else 0.0) + (attention_s if parts.kv >= parts.attention else 0.0)
    compute_s = (linear_s if parts.linear > parts.weights else 0.0) + (attention_s if parts.attention > parts.kv else 0.0)
    return memory_s + parts.state, compute_s, c.step_overhead_s + c.sequence_overhead_s * num_entries


@lean_jit
def step_cost(c: RooflineCoefficients, batch: StepBatch, num_entries: int) -> tuple[float, float, float]:
    """Return seconds bound by memory and by arithmetic, and of overhead, for a step. O(entries × layer groups)."""
    return _priced(c, step_parts(c, batch, num_entries), num_entries)


@lean_jit
def whole_step_cost(c: StepCoefficients, batch: StepBatch, num_entries: int) -> tuple[float, float, float]:
    """Return what a step costs together with the drafts for the next one. O(entries × layer groups)."""
    memory_s, compute_s, overhead_s = step_cost(c.model, batch, num_entries)
    if c.num_draft_passes > 0:
        first = step_cost(c.draft, batch, num_entries)
        further = _decoding_cost(c.draft, batch, num_entries)
        passes = c.num_draft_passes - 1
        memory_s += first[0] + passes * further[0]
        compute_s += first[1] + passes * further[1]
        overhead_s += first[2] + passes * further[2]
    return memory_s, compute_s, overhead_s


@lean_jit
def _decoding_cost(c: RooflineCoefficients, batch: StepBatch, num_entries: int) -> tuple[float, float, float]:
    """Return what one token more of each entry that decodes costs, as `step_cost`; a context a few tokens longer is left out."""
    decoding = 0
    kv_s = attention_s = 0.0
    for i in range(num_entries):
        context = batch["num_slots_needed"][i]
        if context >= batch["num_known_tokens"][i]:
            decoding += 1
            for g in range(c.windows.size):
                kv_s += c.kv_s_per_token[g] * min(context, c.windows[g])
                attention_s += c.attention_s_per_pair[g] * min(context, c.windows[g])
    if decoding == 0:
        return 0.0, 0.0, 0.0
    parts = StepParts(
        c.dense_weight_s + c.expert_weight_s * (1.0 - (1.0 - c.expert_share) ** decoding),
        (c.linear_s_per_token + c.head_s_per_sequence) * decoding,
        kv_s,
        attention_s,
        c.state_s_per_sequence * decoding,
    )
    return _priced(c, parts, decoding)


def _most_tokens_read(group: LayerGroup) -> int:
    """Return how many tokens a query reads at most; a chunk counts as a sliding window of its length."""
    selected = NO_WINDOW if group.index_topk is None else group.index_topk * group.compression
    return min(group.window or NO_WINDOW, selected)


def _coefficients(
    model: ModelSpec, hardware: HardwareSpec, *, weight_format: WeightFormat, kv_spec: KVCacheSpec
) -> RooflineCoefficients:
    """Return what `model` costs on `hardware`, without what a step costs the host."""
    read_s_per_byte = 1 / hardware.read_bandwidth_bytes_per_s
    kv_s_per_byte = 1 / hardware.kv_read_bandwidth_bytes_per_s
    flop_s = 1 / hardware.effective_flops(weight_format)
    attention_flop_s = 1 / hardware.effective_flops(None)
    return RooflineCoefficients(
        dense_weight_s=model.dense_streamed_bytes(weight_format) * read_s_per_byte,
        expert_weight_s=model.expert_bytes(weight_format) * read_s_per_byte,
        expert_share=model.experts_per_token / model.num_experts if model.num_experts else 0.0,
        linear_s_per_token=(model.flops_per_token - 2 * model.head_params) * flop_s,
        head_s_per_sequence=2 * model.head_params * flop_s,
        windows=np.array([_most_tokens_read(group) for group in model.layer_groups]),
        state_s_per_sequence=2 * kv_spec.state_bytes_per_sequence * kv_s_per_byte,
        kv_s_per_token=np.array(kv_spec.group_bytes_per_token) * kv_s_per_byte,
        attention_s_per_pair=np.array(model.group_attention_flops_per_pair) * attention_flop_s,
        step_overhead_s=0.0,
        sequence_overhead_s=0.0,
        overlap=np.inf,
        most_drafts=0,
    )


class RooflineStepTime:
    """Each half of the network, matrix products and attention, is bound by memory or by arithmetic; the halves follow each other.

    Weights: all that a step reads, with the share 1 - (1 - k/E)**tokens of a mixture's experts. KV: the context of every
    sequence, windowed layers only their window. Constants come from the hardware catalogue, with their sources.
    """

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareSpec,
        *,
        weight_format: WeightFormat,
        kv_spec: KVCacheSpec,
        enforce_eager: bool = False,
        drafting: Drafting | None = None,
    ) -> None:
        whole = _coefficients(model, hardware, weight_format=weight_format, kv_spec=kv_spec)._replace(
            step_overhead_s=hardware.step_overhead_s + (EAGER_S_PER_LAYER * model.num_layers if enforce_eager else 0.0),
            sequence_overhead_s=hardware.sequence_overhead_s,
            most_drafts=0 if drafting is None else drafting.num_tokens,
        )
        self._drafting = drafting
        draft, passes = whole, 0
        if drafting is not None and drafting.model is not None:
            spec = replace(kv_spec, groups=drafting.model.layer_groups)
            draft = _coefficients(drafting.model, hardware, weight_format=drafting.weight_format, kv_spec=spec)
            if enforce_eager:
                draft = draft._replace(step_overhead_s=EAGER_S_PER_LAYER * drafting.model.num_layers)
            passes = drafting.num_passes
        self.coefficients = StepCoefficients(whole, draft, passes)

    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        """Return what a step over the first `num_entries` of `batch` costs. O(entries × layer groups)."""
        return StepCost(*whole_step_cost(self.coefficients, batch, num_entries))

    def unloaded_e2e_s(
        self, prompt_tokens: int, output_tokens: int, *, num_cached_tokens: int = 0, max_num_batched_tokens: int
    ) -> float:
        """Return the time from arrival to the last token of a request that has the machine to itself.

        Exact for the prompt's chunks; decode steps are costed at their mean context, where the roofline is linear in it.
        """
        batch = empty_batch(1)
        drafts, tokens_per_step = (
            (0, 1.0) if self._drafting is None else (self._drafting.num_tokens, self._drafting.expected_tokens())
        )
        context = prompt_tokens + output_tokens // 2
        batch["num_scheduled_tokens"][0], batch["num_slots_needed"][0] = 1 + drafts, context + drafts
        batch["num_known_tokens"][0] = context
        prefill_s = self.prefill_cost(
            prompt_tokens, num_cached_tokens=num_cached_tokens, max_num_batched_tokens=max_num_batched_tokens
        ).total_s
        return prefill_s + (output_tokens - 1) * self.cost(batch, 1).total_s / tokens_per_step

    def prefill_cost(self, prompt_tokens: int, *, num_cached_tokens: int = 0, max_num_batched_tokens: int) -> StepCost:
        """Return what the prompt of a request that has the machine to itself costs, but for what is cached, summed over chunks."""
        batch = empty_batch(1)
        batch["num_known_tokens"][0] = prompt_tokens
        memory_s, compute_s, overhead_s, computed = 0.0, 0.0, 0.0, num_cached_tokens
        while computed < prompt_tokens:
            chunk = min(max_num_batched_tokens, prompt_tokens - computed)
            computed += chunk
            batch["num_scheduled_tokens"][0], batch["num_slots_needed"][0] = chunk, computed
            cost = self.cost(batch, 1)
            memory_s, compute_s, overhead_s = memory_s + cost.memory_s, compute_s + cost.compute_s, overhead_s + cost.overhead_s
        return StepCost(memory_s, compute_s, overhead_s)
