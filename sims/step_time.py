"""How long a step takes: a roofline over weights, KV cache and arithmetic, plus fixed costs."""

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from functools import reduce
from operator import add
from typing import NamedTuple, Protocol

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import KVCacheSpec, LayerGroup
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.drafting import Drafting
from pagedkv.sims.step_constants import EAGER_S_PER_LAYER, StepConstants, catalogue_constants
from pagedkv.sims.step_formula import (
    NO_COPIES,
    NO_WINDOW,
    CopyCoefficients,
    RooflineCoefficients,
    StepCoefficients,
    beside_copies,
    whole_step_cost,
)
from pagedkv.step_batch import StepBatch, empty_batch
from pagedkv.weight_format import WeightFormat


class StepCost(NamedTuple):
    """How long a step takes, in seconds, by what binds it. The parts follow each other: their sum is the step."""

    memory_s: float
    """Bound by reading weights or KV."""
    compute_s: float
    """Bound by arithmetic."""
    overhead_s: float
    """Launches and host work."""
    traffic_s: float = 0.0
    """What it moves to and from memory, whatever binds it, in seconds at the datasheet's bandwidth; not a part of the step."""
    arithmetic_s: float = 0.0
    """Its operations, whatever binds it, in seconds at the datasheet's rate; not a part of the step."""

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

    def beside_copies(self, cost: StepCost, num_loaded: int, num_offloaded: int) -> StepCost:
        """Return what a step costs while so many blocks come from a second tier, and so many go there."""


def _most_tokens_read(group: LayerGroup) -> int:
    """Return how many tokens a query reads at most; a chunk counts as a sliding window of its length."""
    selected = NO_WINDOW if group.index_topk is None else group.index_topk * group.compression
    return min(group.window or NO_WINDOW, selected)


def _slowed_by_experts(model: ModelSpec, constants: StepConstants) -> float:
    """Return how many times as long as at `linear_flops` the products for a token take, its output head aside."""
    if not model.num_experts:
        return 1.0
    share = model.expert_flops_per_token / (model.flops_per_token - 2 * model.head_params)
    return 1.0 + share * (1.0 / constants.expert_rate - 1.0)


def attention_flops_per_pair(model: ModelSpec, latent: float) -> Float64Array:
    """Return operations of a query-key pair by layer group; with `latent`, MLA's queries meet latents, keys and values in one."""
    expanded = np.array(model.group_attention_flops_per_pair)
    wider = [2 * group.key_dim / group.query_dim if group.kind == "mla" else 1.0 for group in model.layer_groups]
    return expanded * (1.0 + latent * (np.array(wider) - 1.0))


def coefficients(
    model: ModelSpec, *, weight_format: WeightFormat, kv_spec: KVCacheSpec, constants: StepConstants
) -> RooflineCoefficients:
    """Return what `model` costs with `constants`, but for what a step costs the host.

    Rates by rows are of dense models: of a mixture's experts each sees other rows than the step has.
    """
    by_rows = constants.row_rates if model.num_experts == 0 else None
    read_s_per_byte, flop_s = 1 / constants.weight_read_bytes_per_s, 1 / constants.linear_flops
    state_bytes = 2 * kv_spec.state_bytes_per_sequence
    linear_flops = model.flops_per_token - 2 * model.head_params
    return RooflineCoefficients(
        dense_weight_s=model.dense_streamed_bytes(weight_format) * read_s_per_byte,
        expert_weight_s=model.expert_bytes(weight_format) * read_s_per_byte,
        expert_share=model.experts_per_token / model.num_experts if model.num_experts else 0.0,
        routing_exponent=constants.routing_exponent,
        linear_s_per_token=linear_flops * _slowed_by_experts(model, constants) * flop_s,
        head_s_per_sequence=2 * model.head_params * flop_s,
        effective_rows=np.zeros(0) if by_rows is None else by_rows.effective_rows(),
        linear_overlap=constants.overlap if by_rows is None else np.inf,  # what was measured has reading in it
        windows=np.array([_most_tokens_read(group) for group in model.layer_groups]),
        kv_s_per_token=np.array(kv_spec.group_bytes_per_token) / constants.kv_read_bytes_per_s,
        state_s=state_bytes / constants.state_bytes_per_s,
        further_state_s=state_bytes / constants.further_state_bytes_per_s,
        state_s_per_token=state_bytes / constants.state_scan_bytes_per_s,
        attention_s_per_pair=attention_flops_per_pair(model, constants.latent_attention) / constants.attention_flops,
        step_overhead_s=0.0,
        batched_overhead_s=constants.batched_layer_overhead_s * model.whole_layers,
        sequence_overhead_s=0.0,
        token_overhead_s=0.0,
        overlap=constants.overlap,
        most_drafts=0,
        weights_reach=0.0,
        kv_reach=0.0,
        state_traffic_s=0.0,
        linear_reach=0.0,
        attention_reach=0.0,
    )


def _of_datasheet(
    c: RooflineCoefficients,
    model: ModelSpec,
    hardware: HardwareSpec,
    *,
    weight_format: WeightFormat,
    kv_spec: KVCacheSpec,
    constants: StepConstants,
) -> RooflineCoefficients:
    """Return `c` with what its constants are of the datasheet's rates."""
    bandwidth = hardware.memory_bandwidth.value
    return c._replace(
        weights_reach=constants.weight_read_bytes_per_s / bandwidth,
        kv_reach=constants.kv_read_bytes_per_s / bandwidth,
        state_traffic_s=2 * kv_spec.state_bytes_per_sequence / bandwidth,
        linear_reach=constants.linear_flops / _slowed_by_experts(model, constants) / hardware.peak_flops(weight_format),
        attention_reach=constants.attention_flops / hardware.peak_flops(None),
    )


_READ = ("dense_weight_s", "expert_weight_s", "kv_s_per_token", "state_s", "further_state_s")
_HOST = ("step_overhead_s", "batched_overhead_s", "sequence_overhead_s", "token_overhead_s")
_ARITHMETIC = ("linear_s_per_token", "head_s_per_sequence", "attention_s_per_pair", "state_s_per_token")


def _slower(c: RooflineCoefficients, decode_factor: float, prefill_factor: float) -> RooflineCoefficients:
    """Return `c` with reading and overheads that take `decode_factor` times as long, and arithmetic `prefill_factor`."""
    times = {name: getattr(c, name) * decode_factor for name in (*_READ, *_HOST)}
    times |= {name: getattr(c, name) * prefill_factor for name in _ARITHMETIC}
    reaches = {name: getattr(c, name) / decode_factor for name in ("weights_reach", "kv_reach")}
    reaches |= {name: getattr(c, name) / prefill_factor for name in ("linear_reach", "attention_reach")}
    return c._replace(**times, **reaches)


class RooflineStepTime:
    """Each half of the network, matrix products and attention, is bound by memory or by arithmetic; the halves follow each other.

    Weights: all that a step reads, with the share 1 - (1 - k/E)**tokens of a mixture's experts. KV: the context of every
    sequence, windowed layers only their window. Where products were measured by rows, they take that, and reading the weights at
    least. Without `constants`, those of the hardware catalogue, with their sources.
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
        constants: StepConstants | None = None,
        copies: CopyCoefficients = NO_COPIES,
    ) -> None:
        if constants is None:
            constants = catalogue_constants(hardware, weight_format)
        layer_s = constants.layer_overhead_s + (EAGER_S_PER_LAYER if enforce_eager else 0.0)
        whole = coefficients(model, weight_format=weight_format, kv_spec=kv_spec, constants=constants)._replace(
            step_overhead_s=constants.step_overhead_s + layer_s * model.whole_layers,
            sequence_overhead_s=constants.sequence_overhead_s,
            token_overhead_s=constants.token_overhead_s,
            most_drafts=0 if drafting is None else drafting.num_tokens,
        )
        whole = _of_datasheet(whole, model, hardware, weight_format=weight_format, kv_spec=kv_spec, constants=constants)
        self._drafting = drafting
        draft, passes = whole, 0
        if drafting is not None and drafting.model is not None:
            spec = replace(kv_spec, groups=drafting.model.layer_groups)
            its = constants
            if drafting.weight_format != weight_format:
                its = replace(constants, linear_flops=hardware.effective_flops(drafting.weight_format), row_rates=None)
            draft = coefficients(drafting.model, weight_format=drafting.weight_format, kv_spec=spec, constants=its)
            draft = draft._replace(step_overhead_s=layer_s * drafting.model.whole_layers)
            draft = _of_datasheet(
                draft, drafting.model, hardware, weight_format=drafting.weight_format, kv_spec=spec, constants=its
            )
            passes = drafting.num_passes
        self.coefficients = StepCoefficients(whole, draft, passes, copies)

    def slower(self, *, decode_factor: float, prefill_factor: float) -> "RooflineStepTime":
        """Return the same where reading and overheads take `decode_factor` times as long, and arithmetic `prefill_factor`."""
        slow, c = copy(self), self.coefficients
        model, draft = (_slower(each, decode_factor, prefill_factor) for each in (c.model, c.draft))
        slow.coefficients = c._replace(model=model, draft=draft)
        return slow

    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        """Return what a step over the first `num_entries` of `batch` costs. O(entries × layer groups)."""
        return StepCost(*whole_step_cost(self.coefficients, batch, num_entries))

    def beside_copies(self, cost: StepCost, num_loaded: int, num_offloaded: int) -> StepCost:
        """Return what a step costs while so many blocks come from a second tier, and so many go there."""
        return StepCost(*beside_copies(self.coefficients.copies, (*cost,), num_loaded, num_offloaded))

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
        total, computed = StepCost(0.0, 0.0, 0.0), num_cached_tokens
        while computed < prompt_tokens:
            chunk = min(max_num_batched_tokens, prompt_tokens - computed)
            computed += chunk
            batch["num_scheduled_tokens"][0], batch["num_slots_needed"][0] = chunk, computed
            total = total_cost((total, self.cost(batch, 1)))
        return total
