"""What the constants say of a model whose rows they were not fitted to, and how far that is off: the width of intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.sims.certainty import WIDENED
from pagedkv.sims.validation.fitting import Fit, fit, without
from pagedkv.sims.validation.points import Kind, Point
from pagedkv.sims.validation.work import Work

COVERED = 0.98
"""Quantile of the left-out figures' errors that an interval spans: what it takes for nine in ten of a new model's to lie inside,
since models differ more than the rows of one."""
FEW_MODELS = 4
"""An engine with rows of fewer models is taken to be off by as much as any engine."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A figure, and what constants say that saw no row of its model."""

    point: Point
    rate_tok_s: float

    @property
    def off(self) -> float:
        """How far it is off, as a logarithm: measured lies within simulated / e^x and simulated × e^x."""
        return float(abs(np.log(self.rate_tok_s / self.point.measured_tok_s)))


def trials(whole: Fit, points: Sequence[Point], work: Work) -> list[Trial]:
    """Leave out one model after another. A fit per model; where no row is left, the machine's own figures."""
    rates = np.empty(len(points))
    for name in sorted({point.subject.model.name for point in points}):
        chosen = np.array([i for i, point in enumerate(points) if point.subject.model.name == name])
        others, their_work = without(work, points, name)
        fitted = fit(whole.plan, whole.hardware, others, their_work, near=whole) if others else whole.unfitted()
        rates[chosen] = work.where(chosen).rates(fitted.rows([points[i] for i in chosen]))
    return [Trial(point=point, rate_tok_s=float(rate)) for point, rate in zip(points, rates, strict=True)]


def has_state(point: Point) -> bool:
    """Return whether a figure is of a model with states of fixed size, of whose cost few rows tell."""
    return any(group.kind == "state" for group in point.subject.model.layer_groups)


class Spreads:
    """How wide an interval must be, by engine, kind of figure and kind of model."""

    def __init__(self, tried: Sequence[Trial]) -> None:
        self._off = np.array([trial.off for trial in tried])
        self._kinds = np.array([trial.point.kind for trial in tried])
        self._states = np.array([has_state(trial.point) for trial in tried])
        self._engines = np.array([trial.point.engine for trial in tried])
        self._models = np.array([trial.point.subject.model.name for trial in tried])
        self._formats = np.array([trial.point.subject.weight_format.name for trial in tried])

    def of(self, engine: str, kind: Kind, *, state: bool, but_for: str | None = None) -> float:
        """Return it as a logarithm, from all trials but those of the model `but_for`.

        An engine with figures of few models is taken to be off by as much as any engine is for models without states: what those
        cost is an engine's own. Models with states are never known better than those without.
        """
        among = self._models != but_for
        own = among & (self._engines == engine)
        widest = max(self._quantile(own, kind, state), self._quantile(own, kind, False))  # noqa: FBT003
        if self._num_models(own & (self._kinds == kind)) < FEW_MODELS:
            widest = max(widest, self._quantile(among & ~self._states, kind, False))  # noqa: FBT003
        return widest

    def single_model(self, engine: str, fmt: str) -> bool:
        """Return whether fewer than two models of a weight type have figures of decoding."""
        return self._num_models((self._engines == engine) & (self._formats == fmt) & (self._kinds == "decode")) < 2

    def coverage(self, chosen: Callable[[str, str], bool] = lambda engine, kind: True) -> float:
        """Return the share of figures within the interval that the other models give; `chosen` says which, by engine and kind."""
        inside = [
            self._off[i]
            <= self.of(engine, kind, state=bool(self._states[i]), but_for=str(self._models[i]))
            * (WIDENED if self.single_model(engine, str(self._formats[i])) else 1.0)
            for i, (engine, kind) in enumerate(zip(self._engines.tolist(), self._kinds.tolist(), strict=True))
            if chosen(engine, kind)
        ]
        return float(sum(inside) / len(inside)) if inside else float("nan")

    def _num_models(self, among: Mask) -> int:
        return len(set(self._models[among].tolist()))

    def _quantile(self, among: Mask, kind: Kind, state: bool) -> float:  # noqa: FBT001
        """Return it over figures of this kind and these models, or where those are of one model, of this kind; 0 without any."""
        of_kind = among & (self._kinds == kind)
        alike = of_kind & (self._states == state)
        chosen = alike if self._num_models(alike) > 1 else of_kind
        return float(np.quantile(self._off[chosen], COVERED, method="higher")) if chosen.any() else 0.0
