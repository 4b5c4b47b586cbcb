"""Fits the constants of a step to published figures: an engine's own, and those of each weight type around the engine's mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.constant_sources import Carried, concerned, families_of
from pagedkv.sims.step_constants import StepConstants, catalogue_constants
from pagedkv.sims.validation.least_squares import covariance, least_squares, softened
from pagedkv.sims.validation.points import Point
from pagedkv.sims.validation.work import CONSTANTS, Work, as_row
from pagedkv.weight_format import WEIGHT_FORMATS, WeightFormat

OFFSET_SPREAD: Mapping[str, float] = MappingProxyType({"weight_read_bytes_per_s": 0.15, "linear_flops": 0.30})
"""Constants of a weight type, and how far they may lie from the engine's mean before data says so: spread of the logarithm."""
_VERSION_SPREAD = 0.5
_WEAK_SPREAD = 1.0
_EXPECTED_ERROR = {"decode": 0.05, "prefill": 0.10}
"""What a good model misses by: figures count in units of it."""
_SOFT_FROM = 3.0
"""Units beyond which a figure counts linearly."""
_IDENTIFIED = 0.5
"""A constant is known from rows if they leave less than this of the spread that was assumed without them: for a weight type's own,
of how far weight types differ."""
_AT_BOUND = 0.999
"""A routing exponent above this is 1, the most there can be: tokens choose their experts independently."""
_STARTS = {
    "overlap": 4.0,
    "routing_exponent": 0.7,
    "layer_overhead_s": 10e-6,
    "batched_layer_overhead_s": 60e-6,
    "state_scan_bytes_per_s": 1e12,
}
"""Where to begin with constants for which the catalogue has none that a logarithm could move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which constants an engine's rows decide; all others are the machine's."""

    engine: str
    shared: tuple[str, ...] = ()
    """Constants that all weight types share."""
    by_format: tuple[str, ...] = tuple(OFFSET_SPREAD)
    """Constants of each weight type."""
    by_version: tuple[str, ...] = ()
    """Constants by which older builds differ."""
    known: Mapping[str, float] = field(default_factory=dict)
    """Constants that its source code tells, and no row."""
    spreads: Mapping[str, float] = field(default_factory=dict)
    """How far shared constants may lie from where they begin before data says so, where that is less than anything."""


PLANS = (
    Plan(
        engine="llama-cpp",
        shared=(
            "kv_read_bytes_per_s",
            "attention_flops",
            "step_overhead_s",
            "layer_overhead_s",
            "batched_layer_overhead_s",
            "sequence_overhead_s",
            "state_bytes_per_s",
            "further_state_bytes_per_s",
            "state_scan_bytes_per_s",
            "overlap",
            "routing_exponent",
            "expert_rate",
        ),
        known={"latent_attention": 1.0},
        by_version=("linear_flops", "attention_flops"),
    ),
    Plan(
        engine="vllm",
        shared=(
            "kv_read_bytes_per_s",
            "attention_flops",
            "step_overhead_s",
            "sequence_overhead_s",
            "further_state_bytes_per_s",
            "state_scan_bytes_per_s",
            "overlap",
            "routing_exponent",
            "expert_rate",
        ),
        spreads={"kv_read_bytes_per_s": 0.15},  # it is read as fast as memory, and few rows are of long contexts
    ),
    Plan(engine="sglang"),
)
"""By engine with enough rows; that with most models first, since others may take from it what their rows do not tell."""
NOTHING_CARRIED: Mapping[str, Carried] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """Fitted constants."""

    plan: Plan
    hardware: HardwareSpec
    formats: tuple[str, ...]
    """Weight types with rows."""
    versions: tuple[str, ...]
    """Builds with rows besides the current ones."""
    x: Float64Array
    """Logarithms against the prior, in the order of `names`."""
    carried: Mapping[str, Carried] = field(default_factory=dict)
    """What other engines' rows say of constants: the fit begins there, and stays there where its own rows say nothing."""
    covariance: Float64Array | None = None
    """Of the parameters, as rows and prior leave them; None: nothing was fitted."""

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """What each parameter is: (constant, weight type or version; empty: shared, or the mean of all weight types)."""
        plan = self.plan
        return (
            *((name, "") for name in (*plan.shared, *plan.by_format)),
            *((name, fmt) for name in plan.by_format for fmt in self.formats),
            *((name, f"@{version}") for name in plan.by_version for version in self.versions),
        )

    @property
    def num_constants(self) -> int:
        """Constants that the rows decide: a weight type's own, and not the mean besides."""
        return len(self.names) - len(self.plan.by_format)

    def unfitted(self) -> "Fit":
        """Return the prior: what is assumed without any row."""
        return replace(self, x=np.zeros_like(self.x))

    def spreads(self) -> Float64Array:
        """Return the prior's standard deviation of each parameter."""
        return np.array(
            [
                _VERSION_SPREAD if of.startswith("@") else OFFSET_SPREAD[name] if of else self.plan.spreads.get(name, _WEAK_SPREAD)
                for name, of in self.names
            ]
        )

    def rows(self, points: Sequence[Point]) -> Float64Array:
        """Return the constants of each point, as `Work.rates` takes them."""
        keys = [(point.subject.weight_format.name, point.version) for point in points]
        by_key = {key: as_row(self._constants(points[keys.index(key)], *key)) for key in set(keys)}
        return np.stack([by_key[key] for key in keys])

    def _constants(self, point: Point, fmt: str, version: str) -> StepConstants:
        return self.constants(catalogue_constants(self.hardware, point.subject.weight_format), fmt, version)

    def constants(self, prior: StepConstants, fmt: str, version: str = "") -> StepConstants:
        """Return the constants of a weight type; one without rows gets the engine's mean. `prior` is what is not fitted."""
        began = {name: each.value for name, each in self.carried.items()}
        values = {name: getattr(prior, name) for name in CONSTANTS} | began | dict(self.plan.known)
        mean = catalogue_constants(self.hardware, self.prior_format)
        for (name, of), x in zip(self.names, self.x, strict=True):
            if of not in ("", fmt, f"@{version}"):
                continue
            if of == "":
                values[name] = began.get(name, _STARTS.get(name, getattr(mean, name)))
            if name == "overlap":
                values[name] = 1.0 + (values[name] - 1.0) * float(np.exp(x))
            else:
                values[name] *= float(np.exp(x))
        values["routing_exponent"] = min(values["routing_exponent"], 1.0)
        return StepConstants(**values)

    def identified(self, fmt: str = "") -> tuple[str, ...]:
        """Return the constants that the rows decide: those that all weight types share, or those of one."""
        assert self.covariance is not None
        found = []
        for name in self.plan.by_format if fmt else self.plan.shared:
            its = np.array([constant == name and of in ("", fmt) for constant, of in self.names], np.float64)
            left = float(np.sqrt(its @ self.covariance @ its))
            values = self.constants(catalogue_constants(self.hardware, self.prior_format), fmt)
            if name == "overlap":  # its parameter moves what it is above 1
                left *= (values.overlap - 1.0) / values.overlap
            if name == "routing_exponent" and values.routing_exponent > _AT_BOUND:
                left = 0.0  # its rows have moved it there
            if left < _IDENTIFIED * (OFFSET_SPREAD[name] if fmt else self.plan.spreads.get(name, _WEAK_SPREAD)):
                found.append(name)
        return tuple(found)

    @property
    def prior_format(self) -> WeightFormat:
        """The weight type whose catalogue figures the fit starts from, whichever one is asked for."""
        return WEIGHT_FORMATS["bf16"]


def plan_for(plan: Plan, points: Sequence[Point]) -> Plan:
    """Return a plan without the constants on which no row of `points` depends."""
    families = {family for point in points for family in families_of(point.subject.model)}
    return replace(plan, shared=tuple(name for name in plan.shared if concerned(name, families)))


def fit(
    plan: Plan,
    hardware: HardwareSpec,
    points: Sequence[Point],
    work: Work,
    *,
    near: Fit | None = None,
    carried: Mapping[str, Carried] = NOTHING_CARRIED,
) -> Fit:
    """Return the constants that bring `points`, all of the plan's engine, closest to what was measured.

    Args:
        plan: What is free.
        hardware: The machine, whose figures are the prior.
        points: The figures.
        work: Their work.
        near: A fit to begin from, such as one with more rows, and with what it carried.
        carried: What other engines' rows say of constants.
    """
    if near is None:
        plan = plan_for(plan, points)
        formats = tuple(sorted({point.subject.weight_format.name for point in points}))
        versions = tuple(sorted({point.version for point in points} - {""}))
        empty = Fit(plan=plan, hardware=hardware, formats=formats, versions=versions, x=np.zeros(0), carried=carried)
    else:
        empty = near
    measured = np.log([point.measured_tok_s for point in points])
    unit = np.array([_EXPECTED_ERROR[point.kind] for point in points])
    spreads = empty.spreads()

    def at(x: Float64Array) -> Fit:
        return replace(empty, x=x, covariance=None)

    def residuals(x: Float64Array) -> Float64Array:
        off = (np.log(work.rates(at(x).rows(points))) - measured) / unit
        return np.concatenate([softened(off, _SOFT_FROM), x / spreads])

    found = least_squares(residuals, np.zeros(spreads.size) if near is None else near.x)
    return replace(at(found), covariance=covariance(residuals, found))


def without(work: Work, points: Sequence[Point], model: str) -> tuple[list[Point], Work]:
    """Return the points of all other models, and their work."""
    kept: Int64Array = np.array([i for i, point in enumerate(points) if point.subject.model.name != model], np.int64)
    return [points[i] for i in kept], work.where(kept)
