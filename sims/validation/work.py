"""What the steps behind published figures do, counted once, so that a fit can price them with many constants: arrays, compiled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.model_spec import ModelSpec
from pagedkv.row_rates import RowRates
from pagedkv.sims.step_constants import NUMBERS, StepConstants
from pagedkv.sims.step_formula import StepParts, priced, step_parts, touched_experts
from pagedkv.sims.step_time import attention_flops_per_pair, coefficients
from pagedkv.sims.validation.points import Point
from pagedkv.step_batch import StepBatch
from pagedkv.weight_format import WeightFormat

CONSTANTS = NUMBERS
"""Every constant, in the order of the columns of `Work.seconds`."""
_COLUMN = {name: i for i, name in enumerate(CONSTANTS)}
_NOT_RATES = ("overlap", "routing_exponent", "expert_rate", "latent_attention")
_ONES: dict[str, Any] = {name: 0.0 if name.endswith("overhead_s") else 1.0 for name in CONSTANTS if name not in _NOT_RATES}
_ONE_A_SECOND = StepConstants(**_ONES, overlap=math.inf, expert_rate=math.inf)
_COLUMNS = 12
(
    _WEIGHTS,
    _EXPERTS,
    _SHARE,
    _TOKENS,
    _LINEAR,
    _EXPERT_LINEAR,
    _KV,
    _ATTENTION,
    _LATENT_ATTENTION,
    _STATE,
    _SEQUENCES,
    _LAYERS,
) = range(_COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """The steps of some figures, in bytes, operations and counts."""

    quantities: Float64Array
    """One row per kind of step."""
    counts: Float64Array
    """How many steps of that kind there are."""
    point: Int64Array
    """Which figure they belong to."""
    tokens: Float64Array
    """By figure: tokens made or read."""
    least_overlap: float = 0.0
    """Reading weights and multiplying them hide each other at least so sharply: infinitely, if products were measured by rows."""

    @staticmethod
    def of(points: Sequence[Point]) -> "Work":
        """Return the work of `points`. O(steps × entries)."""
        rows, counts, owner = [], [], []
        for i, point in enumerate(points):
            subject = point.subject
            rows += _quantities(
                [steps.batch for steps in point.steps],
                subject.model,
                weight_format=subject.weight_format,
                kv_cache_dtype=point.kv_cache_dtype,
            )
            counts += [float(steps.count) for steps in point.steps]
            owner += [i] * len(point.steps)
        return Work(
            quantities=np.array(rows, np.float64).reshape(-1, _COLUMNS),
            counts=np.array(counts, np.float64),
            point=np.array(owner, np.int64),
            tokens=np.array([point.tokens for point in points], np.float64),
        )

    @staticmethod
    def of_steps(
        batches: Sequence[StepBatch],
        model: ModelSpec,
        *,
        weight_format: WeightFormat,
        kv_cache_dtype: str,
        row_rates: RowRates | None = None,
    ) -> "Work":
        """Return the work of single steps, each a figure; of products by rows, if those were measured. O(steps × entries)."""
        rows = _quantities(batches, model, weight_format=weight_format, kv_cache_dtype=kv_cache_dtype, row_rates=row_rates)
        return Work(
            quantities=np.array(rows, np.float64).reshape(-1, _COLUMNS),
            counts=np.ones(len(batches)),
            point=np.arange(len(batches)),
            tokens=np.array([float(batch["num_scheduled_tokens"].sum()) for batch in batches]),
            least_overlap=math.inf if row_rates is not None and model.num_experts == 0 else 0.0,
        )

    def rates(self, constants: Float64Array) -> Float64Array:
        """Return tokens a second by figure. `constants` has a row per figure and a column per name of `CONSTANTS`."""
        seconds = np.zeros(self.tokens.size)
        _add_seconds(self.quantities, self.counts, self.point, constants, self.least_overlap, seconds)
        return self.tokens / seconds

    def where(self, chosen: Int64Array) -> "Work":
        """Return the work of the figures `chosen`, in that order."""
        place = np.full(self.tokens.size, -1)
        place[chosen] = np.arange(chosen.size)
        kept = place[self.point] >= 0
        return replace(
            self,
            quantities=self.quantities[kept],
            counts=self.counts[kept],
            point=place[self.point[kept]],
            tokens=self.tokens[chosen],
        )


def _quantities(
    batches: Sequence[StepBatch],
    model: ModelSpec,
    *,
    weight_format: WeightFormat,
    kv_cache_dtype: str,
    row_rates: RowRates | None = None,
) -> list[tuple[float, ...]]:
    """Return a row of `Work.quantities` for each step."""
    spec, one_a_second = model.kv_spec(kv_cache_dtype), replace(_ONE_A_SECOND, row_rates=row_rates)
    unit = coefficients(model, weight_format=weight_format, kv_spec=spec, constants=one_a_second)
    dense = unit._replace(expert_weight_s=0.0, state_s=0.0, further_state_s=0.0, state_s_per_token=0.0)
    latent = dense._replace(attention_s_per_pair=attention_flops_per_pair(model, 1.0))
    rows: list[tuple[float, ...]] = []
    for batch in batches:
        parts, num_tokens = step_parts(dense, batch, batch.size), float(batch["num_scheduled_tokens"].sum())
        rows.append(
            (
                parts.weights,
                unit.expert_weight_s,
                unit.expert_share,
                num_tokens,
                parts.products,
                model.expert_flops_per_token * num_tokens,
                parts.kv,
                parts.attention,
                step_parts(latent, batch, batch.size).attention,
                unit.state_s,
                float(batch.size),
                model.whole_layers,
            )
        )
    return rows


def as_row(constants: StepConstants) -> Float64Array:
    """Return the constants in the order of `CONSTANTS`."""
    return np.array([getattr(constants, name) for name in CONSTANTS], np.float64)


(
    _READ,
    _FLOPS,
    _KV_READ,
    _ATTENTION_FLOPS,
    _STEP_S,
    _LAYER_S,
    _BATCHED_S,
    _SEQUENCE_S,
    _TOKEN_S,
    _STATE_READ,
    _FURTHER,
    _SCAN,
    _OVERLAP,
    _ROUTING,
    _EXPERT_RATE,
    _LATENT,
) = range(len(CONSTANTS))


@lean_jit
def _add_seconds(
    q: Float64Array, counts: Float64Array, point: Int64Array, constants: Float64Array, least_overlap: float, total: Float64Array
) -> None:
    """Add to `total` the seconds of each figure: the formula of a step, on quantities instead of a batch."""
    for i in range(q.shape[0]):
        c, n = constants[point[i]], q[i, _SEQUENCES]
        weights = q[i, _WEIGHTS] + q[i, _EXPERTS] * touched_experts(q[i, _SHARE], q[i, _TOKENS], c[_ROUTING])
        state_s = q[i, _STATE] * (1.0 / c[_STATE_READ] + (n - 1.0) / c[_FURTHER] + q[i, _TOKENS] / c[_SCAN])
        linear_s = (q[i, _LINEAR] + q[i, _EXPERT_LINEAR] / c[_EXPERT_RATE]) / c[_FLOPS]
        attention = q[i, _ATTENTION] + c[_LATENT] * (q[i, _LATENT_ATTENTION] - q[i, _ATTENTION])
        kv_s, attention_s = q[i, _KV] / c[_KV_READ], attention / c[_ATTENTION_FLOPS]
        parts = StepParts(weights / c[_READ], linear_s, linear_s, kv_s, attention_s, state_s, c[_TOKEN_S] * q[i, _TOKENS])
        memory_s, compute_s = priced(parts, max(c[_OVERLAP], least_overlap), c[_OVERLAP])
        layer_s = c[_LAYER_S] + (c[_BATCHED_S] if q[i, _TOKENS] > 1.0 else 0.0)
        overhead_s = c[_STEP_S] + layer_s * q[i, _LAYERS] + c[_SEQUENCE_S] * n + parts.tokens
        total[point[i]] += counts[i] * (memory_s + compute_s + overhead_s)
