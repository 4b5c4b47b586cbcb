"""The constants of a step's duration, which belong to a machine, an engine, a weight type and a KV type, never to a model."""

import math
from dataclasses import dataclass, fields

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.row_rates import RowRates
from pagedkv.weight_format import WeightFormat

EAGER_S_PER_LAYER = 40e-6
"""What launching one layer's kernels adds to a step without CUDA graphs: about 10 launches of 4 microseconds. Estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConstants:
    """How fast a machine does each part of a step under an engine."""

    weight_read_bytes_per_s: float
    """Reading weights."""
    linear_flops: float
    """Multiplying with them, in operations a second."""
    kv_read_bytes_per_s: float
    """Reading keys and values."""
    attention_flops: float
    """Queries against keys, and weighted values."""
    step_overhead_s: float
    """Host and launch time of a step."""
    layer_overhead_s: float = 0.0
    """What a step takes for each layer besides."""
    batched_layer_overhead_s: float = 0.0
    """What a step of more than one token takes for each layer besides: llama.cpp replays CUDA graphs for single tokens only."""
    sequence_overhead_s: float
    """Host time for each sequence of a step."""
    token_overhead_s: float = 0.0
    """What each token of a step takes besides its products and attention: norms, activations, positions, writing keys and values.
    An engine in Python takes some; published rates cannot tell it from arithmetic, so no group has it."""
    state_bytes_per_s: float
    """Reading and writing the states of layers that have one, for the first sequence of a step."""
    further_state_bytes_per_s: float
    """The same for each further one."""
    state_scan_bytes_per_s: float = math.inf
    """Taking tokens into those states: bytes of state, read and written, times tokens."""
    overlap: float = math.inf
    """The p of (read^p + compute^p)^(1/p): 1 is their sum, infinite the longer of both."""
    routing_exponent: float = 1.0
    """n tokens touch as many experts as n to this power that choose independently."""
    expert_rate: float = 1.0
    """Rate of products with routed experts as a share of `linear_flops`: each has few of a step's tokens, gathered first."""
    latent_attention: float = 0.0
    """1: MLA's queries meet latents where prompts are read too (llama.cpp); 0: keys and values are expanded first."""
    row_rates: RowRates | None = None
    """What products of a few rows reach with these weights, reading them included; `linear_flops` is then the rate of many. None: a
    product takes what its operations take at that rate, or reading the weights, by `overlap`."""


NUMBERS = tuple(spec.name for spec in fields(StepConstants) if spec.name != "row_rates")
"""The constants that are a number each."""


def catalogue_constants(hardware: HardwareSpec, weight_format: WeightFormat) -> StepConstants:
    """Return the machine's own figures, which no engine was fitted to; its rates by rows, if these weights were measured."""
    row_rates = hardware.linear_by_rows.get(weight_format.name)
    return StepConstants(
        weight_read_bytes_per_s=hardware.read_bandwidth_bytes_per_s,
        linear_flops=hardware.effective_flops(weight_format) if row_rates is None else row_rates.full_flops,
        kv_read_bytes_per_s=hardware.kv_read_bandwidth_bytes_per_s,
        attention_flops=hardware.effective_flops(None),
        step_overhead_s=hardware.step_overhead_s,
        sequence_overhead_s=hardware.sequence_overhead_s,
        state_bytes_per_s=hardware.kv_read_bandwidth_bytes_per_s,
        further_state_bytes_per_s=hardware.kv_read_bandwidth_bytes_per_s,
        row_rates=row_rates,
    )
