"""Which constants of a step some figures identify, and the values that fit them. All others stay as they are.

A constant is identified if moving it across what is plausible changes the figures by more than measurements scatter, in a way that
no constant already chosen imitates: the columns of a Jacobian, picked one after the other by what is left of them (pivoted
Gram-Schmidt). Prefills choose a rate of arithmetic first and decoding one of reading, and rates come before fixed costs: so a
single decode rate says how fast weights are read, though a shorter overhead would explain it as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.step_constants import StepConstants
from pagedkv.sims.validation.fitting import OFFSET_SPREAD
from pagedkv.sims.validation.least_squares import least_squares, softened
from pagedkv.sims.validation.peaks import highest_flops
from pagedkv.sims.validation.work import Work, as_row
from pagedkv.weight_format import WeightFormat

PLAUSIBLE: Mapping[str, float] = MappingProxyType(
    {
        **OFFSET_SPREAD,
        "kv_read_bytes_per_s": 0.30,
        "attention_flops": 0.50,
        "state_bytes_per_s": 0.50,
        "further_state_bytes_per_s": 1.0,
        "sequence_overhead_s": 1.0,
        "batched_layer_overhead_s": 1.0,
        "step_overhead_s": 1.0,
        "routing_exponent": 0.5,
    }
)
"""Constants that a fit may move, and how far off they may plausibly be: standard deviation of the logarithm."""
_ARITHMETIC = ("linear_flops", "attention_flops")
FIRST: Sequence[tuple[bool, tuple[str, ...]]] = (
    (True, _ARITHMETIC),
    (False, ("weight_read_bytes_per_s", "kv_read_bytes_per_s")),
)
"""One of these is chosen first, for prefills (true) and for decoding."""
_SLOWER = -1.6
"""Logarithm of how much slower a rate is tried, a fifth: arithmetic that hides behind reading comes out, as in mixtures."""
_ELSEWHERE: Sequence[Mapping[str, float]] = (dict.fromkeys(_ARITHMETIC, _SLOWER), {"routing_exponent": -0.35})
"""Where a fit begins besides: a small move changes nothing of arithmetic that is hidden, nor of an exponent of 1, the largest."""
STAGES: Sequence[tuple[str, ...]] = (
    ("weight_read_bytes_per_s", "linear_flops"),
    ("kv_read_bytes_per_s", "attention_flops", "state_bytes_per_s", "further_state_bytes_per_s"),
    ("sequence_overhead_s",),
    ("routing_exponent", "batched_layer_overhead_s", "step_overhead_s"),
)
"""What is chosen after it, in this order."""
_TRIED_AT_LEAST: Mapping[str, float] = MappingProxyType({"sequence_overhead_s": 1.5e-4})
"""How large a cost may plausibly be, however small the one assumed: multiples of next to nothing are next to nothing.

Source: a sequence costs 0.02 ms (vLLM) to 0.44 ms (llama.cpp, Qwen2.5-7B in Q8_0) in published rows of a DGX Spark.
"""
_LIKE_A_SEQUENCE = ("kv_read_bytes_per_s", "further_state_bytes_per_s")
"""More sequences cost this too: it counts only where contexts differ, so that it is not the cost of a sequence."""
SCATTER = 0.02
"""Relative scatter of a measured rate."""
_NEEDED = 2.0
"""How many times the scatter a constant must make of difference."""
_UNIT = 0.05
"""What a good model misses by: figures count in units of it."""
_SOFT_FROM = 3.0
"""Units beyond which a figure counts linearly."""
_WEAK = 0.02
"""Weight of what is plausible, beside a figure's: it decides only what figures leave open."""
_ROUNDS = 3
"""How often the choice is made anew around the values that were found."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """What a fit came to."""

    constants: StepConstants
    start: StepConstants
    """What was assumed before, but for rates that are held at the peak."""
    fitted: tuple[str, ...]
    """Constants that the figures decided, in the order of their weight."""
    at_the_peak: tuple[str, ...]
    """Rates that the figures would put above the datasheet: they are held at it."""
    kept: Mapping[str, str]
    """By constant that was not fitted: why the figures do not identify it."""


def peaks_of(hardware: HardwareSpec, weight_format: WeightFormat) -> dict[str, float]:
    """Return the datasheet's limits of rates, by constant."""
    bandwidth = hardware.memory_bandwidth.value
    return {
        "weight_read_bytes_per_s": bandwidth,
        "kv_read_bytes_per_s": bandwidth,
        "state_bytes_per_s": bandwidth,
        "further_state_bytes_per_s": bandwidth,
        "linear_flops": highest_flops(hardware, weight_format),
        "attention_flops": max(figure.value for figure in hardware.spec_flops.values()),
    }


def identify(work: Work, measured: Float64Array, prefill: Mask, prior: StepConstants, peaks: Mapping[str, float]) -> Identified:
    """Return the constants that fit measurements.

    Args:
        work: The figures, at least one.
        measured: Their rates in tokens a second.
        prefill: Which of them are prefills.
        prior: What is assumed without them.
        peaks: The datasheet's limits, by constant.
    """
    held: list[str] = []
    base = prior
    while True:
        chosen: list[str] = []
        now, kept = base, dict[str, str]()
        for _ in range(_ROUNDS):
            found, kept = _chosen(work, prefill, now, held, chosen)
            if not set(found) - set(chosen):
                break
            chosen = found
            now = fitted_to(work, measured, base, chosen, peaks)
        above = [name for name in chosen if name in peaks and getattr(now, name) >= peaks[name] * (1 - 1e-9)]
        if not above:
            return Identified(constants=now, start=base, fitted=tuple(chosen), at_the_peak=tuple(held), kept=kept)
        held += above
        highest: dict[str, Any] = {name: peaks[name] for name in above}
        base = replace(base, **highest)


def fitted_to(
    work: Work, measured: Float64Array, base: StepConstants, names: Sequence[str], peaks: Mapping[str, float]
) -> StepConstants:
    """Return `base` with the constants `names` moved to where the rates of `work` come closest to `measured`."""
    spreads = np.array([PLAUSIBLE[name] for name in names])

    def at(x: Float64Array) -> StepConstants:
        values = {name: getattr(base, name) * float(np.exp(value)) for name, value in zip(names, x, strict=True)}
        return replace(base, **{name: min(value, _most(name, peaks)) for name, value in values.items()})

    def residuals(x: Float64Array) -> Float64Array:
        off = (np.log(rates(work, at(x))) - np.log(measured)) / _UNIT
        return np.concatenate([softened(off, _SOFT_FROM), _WEAK * x / spreads])

    if not names:
        return base
    elsewhere = [np.array([away.get(name, 0.0) for name in names]) for away in _ELSEWHERE]
    ends = [least_squares(residuals, start) for start in (np.zeros(len(names)), *(each for each in elsewhere if each.any()))]
    losses = [float(each @ each) for each in map(residuals, ends)]
    return at(ends[int(np.argmin(losses))])


def rates(work: Work, constants: StepConstants) -> Float64Array:
    """Return the tokens a second of every figure."""
    return work.rates(np.broadcast_to(as_row(constants), (work.tokens.size, as_row(constants).size)))


def left_out_errors(work: Work, measured: Float64Array, found: Identified, peaks: Mapping[str, float]) -> Float64Array:
    """Return how far each figure is off, as a logarithm, by constants fitted to the others from the same start. A fit each."""
    off = np.empty(measured.size)
    for i in range(measured.size):
        others: Int64Array = np.delete(np.arange(measured.size), i)
        constants = fitted_to(work.where(others), measured[others], found.start, found.fitted, peaks)
        off[i] = np.log(rates(work, constants)[i] / measured[i])
    return off


def _most(name: str, peaks: Mapping[str, float]) -> float:
    return 1.0 if name == "routing_exponent" else peaks.get(name, np.inf)


def _chosen(
    work: Work, prefill: Mask, now: StepConstants, held: Sequence[str], before: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Return what the figures identify around `now`, what was chosen `before` included, and why not the others."""
    movable = [name for name in PLAUSIBLE if name not in held and 0 < getattr(now, name) < np.inf]
    effect = {name: _effect(work, now, name) for name in movable}
    chosen = list(before) or list(_first(work, prefill, now, movable))
    span = [effect[name] for name in chosen]

    def left(name: str) -> float:
        also = [effect["sequence_overhead_s"]] if chosen and name in _LIKE_A_SEQUENCE and "sequence_overhead_s" in effect else []
        return float(np.linalg.norm(_beyond(effect[name], [*span, *also])))

    def take(among: Sequence[str]) -> bool:
        if len(chosen) >= work.tokens.size:
            return False
        sizes = {name: left(name) for name in among if name in effect and name not in chosen}
        best = max(sizes, key=sizes.__getitem__, default=None)
        if best is None or sizes[best] < _NEEDED * SCATTER:
            return False
        chosen.append(best)
        span.append(effect[best])
        return True

    for stage in STAGES:
        while take(stage):
            pass
    kept = {}
    for name in movable:
        if name not in chosen:
            alone = float(np.linalg.norm(effect[name]))
            more = f"what it changes, {', '.join(chosen)} can change too"
            kept[name] = "these figures hardly depend on it" if alone < _NEEDED * SCATTER else more
    return chosen, kept


def _first(work: Work, prefill: Mask, now: StepConstants, movable: Sequence[str]) -> Iterator[str]:
    """Yield a rate of arithmetic for prefills and a rate of reading for decoding, where they depend on one."""
    for kind, among in FIRST:
        mine = prefill == kind
        if not mine.any() or not set(among) <= set(movable):  # one is held at its peak: what the figures lack is elsewhere
            continue
        sizes = {name: float(np.linalg.norm(_when_slower(work, now, name)[mine])) for name in among}
        best = max(sizes, key=lambda name: sizes[name] * PLAUSIBLE[name], default=None)
        if best is not None and sizes[best] >= _NEEDED * SCATTER:
            yield best


def _effect(work: Work, now: StepConstants, name: str) -> Float64Array:
    """Return by how much moving a constant across what is plausible changes the logarithm of each rate, on the side with more."""
    value, factor = getattr(now, name), float(np.exp(PLAUSIBLE[name]))
    up = min(value * factor, 1.0) if name == "routing_exponent" else max(value * factor, _TRIED_AT_LEAST.get(name, 0.0))
    low, here, high = (np.log(rates(work, replace(now, **{name: each}))) for each in (value / factor, value, up))
    sides: list[Float64Array] = [high - here, here - low]
    largest = max(sides, key=lambda side: float(np.linalg.norm(side)))
    if name in _ARITHMETIC and np.linalg.norm(largest) < SCATTER:
        return _when_slower(work, now, name) * (PLAUSIBLE[name] / -_SLOWER)
    return largest


def _when_slower(work: Work, now: StepConstants, name: str) -> Float64Array:
    """Return by how much the logarithm of each rate falls with a constant at a fifth."""
    slower = replace(now, **{name: getattr(now, name) * float(np.exp(_SLOWER))})
    fall: Float64Array = np.log(rates(work, now)) - np.log(rates(work, slower))
    return fall


def _beyond(column: Float64Array, span: Sequence[Float64Array]) -> Float64Array:
    """Return what no mixture of the columns `span` gives of `column`."""
    if not span:
        return column
    basis = np.stack(span, axis=1)
    rest: Float64Array = column - basis @ np.linalg.lstsq(basis, column, rcond=1e-9)[0]
    return rest
