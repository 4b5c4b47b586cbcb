"""What measured rates say of a machine's step times: the constants that they identify, how well these fit, what stays as it was."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array
from pagedkv.catalogue import load_model
from pagedkv.sims.calibrate.figures import Figure
from pagedkv.sims.calibrate.identified import Identified, identify, left_out_errors, peaks_of, rates
from pagedkv.sims.calibrate.subject import Subject
from pagedkv.sims.calibration import Calibration, calibration_for
from pagedkv.sims.engines import load_engine
from pagedkv.sims.step_constants import EAGER_S_PER_LAYER, StepConstants
from pagedkv.sims.step_groups import OF_WEIGHTS, SHARED
from pagedkv.sims.validation.points import KINDS, Point
from pagedkv.sims.validation.published import MEAN_BARS
from pagedkv.sims.validation.work import Work

_LEAST_SPREAD = 0.05
"""No rate is known better than this, however well the figures fit: a run differs from the next."""
_FIGURES_FOR_A_SPREAD = 3
"""A kind of rate needs so many figures for its own spread."""
_FAR = math.log(2.5)
"""A constant that moves by more than this factor is told: something else may have run."""
_OF_FAMILY = {"": "llama-3.1-8b", "state_": "qwen3.5-9b", "experts_": "qwen3-30b-a3b"}
"""By prefix of a spread: a model of just that family."""
MORE_FIGURES_THAN_CONSTANTS = 3
"""Fewer figures than constants and this are too few."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpeedFound:
    """What rates identify."""

    figures: tuple[Figure, ...]
    found: Identified
    prior: Calibration
    """What applied before, and still does for all that was not identified."""
    fitted_tok_s: tuple[float, ...]
    """By figure: the rate with the fitted constants."""
    before_tok_s: tuple[float, ...]
    """By figure: the rate before."""
    group: Mapping[str, Any]
    """What the hardware file carries."""
    doubts: str
    """Why it is not validated; empty: it is."""
    notes: tuple[str, ...]

    @property
    def errors(self) -> list[float]:
        """Relative error of each figure after the fit."""
        return [ours / figure.point.measured_tok_s - 1 for ours, figure in zip(self.fitted_tok_s, self.figures, strict=True)]

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        found, before = self.found, self.prior.constants
        return {
            "fitted": {
                name: {"value": float(getattr(found.constants, name)), "before": float(getattr(before, name))}
                for name in found.fitted
            },
            "kept": {name: {"value": float(getattr(found.constants, name)), "why": why} for name, why in found.kept.items()},
            "at_the_peak": list(found.at_the_peak),
            "kept_from": self.prior.basis,
            "num_figures": len(self.figures),
            "num_models": self.group["num_models"],
            "status": "not validated" if self.doubts else "validated",
            "why": self.doubts or None,
            "mean_error": float(np.mean(np.abs(self.errors))),
            "largest_error": float(np.max(np.abs(self.errors))),
            "figures": [
                {
                    "where": figure.where,
                    "what": figure.what,
                    "measured_tok_s": figure.point.measured_tok_s,
                    "fitted_tok_s": ours,
                    "before_tok_s": old,
                    "error": error,
                }
                for figure, ours, old, error in zip(self.figures, self.fitted_tok_s, self.before_tok_s, self.errors, strict=True)
            ],
            "notes": list(self.notes),
        }


def speed_of(subject: Subject, figures: Sequence[Figure], *, date: str, sources: Sequence[str], name: str) -> SpeedFound:
    """Return the constants that at least one figure identifies.

    Args:
        subject: What ran.
        figures: Its rates.
        date: Written beside them.
        sources: Where they come from, in words.
        name: What the new hardware file will be called.
    """
    request, points = subject.request, [figure.point for figure in figures]
    bare = replace(request.hardware, linear_by_rows={})  # a fit to rates is one of operations and bytes
    prior = calibration_for(bare, subject.engine, request.weight_format, request.kv_cache_dtype, model=request.model)
    work, measured = Work.of(points), np.array([point.measured_tok_s for point in points])
    peaks = peaks_of(request.hardware, request.weight_format)
    eager_s = EAGER_S_PER_LAYER if load_engine(subject.engine).runs_eagerly(subject.serving) else 0.0
    start = replace(prior.constants, layer_overhead_s=prior.constants.layer_overhead_s + eager_s)
    kinds = np.array([point.kind for point in points])
    found = identify(work, measured, kinds == "prefill", start, peaks)
    fitted, before = rates(work, found.constants), rates(work, start)
    off = np.abs(fitted / measured - 1)
    group = {
        "machine": name,
        "engine": subject.engine,
        "kv_cache_dtypes": sorted({point.kv_cache_dtype for point in points}),
        "source": f"{', '.join(sources)}: {_counted(len(points), 'figure')} of {', '.join(_models(points))}",
        "date": date,
        "num_figures": len(points),
        "num_models": len(_models(points)),
        "num_constants": len(found.fitted),
        "doubt": "; ".join(_doubts(off, kinds, len(found.fitted))),
        "models": _models(points),
        "fitted": list(found.fitted),
        "at_the_peak": list(found.at_the_peak),
        "kept": prior.basis,
        "mean_error": float(off.mean()),
        "largest_error": float(off.max()),
        "own_spread": _own_spread(work, measured, found, peaks, kinds),
        **_constants(subject, replace(found.constants, layer_overhead_s=prior.constants.layer_overhead_s), points),
    }
    machine = replace(request.hardware, step_constants=(group,))
    after = calibration_for(machine, subject.engine, request.weight_format, request.kv_cache_dtype, model=request.model)
    return SpeedFound(
        figures=tuple(figures),
        found=found,
        prior=prior,
        fitted_tok_s=tuple(map(float, fitted)),
        before_tok_s=tuple(map(float, before)),
        group=group,
        doubts=after.why,
        notes=tuple(_notes(found, prior.constants)),
    )


def _models(points: Sequence[Point]) -> list[str]:
    return sorted({point.subject.model.name for point in points})


def _constants(subject: Subject, constants: StepConstants, points: Sequence[Point]) -> dict[str, Any]:
    """Return the tables of a group: constants, spreads of models that were not measured, the weight type's own."""
    counted = {"num_models": len(_models(points)), "num_figures": len(points)}
    of_weights = {name: float(getattr(constants, name)) for name in OF_WEIGHTS}
    return {
        "constants": {name: float(getattr(constants, name)) for name in SHARED},
        "spread": _spreads(subject),
        "any_weights": {},
        "weights": {subject.request.weight_format.name: of_weights | counted},
    }


def _own_spread(
    work: Work, measured: Float64Array, found: Identified, peaks: Mapping[str, float], kinds: npt.NDArray[np.str_]
) -> dict[str, float]:
    """Return how far rates of the measured models may be off, by kind: as the figures are when left out one by one."""
    if measured.size <= len(found.fitted):
        return {}
    off = np.abs(left_out_errors(work, measured, found, peaks))
    return {
        kind: max(_LEAST_SPREAD, float(off[kinds == kind].max()))
        for kind in KINDS
        if (kinds == kind).sum() >= _FIGURES_FOR_A_SPREAD
    }


def _doubts(off: Float64Array, kinds: npt.NDArray[np.str_], num_constants: int) -> Iterator[str]:
    """Yield why figures that are `off` by so much do not validate so many constants."""
    for kind in KINDS:
        if (kinds == kind).any() and (error := float(off[kinds == kind].mean())) > MEAN_BARS[kind]:
            yield f"its {kind} figures are off by {error:.1%} on average, more than {MEAN_BARS[kind]:.0%}"
    needed = num_constants + MORE_FIGURES_THAN_CONSTANTS
    if off.size < needed:
        yield f"{_counted(off.size, 'figure')}, needs {needed} for {_counted(num_constants, 'constant')}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _spreads(subject: Subject) -> dict[str, float]:
    """Return how far constants of before are off for models that were not measured, by family."""
    request = subject.request
    spreads: dict[str, float] = {}
    for prefix, name in _OF_FAMILY.items():
        model = replace(load_model(name), name="")  # any of its family: none that was measured
        known = calibration_for(request.hardware, subject.engine, request.weight_format, request.kv_cache_dtype, model=model)
        spreads |= {f"{prefix}decode": known.decode_spread, f"{prefix}prefill": known.prefill_spread}
    return spreads


def _notes(found: Identified, before: StepConstants) -> list[str]:
    notes = [] if found.fitted else ["these figures identify no constant: step times stay as they are"]
    notes += [
        f"{name} is at the datasheet's limit: the figures ask for more, so that some fixed cost that is kept is too high here"
        for name in found.at_the_peak
    ]
    for name in found.fitted:
        factor = getattr(found.constants, name) / getattr(before, name)
        if abs(math.log(factor)) > _FAR and name in OF_WEIGHTS:
            notes.append(
                f"{name} came out at {factor:.2g} times what is usual: is --model, --quantization and --hardware what ran, all of "
                "it on the GPU?"
            )
    return notes
