"""The one formula behind every step's duration, compiled: for a whole batch, and for work that was counted before (the fit)."""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.step_batch import StepBatch

NO_WINDOW = np.iinfo(np.int64).max


class RooflineCoefficients(NamedTuple):
    """One machine running one model, reduced to what a step costs."""

    dense_weight_s: float
    """Reading the weights that every step reads."""
    expert_weight_s: float
    """Reading all routed experts."""
    expert_share: float
    """Share of the routed experts that one token uses: k / E."""
    routing_exponent: float
    """Tokens count as so many, to this power, that choose their experts independently; 1: they do."""
    linear_s_per_token: float
    """Multiplying with the active weights, output head excluded, at the rate of many rows."""
    head_s_per_sequence: float
    """Multiplying with the output head, once per sequence."""
    effective_rows: Float64Array
    """For each number of rows of a product, how many take as long at the rate of many, reading the weights included; behind its end
    rows count as they are. Empty: nobody measured it."""
    linear_overlap: float
    """How sharply the longer of reading and multiplying weights hides the other: the p of `overlapped`."""
    windows: Int64Array
    """By layer group: how many tokens its attention reads at most, or NO_WINDOW."""
    kv_s_per_token: Float64Array
    """By layer group: reading or writing the KV of one token in all its layers."""
    state_s: float
    """Reading and writing the state of linear-attention and Mamba layers, for the first sequence of a step."""
    further_state_s: float
    """The same for each further one."""
    state_s_per_token: float
    """Taking one token into the states."""
    attention_s_per_pair: Float64Array
    """By layer group: one query against one key in all its layers."""
    step_overhead_s: float
    """Launching a step: host work and kernel launches, those per layer included."""
    batched_overhead_s: float
    """The same besides, for a step of more than one token."""
    sequence_overhead_s: float
    """Host work per sequence of a step."""
    token_overhead_s: float
    """What each token takes besides its products and attention."""
    overlap: float
    """The same for reading keys and values, and attending to them."""
    most_drafts: int
    """Drafts that a step verifies for a sequence at most: the output head is applied to these too."""
    weights_reach: float
    """Bandwidth that reading weights reaches, as a share of the datasheet's."""
    kv_reach: float
    """The same for reading KV."""
    state_traffic_s: float
    """Reading and writing the states of a sequence at the datasheet's bandwidth."""
    linear_reach: float
    """Rate that matrix products reach, as a share of the datasheet's."""
    attention_reach: float
    """The same for attention."""


class CopyCoefficients(NamedTuple):
    """What copies of KV blocks to and from a second tier cost."""

    block_s: float
    """Copying one block."""
    latency_s: float
    """Until the copies of a step begin."""
    both_at_once: bool
    """Copies to the tier and from it do not slow each other down, as on PCIe; on a disk they share its rate."""


NO_COPIES = CopyCoefficients(0.0, 0.0, both_at_once=False)


class StepCoefficients(NamedTuple):
    """What a step costs with the model, and what drafting for the next one costs."""

    model: RooflineCoefficients
    draft: RooflineCoefficients
    """Of what drafts; not looked at without passes."""
    num_draft_passes: int
    """Passes of it after each step: the first over the step's own tokens, those behind it over one token of each that decodes."""
    copies: CopyCoefficients


class StepParts(NamedTuple):
    """What a step does, part by part, in seconds; in bytes and operations with coefficients of one of each a second."""

    weights: float
    """Reading weights."""
    linear: float
    """The operations of multiplying with them, at the rate of many rows."""
    products: float
    """What these products take, as few rows as they have: `linear`, if nobody measured it."""
    kv: float
    """Reading and writing keys and values."""
    attention: float
    """Queries against keys, and weighted values."""
    state: float
    """Reading, computing and writing states of fixed size."""
    tokens: float
    """What each token takes besides: norms, activations, positions."""


@lean_jit
def touched_experts(share: float, tokens: float, exponent: float) -> float:
    """Return the share of the routed experts that `tokens` use, of which one uses `share`."""
    missed: float = (1.0 - share) ** (tokens if exponent == 1.0 else tokens**exponent)
    return 1.0 - missed


@lean_jit
def overlapped(memory_s: float, compute_s: float, sharpness: float) -> float:
    """Return how long reading and arithmetic take together: (m^p + c^p)^(1/p), from their sum (1) to the longer one (infinite)."""
    longer, shorter = max(memory_s, compute_s), min(memory_s, compute_s)
    if shorter == 0.0 or sharpness == np.inf:
        return longer
    if sharpness == 1.0:
        return longer + shorter
    together: float = longer * (1.0 + (shorter / longer) ** sharpness) ** (1.0 / sharpness)
    return together


@lean_jit
def as_full_rows(effective_rows: Float64Array, rows: int) -> float:
    """Return how many rows take as long, at the rate of many, as a product of `rows` does."""
    return effective_rows[rows] if rows < effective_rows.size else float(rows)


@lean_jit
def priced(parts: StepParts, linear_overlap: float, overlap: float) -> tuple[float, float]:
    """Return seconds bound by memory and by arithmetic: each half of the network counts as what takes longer in it."""
    linear_s = overlapped(parts.weights, parts.products, linear_overlap)
    attention_s = overlapped(parts.kv, parts.attention, overlap)
    memory_s = (linear_s if parts.weights >= parts.linear else 0.0) + (attention_s if parts.kv >= parts.attention else 0.0)
    compute_s = (linear_s if parts.linear > parts.weights else 0.0) + (attention_s if parts.attention > parts.kv else 0.0)
    return memory_s + parts.state, compute_s


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
    state_s = c.state_s_per_token * num_tokens
    if num_entries > 0:
        state_s += c.state_s + c.further_state_s * (num_entries - 1)
    linear_s = products_s = c.linear_s_per_token * num_tokens + c.head_s_per_sequence * num_sampled
    if c.effective_rows.size > 0:
        products_s = c.linear_s_per_token * as_full_rows(c.effective_rows, num_tokens)
        products_s += c.head_s_per_sequence * as_full_rows(c.effective_rows, num_sampled)
    return StepParts(
        c.dense_weight_s + c.expert_weight_s * touched_experts(c.expert_share, num_tokens, c.routing_exponent),
        linear_s,
        products_s,
        kv_s,
        attention_s,
        state_s,
        c.token_overhead_s * num_tokens,
    )


@lean_jit
def _cost_of(
    c: RooflineCoefficients, parts: StepParts, num_entries: int, num_batched: int
) -> tuple[float, float, float, float, float]:
    """Return the fields of `StepCost` for a step with these parts; `num_batched` is 1 if it has more than one token, else 0."""
    memory_s, compute_s = priced(parts, c.linear_overlap, c.overlap)
    overhead_s = c.step_overhead_s + c.batched_overhead_s * num_batched + c.sequence_overhead_s * num_entries + parts.tokens
    traffic_s = parts.weights * c.weights_reach + parts.kv * c.kv_reach + c.state_traffic_s * num_entries
    arithmetic_s = parts.linear * c.linear_reach + parts.attention * c.attention_reach
    return memory_s, compute_s, overhead_s, traffic_s, arithmetic_s


@lean_jit
def step_cost(c: RooflineCoefficients, batch: StepBatch, num_entries: int) -> tuple[float, float, float, float, float]:
    """Return the fields of `StepCost` for a step. O(entries × layer groups)."""
    num_batched = 1 if num_entries > 1 or batch["num_scheduled_tokens"][0] > 1 else 0
    return _cost_of(c, step_parts(c, batch, num_entries), num_entries, num_batched)


@lean_jit
def whole_step_cost(c: StepCoefficients, batch: StepBatch, num_entries: int) -> tuple[float, float, float, float, float]:
    """Return what a step costs together with the drafts for the next one. O(entries × layer groups)."""
    memory_s, compute_s, overhead_s, traffic_s, arithmetic_s = step_cost(c.model, batch, num_entries)
    if c.num_draft_passes > 0:
        first = step_cost(c.draft, batch, num_entries)
        further = _decoding_cost(c.draft, batch, num_entries)
        passes = c.num_draft_passes - 1
        memory_s += first[0] + passes * further[0]
        compute_s += first[1] + passes * further[1]
        overhead_s += first[2] + passes * further[2]
        traffic_s += first[3] + passes * further[3]
        arithmetic_s += first[4] + passes * further[4]
    return memory_s, compute_s, overhead_s, traffic_s, arithmetic_s


@lean_jit
def cost_of_passes(
    c: StepCoefficients, passes: StepBatch, ends: Int64Array, num_passes: int
) -> tuple[float, float, float, float, float]:
    """Return what the first of `passes` cost, each of which ends where `ends` says, one after the other, as `whole_step_cost`."""
    memory_s, compute_s, overhead_s, traffic_s, arithmetic_s = whole_step_cost(c, passes[: ends[0]], ends[0])
    for p in range(1, num_passes):
        further = whole_step_cost(c, passes[ends[p - 1] : ends[p]], ends[p] - ends[p - 1])
        memory_s += further[0]
        compute_s += further[1]
        overhead_s += further[2]
        traffic_s += further[3]
        arithmetic_s += further[4]
    return memory_s, compute_s, overhead_s, traffic_s, arithmetic_s


@lean_jit
def beside_copies(
    c: CopyCoefficients, cost: tuple[float, float, float, float, float], num_loaded: int, num_offloaded: int
) -> tuple[float, float, float, float, float]:
    """Return what a step costs while so many blocks come from a second tier, and so many go there.

    Copies run beside the step, layer by layer; what takes them longer than the step, it waits for, as it does for memory.
    """
    if num_loaded + num_offloaded == 0:
        return cost
    num_blocks = max(num_loaded, num_offloaded) if c.both_at_once else num_loaded + num_offloaded
    waits_s = c.latency_s + c.block_s * num_blocks - (cost[0] + cost[1] + cost[2])
    return cost[0] + max(waits_s, 0.0), cost[1], cost[2], cost[3], cost[4]


@lean_jit
def _decoding_cost(c: RooflineCoefficients, batch: StepBatch, num_entries: int) -> tuple[float, float, float, float, float]:
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
        return 0.0, 0.0, 0.0, 0.0, 0.0
    parts = StepParts(
        c.dense_weight_s + c.expert_weight_s * touched_experts(c.expert_share, decoding, c.routing_exponent),
        (c.linear_s_per_token + c.head_s_per_sequence) * decoding,
        (c.linear_s_per_token + c.head_s_per_sequence) * as_full_rows(c.effective_rows, decoding),
        kv_s,
        attention_s,
        c.state_s + c.further_state_s * (decoding - 1) + c.state_s_per_token * decoding,
        c.token_overhead_s * decoding,
    )
    return _cost_of(c, parts, decoding, 1 if decoding > 1 else 0)
